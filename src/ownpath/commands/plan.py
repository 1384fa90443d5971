"""Print, for every product of the model, how it is stored and which runner and kernel compute it, and why."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_model_argument

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath plan [MODEL]``"""
    parser = subparsers.add_parser("plan", help="show which kernel runs what, and why", description=__doc__)
    add_model_argument(parser)
    parser.add_argument("--device", default="cpu", help="torch device to plan for (default: cpu)")
    parser.add_argument("--json", action="store_true", help="one entry per module, for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the plan, from headers alone. Errors: ValueError naming the file, field, tensor or module."""
    from ownpath.loading import default_model_dir, plan_model
    from ownpath.plan.show import plan_dict, plan_text

    folder = default_model_dir() if args.model is None else Path(args.model)
    plan = plan_model(folder, args.device)
    print(json.dumps(plan_dict(plan), indent=1) if args.json else plan_text(plan))
    return 0
