"""Verify a checkpoint on this device, stage by stage: files, environment, load, kernels, layers, ledger.

Reads layer by layer: a checkpoint larger than memory needs no more than two layers of it. Exit code: 0 all passed,
1 something failed, 2 config.json or the tensors cannot be read (or wrong usage).

With --engine vllm, the modules of a running vLLM are compared instead: every option that is not listed here is vLLM's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import (
    add_list_argument,
    add_model_argument,
    add_plan_arguments,
    file_to_read,
    file_to_write,
    folder_to_write,
    model_folder,
    whole_number,
)
from ownpath.commands.listings import checks_of_verify
from ownpath.commands.ranks import rank_of
from ownpath.commands.settings import PASSED_ON
from ownpath.commands.start import starting
from ownpath.commands.verify_ranks import add_ranks, check_ranks, rank_lines, verify_ranks
from ownpath.terminal.console import show, write_data
from ownpath.terminal.text import listed, quoted
from ownpath.verify.checks import STAGE_NAMES

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.commands.verify_ranks import RankReport
    from ownpath.verify.run import Verification


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath verify [MODEL]``"""
    parser = subparsers.add_parser("verify", help="prove each step, and name what is wrong", description=__doc__)
    add_model_argument(parser)
    add_plan_arguments(parser)
    add_ranks(parser)
    parser.add_argument(
        "--stages", type=_stages, metavar="NAME,...", help=f"some of {', '.join(STAGE_NAMES)} (default: all of them)"
    )
    parser.add_argument("--layers", type=_layers, metavar="0,3-5", help="only these layers (default: all)")
    parser.add_argument("--draft", action="store_true", help="verify the MTP module too, and steps that draft with it")
    parser.add_argument("--experts", type=whole_number(1), metavar="N", help="a sample of each layer's (default: all)")
    parser.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="S", help="of that sample (default: 0)"
    )
    parser.add_argument(
        "--source", type=model_folder, metavar="DIR", help="another export of the same model, to compare with"
    )
    parser.add_argument(
        "--ledger", type=file_to_read, metavar="PLAN", help="what `ownpath plan --json` printed: that must run"
    )
    parser.add_argument("--keep-going", action="store_true", help="run later stages although the file stage failed")
    parser.add_argument(
        "--json", type=_json_path, metavar="PATH", help="write the report for programs there; - prints it instead"
    )
    parser.add_argument(
        "--html", type=file_to_write, metavar="PATH", help="write the report as one page for a browser there"
    )
    parser.add_argument(
        "--work", type=folder_to_write, metavar="FOLDER", help="where to keep what a later run can resume from"
    )
    parser.add_argument(
        "--engine", choices=("ownpath", "vllm"), default="ownpath", help="whose modules to prove (default: ownpath)"
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        metavar="1,2,64",
        help="with --engine vllm: sizes of the steps to run (default: 1,2,5,64,130,700)",
    )
    parser.set_defaults(**{PASSED_ON: ()})
    add_list_argument(parser, checks_of_verify, "every check and what makes it fail")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the report. Errors: ValueError for no such layer or device, or an option that does not fit the engine."""
    passed_on = getattr(args, PASSED_ON)
    if args.engine == "vllm":
        return _run_vllm(args, passed_on)
    if passed_on or args.rows:
        raise ValueError(
            f"{passed_on[0] if passed_on else '--rows'}: only with --engine vllm (`ownpath verify --help`)"
        )
    rank = rank_of(args)
    if args.ranks > 1:
        check_ranks(args)
    is_one_of_several = args.ranks > 1 and args.device != "cpu"
    with starting(f"{args.device}:{rank}" if is_one_of_several else args.device):
        from dataclasses import replace

        from ownpath.config import EngineConfig
        from ownpath.loading import default_model_dir, device_caps, leave_a_core
        from ownpath.verify.plan_file import read_plan_file
        from ownpath.verify.run import VerifyJob, verify
        from ownpath.verify.subject import Selection

    folder = args.model or default_model_dir()
    device_caps(args.device)  # says that a device is not there before torch does
    leave_a_core(args.ranks)
    engine = replace(
        EngineConfig.for_device(args.device),
        is_batch_invariant=args.batch_invariant,
        official=args.numerics,
        reference=frozenset(args.reference),
        cache_format=args.cache_format,
        draws_weights=args.random_weights,
        loads_draft=args.draft,
        rows_per_request=2 if args.draft else 1,
    )
    written = None if args.ledger is None else read_plan_file(args.ledger)
    job = VerifyJob(folder, engine, Selection(args.layers, args.experts, args.seed), args.source, args.work, written)
    if args.ranks == 1:
        return _show(verify(job, args.stages or STAGE_NAMES, keeps_going=args.keep_going), args)
    result, reports = verify_ranks(args, job, rank)
    return _show(result, args, reports) if rank == 0 else 0


_NOT_VLLM = ("stages", "draft", "experts", "source", "ledger", "keep_going", "batch_invariant", "numerics", "reference")
"""Options of our own engine's verification."""


