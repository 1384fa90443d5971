"""Finds the numbers of rows where a planned kernel changes its launches, so that each of its variants is called.

The runners tell which variant a call would launch. This decides only which row counts to try, never what is right.
"""

from collections.abc import Callable, Iterator

import torch

from ownpath.runners import Runner
from ownpath.trace.uses import variant_of

ROW_COUNTS = (1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 129)
MANY_ROWS = (1024, 5120, 6144, 8064, 16384)
"""Further numbers of rows, on CUDA only."""
WIDEST = 2**16
"""Columns up to which a product is called with many rows: logits of a whole vocabulary are gigabytes."""
FEW, MOST = 128, 16384


def row_counts(is_cuda: bool, num_columns: int) -> tuple[int, ...]:
    """Returns the numbers of rows that a product of so many columns is called with."""
    return (*ROW_COUNTS, *MANY_ROWS) if is_cuda and num_columns <= WIDEST else ROW_COUNTS


def scan_row_counts() -> Iterator[int]:
    """Yields every number up to 128; then both sides of every multiple of 8, and of 64 from 2048 on: tiles change
    there."""
    yield from range(1, FEW + 1)
    for count in (*range(FEW, 2048, 8), *range(2048, MOST, 64)):
        yield from (count, count + 1)
    yield MOST


def row_ranges(variant: Callable[[int], str]) -> dict[str, tuple[int, ...]]:
    """Returns, per variant, the fewest and the most rows that it serves."""
    found: dict[str, tuple[int, ...]] = {}
    for count in scan_row_counts():
        name = variant(count)
        found[name] = (found.get(name, (count,))[0], count)
    return {name: tuple(dict.fromkeys(ends)) for name, ends in found.items()}


def variants_of(runner: Runner, arguments: Callable[[int], tuple[object, ...]]) -> Iterator[tuple[str, int]]:
    """Yields (variant, rows) at both ends of the range each variant of a slot serves; nothing for single-form kernels.

    arguments: of a call with so many rows; no value is read.
    """
    if any(leaf.variant(*arguments(1)) is not None for leaf in runner.leaves):
        for variant, counts in row_ranges(lambda count: variant_of(runner, arguments(count))).items():
            yield from ((variant, count) for count in counts)


def placeholder(dtype: torch.dtype, device: torch.device, num_rows: int, *shape: int) -> torch.Tensor:
    """Makes a tensor of so many rows that takes the memory of one."""
    return torch.empty(1, *shape, dtype=dtype, device=device).expand(num_rows, *shape)
