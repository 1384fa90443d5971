"""Print, for every product of the model, how it is stored and which runner and kernel compute it, and why.

A GPU that is not here is named by its compute capability: --device sm_90 or --device sm_100.
"""

import argparse
import json
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_list_argument, add_model_argument, add_plan_arguments
from ownpath.commands.listings import kernels_of_plan
from ownpath.terminal.console import show, write_data
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath plan [MODEL]``"""
    parser = subparsers.add_parser("plan", help="show which kernel runs what, and why", description=__doc__)
    add_model_argument(parser)
    add_plan_arguments(parser, any_gpu=True)
    parser.add_argument("--draft", action="store_true", help="plan the MTP draft module too")
    parser.add_argument("--scales", action="store_true", help="read the scales: which weights are lossless casts?")
    parser.add_argument("--json", action="store_true", help="one entry per module, for programs")
    add_list_argument(parser, kernels_of_plan, "every kernel with its contract, and the steps of --numerics")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the plan, from headers alone (and the scales, if asked for).

    Errors: ValueError naming the file, field, tensor or module.
    """
    with Progress("planning"):
        from ownpath.loading import default_model_dir, lossless_casts, plan_model
        from ownpath.plan.show import plan_dict, plan_page

        folder = args.model or default_model_dir()
        wanted = {"batch_invariant": args.batch_invariant, "official": args.numerics, "loads_draft": args.draft}
        wanted |= {"reference": frozenset(args.reference), "cache_format": args.cache_format}
        plan = plan_model(folder, args.device, **wanted)
        casts = lossless_casts(plan, folder) if args.scales else None
    if args.json:
        write_data(json.dumps(plan_dict(plan) | ({} if casts is None else {"lossless_casts": casts}), indent=1))
        return 0
    show(*plan_page(plan, casts))
    return 0