def _run_vllm(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Verifies vLLM. Errors: ValueError where vLLM is not installed, or for an option of our own engine."""
    given = [name for name in _NOT_VLLM if getattr(args, name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is of ownpath's own engine, not of vLLM's")
    with starting("cpu"):
        from tempfile import TemporaryDirectory

        from ownpath.integrations.vllm.proof.run import VllmJob, verify_vllm
        from ownpath.integrations.vllm.proof.steps import ROWS
        from ownpath.loading import default_model_dir

    with TemporaryDirectory(prefix="ownpath-vllm-") as folder:
        work = args.work or Path(folder)
        model, is_kept = args.model or default_model_dir(), args.work is not None
        job = VllmJob(model, work, tuple(options), args.layers, args.rows or ROWS, is_kept)
        return _show(verify_vllm(job), args)


def _show(result: "Verification", args: argparse.Namespace, reports: "Sequence[RankReport]" = ()) -> int:
    """Writes and prints the report; returns the exit code. reports: of all ranks, of which this is the first."""
    from ownpath.terminal.page import line
    from ownpath.verify.html import report_html
    from ownpath.verify.report import report_dict, report_page

    told = report_dict(result) | ({"ranks": list(reports)} if reports else {})
    if isinstance(args.json, Path):
        args.json.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.html is not None:
        args.html.write_text(report_html(result), encoding="utf-8")
    if args.json == "-":
        write_data(json.dumps(told, indent=1, allow_nan=False))
    else:
        show(*report_page(result), *map(line, rank_lines(reports)))
    if result.unreadable:
        return 2
    return 0 if result.passed and all(report["verdict"] == told["verdict"] for report in reports) else 1


def _rows(text: str) -> tuple[int, ...]:
    """Parses numbers of rows: ``1,2,64``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 100_000 for part in parts):
        raise argparse.ArgumentTypeError(f"{quoted(text)}: numbers of rows from 1 to 100000, with commas between them")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _json_path(text: str) -> Path | str:
    """Parses where the JSON goes: a file, or - for standard output."""
    return text if text == "-" else file_to_write(text)


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in STAGE_NAMES:
            known = listed(list(STAGE_NAMES))
            raise argparse.ArgumentTypeError(f"there is no stage {quoted(name)}; the stages are {known}")
    return names


def _layers(text: str) -> frozenset[int]:
    """Parses layer ids: ``0,3-5`` -> {0, 3, 4, 5}."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise argparse.ArgumentTypeError(f"{quoted(part)} is neither a layer nor a range such as 3-5")
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start or stop > 10_000:
            raise argparse.ArgumentTypeError(f"{quoted(part)}: ranges go from a layer to a later one, at most 10000")
        found.update(range(start, stop + 1))
    return frozenset(found)
