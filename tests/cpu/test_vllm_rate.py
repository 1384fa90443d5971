"""The parts of tools/vllm_rate.py that need no device: a record's steps, and what of a step is the experts'."""

import sys
from pathlib import Path

import pytest

from ownpath.trace.launches import DeviceLaunch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from vllm_rate import GAP_S, Timed, experts_of, split_steps, summed, table

MARLIN, CLAMP, ALIGN = (
    "void marlin_moe_wna16::Marlin<1>()",
    "silu_and_mul_with_clamp_kernel",
    "moe_align_block_size_kernel",
)
REDUCE = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()"
OURS = (
    "kernel_cutlass_kernel_ownpathkernelsnvfp4moe_sliced_sm90S_object",
    "..nvfp4moe_sliced_sum_sm90SlicedSum_object",
)


def launches(*names: tuple[str, int], start_us: float = 0.0) -> list[DeviceLaunch]:
    """Kernels of 10 us, each 12 us behind the one before."""
    return [DeviceLaunch(None, name, start_us + 12 * at, 10.0, ctas) for at, (name, ctas) in enumerate(names)]


STOCK = (
    ("mhc_fused_tilelang_kernel", 8),
    (ALIGN, 2),
    (MARLIN, 132),
    (CLAMP, 1),  # the shared expert's, on another stream
    (CLAMP, 6),
    (MARLIN, 132),
    (REDUCE, 4),
    (REDUCE, 4),  # the sampler's
)


def test_experts_of_stock_are_named_ones_the_wider_activation_and_the_first_sum() -> None:
    found = list(experts_of(launches(*STOCK)))
    assert [(one.kernel, one.num_ctas) for one in found] == [
        (ALIGN, 2), (MARLIN, 132), (CLAMP, 6), (MARLIN, 132), (REDUCE, 4)
    ]  # fmt: skip


def test_experts_of_ours_are_named_ones_alone() -> None:
    step = launches(("spread_few", 1), (OURS[0], 132), (OURS[1], 4), (CLAMP, 6), (REDUCE, 4))
    assert [one.kernel for one in experts_of(step)] == list(OURS)


def test_steps_are_told_apart_by_the_time_between_them() -> None:
    second = 100 + 1e6 * GAP_S
    steps = split_steps(launches(*STOCK) + launches(*STOCK, start_us=second))
    assert [len(step) for step in steps] == [len(STOCK)] * 2
    assert summed(steps, 250.04) == Timed(250.0, 7 * 12 + 10, 80, 50, 10, 8)


def test_the_table_says_how_many_times_faster() -> None:
    sides = {"stock": Timed(200, 180, 150, 100, 20, 40), "ours": Timed(100, 90, 75, 40, 0, 30)}
    *_, last = table({("decode", 8, 16): sides})
    assert last == "| decode | 8 | 16 | faster | 2.00x | 2.00x | 2.00x | 2.50x |  | |"


@pytest.mark.parametrize("sides", [["ours", "stock"]])
def test_stock_is_never_timed_behind_ours(sides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_rate import main

    monkeypatch.setattr(sys, "argv", ["vllm_rate.py", "nowhere", "--sides", *sides])
    with pytest.raises(SystemExit):
        main()
