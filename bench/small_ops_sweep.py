"""Times tiles of the small operations that have a choice: ``python bench/small_ops_sweep.py --out FILE``.

``choose_tiles`` in ``kernels/hyper/tiles.py`` and ``kernels/grouped/launch.py`` is the outcome of such a sweep. A tile
is checked before it is timed; a wrong one is reported, not timed.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_ops import bound_call, machine, num_sets, replay_us

from ownpath.conformance.operations import CASES, judge, make_inputs, num_bytes
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.grouped import launch as grouped
from ownpath.kernels.hyper import launch as hyper
from ownpath.kernels.hyper.tiles import BoundaryTiles
from ownpath.kernels.registry import KERNELS

HYPER = (
    *(BoundaryTiles(channels, 1, False, 4, 1, 1) for channels in (32, 64)),
    *(BoundaryTiles(64, tokens, False, 4, 1, 1) for tokens in (2, 4)),
    *(BoundaryTiles(channels, 16, True, 1, 3, 1) for channels in (32, 64, 128)),
)
GROUPED = (
    *(grouped.GroupedTiles(64, 16, channels, 5, 4) for channels in (64, 128)),
    *(grouped.GroupedTiles(64, tokens, 128, 4, 4) for tokens in (32, 64)),
    *(grouped.GroupedTiles(64, 128, 64, stages, 4) for stages in (4, 6)),
    *(grouped.GroupedTiles(128, tokens, 64, 3, 8) for tokens in (128, 256)),
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)


def time_tiles(case: KernelCase, module: Any, tiles: Any, sets: Sequence[tuple[Any, ...]]) -> float | str:
    """Returns the microseconds of a call with these tiles, or the reason why they cannot be timed."""
    kernel = KERNELS[case.kernel]
    with mock.patch.object(module, "choose_tiles", return_value=tiles):
        try:
            judge(case, kernel(*sets[0]), sets[0])
        except (AssertionError, RuntimeError) as error:
            return repr(error)[:120]
        return round(replay_us([bound_call(kernel, inputs) for inputs in sets], 12), 2)


def main() -> None:
    """Prints and records one line for each case, number of tokens and tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    options = parser.parse_args()
    facts, device = machine(), torch.device("cuda")
    pairs: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("hyper_boundary", hyper, HYPER),
        ("grouped_linear", grouped, GROUPED),
    )
    for op, module, candidates in pairs:
        case = next(case for case in CASES if case.kernel == f"triton.{op}" and case.label == "flash")
        for num_tokens in options.tokens:
            make = partial(make_inputs, case, num_tokens, device)
            sets = [make(seed) for seed in range(num_sets(num_bytes(case, num_tokens)))]
            for tiles in candidates:
                found = time_tiles(case, module, tiles, sets)
                print(f"{op:20}{num_tokens:6}  {found!s:12} {tiles}", flush=True)
                if options.out:
                    row = {"op": op, "tokens": num_tokens, "variant": str(tiles), "us": found, **facts}
                    with options.out.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
