"""``verify`` by several ranks: each compares its part of the chosen layers, and all learn what all have found."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ownpath.commands.arguments import whole_number
from ownpath.commands.rank_options import MOST_RANKS
from ownpath.commands.ranks import beside
from ownpath.splits import AttentionSplit, ExpertSplit

if TYPE_CHECKING:
    from ownpath.verify.run import Verification, VerifyJob

STAGES = ("layers",)
"""The stages that ranks run together; the others look at a checkpoint, or at kernels alone."""
_LIMIT_S = 120.0
"""The longest that a rank may compute its reference beyond the others."""
RankReport = dict[str, Any]
"""As ``verify.report.report_dict`` makes it."""


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Adds ``--ranks`` and ``--expert-split``."""
    parser.add_argument(
        "--ranks",
        type=whole_number(1, MOST_RANKS),
        default=1,
        metavar="N",
        help="processes of one host that run each layer together; the stage layers alone (default: 1)",
    )
    parser.add_argument(
        "--expert-split",
        choices=[str(split) for split in ExpertSplit],
        default=str(ExpertSplit.WIDTH),
        help="what ranks divide of routed experts: the width of each, or the experts by their ids (default: width)",
    )
    parser.set_defaults(attention=str(AttentionSplit.HEADS))


def check_ranks(args: argparse.Namespace) -> None:
    """Errors: ValueError for options that several ranks do not take."""
    for option, given in (("--stages", args.stages not in (None, STAGES)), ("--work", args.work is not None)):
        if given:
            raise ValueError(f"{option}: several ranks compare layers alone, in one go (--stages {','.join(STAGES)})")


def verify_ranks(args: argparse.Namespace, job: "VerifyJob", rank: int) -> "tuple[Verification, list[RankReport]]":
    """Verifies with the other ranks; returns this one's result and the reports of all. Errors: PeerLost."""
    from dataclasses import replace

    from ownpath.commands.rank_start import window_opener
    from ownpath.config import Parallel
    from ownpath.ranks.start import swap_text
    from ownpath.verify.report import report_dict
    from ownpath.verify.run import verify

    with beside(args, rank) as group:
        assert group is not None
        group.limit_s = _LIMIT_S
        device = job.engine.device if job.engine.device == "cpu" else f"{job.engine.device}:{rank}"
        parallel = Parallel(rank, args.ranks, experts=ExpertSplit(args.expert_split))
        engine = replace(job.engine, device=device, parallel=parallel)
        opener = window_opener(device, group)
        result = verify(replace(job, engine=engine, peers=group, open_window=opener), STAGES)
        told = swap_text(group, "verified", json.dumps(report_dict(result), allow_nan=False))
    return result, [json.loads(text) for text in told]


def rank_lines(reports: Sequence[RankReport]) -> list[str]:
    """Returns a line for each rank, and one for each finding that failed on another than the first."""
    lines = []
    for rank, report in enumerate(reports):
        findings = [finding for stage in report["stages"] for finding in stage["findings"]]
        bad = [finding for finding in findings if finding["verdict"] == "FAIL"]
        values = max(report["measurements"], key=lambda one: float(one["excess"]), default=None)
        near = "" if values is None else f"; nearest to its budget layers.{values['layer_idx']}.{values['slot']}"
        near += "" if values is None else f", {float(values['excess']):.2f} of it"
        lines.append(f"rank {rank}: {report['verdict']}, {len(report['measurements'])} values{near}")
        lines += [f"rank {rank}: {one['id']} {one['where']}: {one['message']}" for one in bad if rank]
    return lines
