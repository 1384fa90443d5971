"""Print what a checkpoint is, how it is stored, what it takes to run, and everything that is wrong with it.

Reads headers, scalars, tables of expert ids, the first 4 KiB of every module's block scales, and a few rows of every
weight. Exit code: 0 nothing is wrong (there may be warnings), 1 problems, 2 config.json or the tensors cannot be read
(or wrong usage).
"""

import argparse
import json
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_list_argument, add_model_argument, add_reference_argument
from ownpath.commands.listings import problems_of_inspect
from ownpath.terminal.console import show, write_data
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath inspect [MODEL]``"""
    parser = subparsers.add_parser("inspect", help="show what a checkpoint is and what is wrong", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--all-scales", action="store_true", help="read every block scale instead of a sample")
    parser.add_argument(
        "--draft", action="store_true", help="look at the draft (MTP or DSpark) too, and count its memory"
    )
    add_reference_argument(parser)
    parser.add_argument("--json", action="store_true", help="one object with every problem, for programs")
    add_list_argument(parser, problems_of_inspect, "every kind of problem, and every encoding")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the inspection."""
    with Progress("inspecting"):
        from ownpath.finding import failed
        from ownpath.inspect.inspection import inspect_folder
        from ownpath.inspect.report import inspection_dict, inspection_page
        from ownpath.loading import default_model_dir

        folder = args.model or default_model_dir()
        inspection = inspect_folder(
            folder, read_all_scales=args.all_scales, with_draft=args.draft, reference=frozenset(args.reference)
        )
    if args.json:
        write_data(json.dumps(inspection_dict(inspection), indent=1))
    else:
        show(*inspection_page(inspection))
    if inspection.contents is None:
        return 2
    return 1 if failed(inspection.problems) else 0
