"""Verify a checkpoint on this device, stage by stage: files, environment, load, kernels, layers, ledger.

Reads layer by layer: a checkpoint larger than memory needs no more than two layers of it. Exit code: 0 all passed,
1 something failed, 2 config.json or the tensors cannot be read (or wrong usage).
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_list_argument, add_model_argument, add_plan_arguments, positive_int
from ownpath.commands.listings import checks_of_verify

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath verify [MODEL]``"""
    parser = subparsers.add_parser("verify", help="prove each step, and name what is wrong", description=__doc__)
    add_model_argument(parser)
    add_plan_arguments(parser)
    parser.add_argument("--stages", type=_names, metavar="NAME,...", help="default: all of them")
    parser.add_argument("--layers", type=_layers, metavar="0,3-5", help="only these layers (default: all)")
    parser.add_argument("--experts", type=positive_int, metavar="N", help="a sample of each layer's (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    parser.add_argument("--source", type=Path, metavar="DIR", help="another export of the same model, to compare with")
    parser.add_argument("--ledger", type=Path, metavar="PLAN", help="what `ownpath plan --json` printed: that must run")
    parser.add_argument("--keep-going", action="store_true", help="run later stages although the file stage failed")
    parser.add_argument("--json", metavar="PATH", help="write the report for programs there; - prints it instead")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write the report as one page for a browser there")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to keep what a later run can resume from")
    add_list_argument(parser, checks_of_verify, "every check and what makes it fail")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the report. Errors: ValueError for no such folder, stage, layer or device."""
    from dataclasses import replace

    from ownpath.config import EngineConfig
    from ownpath.loading import default_model_dir, device_caps, leave_a_core
    from ownpath.verify.html import report_html
    from ownpath.verify.plan_file import read_plan_file
    from ownpath.verify.report import report_dict, report_text
    from ownpath.verify.run import STAGES, VerifyJob, verify
    from ownpath.verify.subject import Selection

    folder = default_model_dir() if args.model is None else Path(args.model)
    for path in (folder, args.source):
        if path is not None and not path.is_dir():
            raise ValueError(f"{path}: no such model folder")
    _check_can_be_written(args)
    device_caps(args.device)  # says what is wrong with the device's name before torch does
    leave_a_core()
    engine = replace(
        EngineConfig.for_device(args.device),
        is_batch_invariant=args.batch_invariant,
        official=args.numerics,
        reference=frozenset(args.reference),
    )
    written = None if args.ledger is None else read_plan_file(args.ledger)
    job = VerifyJob(folder, engine, Selection(args.layers, args.experts, args.seed), args.source, args.work, written)
    result = verify(job, args.stages or STAGES, keeps_going=args.keep_going)
    if args.json is not None and args.json != "-":
        Path(args.json).write_text(json.dumps(report_dict(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.html is not None:
        args.html.write_text(report_html(result), encoding="utf-8")
    print(json.dumps(report_dict(result), indent=1, allow_nan=False) if args.json == "-" else report_text(result))
    if result.unreadable:
        return 2
    return 0 if result.passed else 1


def _check_can_be_written(args: argparse.Namespace) -> None:
    """Checks the report's path before minutes of work. Errors: ValueError if its folder is missing, or it is a
    folder."""
    json_path = None if args.json in (None, "-") else Path(args.json)
    for path in (json_path, args.html):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path}: the report cannot be written there")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _layers(text: str) -> frozenset[int]:
    """Parses layer ids: ``0,3-5`` -> {0, 3, 4, 5}."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a layer nor a range such as 3-5")
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start or stop > 10_000:
            raise argparse.ArgumentTypeError(f"{part!r}: ranges go from a layer to a later one, at most 10000")
        found.update(range(start, stop + 1))
    return frozenset(found)
