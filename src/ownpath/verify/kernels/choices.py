"""At which numbers of rows a planned kernel changes what it launches, so that each of its variants is called.

The numbers come from asking the kernels' own choosers for every count: only which counts to try, nothing that is right
or wrong, is taken from them.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

from ownpath.plan.catalogue import FP8_PREFILL_FROM

ROW_COUNTS = (1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 129)
MANY_ROWS = (1024, 5120, 6144, 8064, 16384)
"""On CUDA only."""
SCANNED = (*range(1, 2049), *range(2112, 16385, 64))

Choose = Callable[[int], Hashable]


def row_counts(is_cuda: bool) -> tuple[int, ...]:
    """Numbers of rows that every product is called with."""
    return (*ROW_COUNTS, *MANY_ROWS) if is_cuda else ROW_COUNTS


def changes(choose: Choose) -> dict[Hashable, tuple[int, ...]]:
    """Variant -> the fewest and the most rows that it serves, of those up to ``SCANNED[-1]``."""
    found: dict[Hashable, tuple[int, ...]] = {}
    for count in SCANNED:
        variant = choose(count)
        found[variant] = (found.get(variant, (count,))[0], count)
    return {variant: tuple(dict.fromkeys(ends)) for variant, ends in found.items()}


def choosers(name: str, runner: Any, shape: tuple[int, int], slots: int) -> Iterator[tuple[str, Choose]]:
    """(module, rows -> variant) of each part of a slot whose kernel chooses. ``slots``: experts per token."""
    for part in runners_behind(runner):
        choose = _chooser(name, part, shape, slots)
        if choose is not None:
            yield name, choose


def runners_behind(runner: Any) -> Iterator[Any]:
    """The runners behind those that only wrap others."""
    inner = getattr(runner, "linears", None)
    if inner is not None:
        for linear in inner:
            yield from runners_behind(linear)
    elif hasattr(runner, "linear"):
        yield from runners_behind(runner.linear)
    else:
        yield runner


def _chooser(name: str, runner: Any, shape: tuple[int, int], slots: int) -> Choose | None:
    kernel = getattr(runner, "_kernel", None)
    if name.startswith("triton.grouped_linear") and not name.endswith("_invariant"):
        return partial(_grouped, shape)
    if name.startswith("cute.fp8_linear"):
        return partial(_fp8, kernel, runner.operand)
    if name.startswith("cute.nvfp4_linear"):
        (operand,) = runner._operand
        return partial(_nvfp4, kernel, operand.shape)
    if name.startswith("cute.nvfp4_moe"):
        (operand,) = runner._operand
        return partial(_experts, kernel, operand, slots)
    return None


def _grouped(shape: tuple[int, int], num_rows: int) -> Hashable:
    from ownpath.kernels.triton.grouped import choose_tiles

    rows_per_group, head_dim = shape
    return choose_tiles(num_rows, rows_per_group, head_dim)


def _nvfp4(kernel: Any, shape: tuple[int, int], num_rows: int) -> Hashable:
    chosen: str = kernel._choose(num_rows, *shape, kernel.is_batch_invariant).gemm.name
    return chosen


def _experts(kernel: Any, operand: Any, slots: int, num_rows: int) -> Hashable:
    from ownpath.kernels.cute.moe import align_config

    pairs = num_rows * slots
    choice = kernel.choose(pairs, operand)
    return choice.gate_up.name, choice.down.name, align_config(True, False, 0, pairs).name


def _fp8(kernel: Any, operand: Any, num_rows: int) -> Hashable:
    from ownpath.kernels.cute.fp8_choose import w8a8_config, w8a16_config
    from ownpath.kernels.cute.fp8_launch import weight_key
    from ownpath.kernels.cute.launch import num_sms

    key, sms = weight_key(operand), num_sms(operand.blocks.device.index)
    if kernel.prefill_from is not None and num_rows >= FP8_PREFILL_FROM:
        return w8a8_config(num_rows, key, sms).name
    return w8a16_config(num_rows, key, sms, kernel.is_batch_invariant).name
