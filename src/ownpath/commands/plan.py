"""Print, for every product of the model, how it is stored and which runner and kernel compute it, and why.

A GPU that is not here is named by its compute capability: --device sm_90 or --device sm_100.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ownpath.commands.arguments import add_list_argument, add_model_argument, add_plan_arguments
from ownpath.commands.listings import kernels_of_plan
from ownpath.commands.rank_options import add_ranks_arguments, parallel_of
from ownpath.terminal.console import show, write_data
from ownpath.terminal.progress import Progress

if TYPE_CHECKING:
    from ownpath.commands.arguments import Subparsers
    from ownpath.plan.plan import Plan
    from ownpath.plan.show_ranks import RankMemory


def add_parser(subparsers: "Subparsers") -> argparse.ArgumentParser:
    """``ownpath plan [MODEL]``"""
    parser = subparsers.add_parser("plan", help="show which kernel runs what, and why", description=__doc__)
    add_model_argument(parser)
    add_plan_arguments(parser, any_gpu=True)
    add_ranks_arguments(parser)
    parser.add_argument("--draft", action="store_true", help="plan the draft (MTP or DSpark) too")
    parser.add_argument("--scales", action="store_true", help="read the scales: which weights are lossless casts?")
    parser.add_argument("--json", action="store_true", help="one entry per module, for programs")
    add_list_argument(parser, kernels_of_plan, "every kernel with its contract, and the steps of --numerics")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the plan, from headers alone (and the scales, if asked for).

    Errors: ValueError naming the file, field, tensor or module.
    """
    if args.scales and args.random_weights:
        raise ValueError("--scales: with --random-weights no scale is stored")
    with Progress("planning"):
        from ownpath.loading import default_model_dir, lossless_casts
        from ownpath.plan.show import plan_dict, plan_page
        from ownpath.plan.show_ranks import rank_dict, rank_page

        folder = args.model or default_model_dir()
        plan, memory = _planned(folder, args)
        casts = lossless_casts(plan, folder) if args.scales else None
    if args.json:
        whole = plan_dict(plan) | ({} if casts is None else {"lossless_casts": casts})
        write_data(json.dumps(whole | ({} if memory is None else rank_dict(plan, memory)), indent=1))
        return 0
    show(*plan_page(plan, casts), *([] if memory is None else rank_page(plan, memory)))
    return 0


def _planned(folder: Path, args: argparse.Namespace) -> "tuple[Plan, RankMemory | None]":
    """Returns the plan, of rank 0 of several, and then what a rank holds."""
    from ownpath.cache.pools import CacheSpec
    from ownpath.config import EngineConfig
    from ownpath.inspect.memory import replicated_bytes, weights_bytes
    from ownpath.loading import planned, planned_caps, planned_ranks
    from ownpath.plan.show_ranks import RankMemory

    caps = planned_caps(args.device)  # before torch, for a clearer error about the device's name
    config = replace(
        EngineConfig.for_device(caps.device_type),
        is_batch_invariant=args.batch_invariant,
        official=args.numerics,
        loads_draft=args.draft,
        reference=frozenset(args.reference),
        cache_format=args.cache_format,
        draws_weights=args.random_weights,
        parallel=parallel_of(args),
    )
    if config.parallel.size == 1:
        return planned(folder, config, caps)[0], None
    (plan, *_), index = planned_ranks(folder, config, caps)
    caches = CacheSpec.of(plan.config, replace(config, device="meta"))
    held = weights_bytes(plan, index), replicated_bytes(plan, index)
    return plan, RankMemory(*held, caches.slot_bytes, caches.token_bytes)
