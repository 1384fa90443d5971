"""The record of launched kernels: from the profiler's trace to slots, on a trace written out here."""

from typing import Any

import pytest
import torch

from ownpath.trace import Ledger
from ownpath.trace.launches import DeviceLaunch, launches_of, slot_times
from ownpath.trace.observers import CallArguments, Observer, Watched


def mark(name: str, start: float, stop: float, thread: int = 1) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": f"slot {name}", "ts": start, "dur": stop - start, "tid": thread}


def kernel(name: str, correlation: int, launched: float, ran: float, thread: int = 1) -> list[dict[str, Any]]:
    """A driver launch on the host, and the kernel that it started on the device some time later."""
    launch = {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": launched, "dur": 1.0, "tid": thread}
    device = {"cat": "kernel", "name": name, "ts": ran, "dur": 2.5, "tid": 7}
    return [launch | {"args": {"correlation": correlation}}, device | {"args": {"correlation": correlation}}]


def test_a_kernel_belongs_to_the_innermost_call_around_its_launch() -> None:
    events = [
        mark("router", 10, 30),
        mark("gate", 12, 20),
        {"cat": "user_annotation", "name": "somebody else's", "ts": 13, "dur": 1, "tid": 1},
        *kernel("outer", 1, launched=25, ran=90),
        *kernel("inner", 2, launched=13, ran=80),
        *kernel("after", 3, launched=31, ran=95),
        *kernel("other thread", 4, launched=15, ran=96, thread=2),
        {"cat": "kernel", "name": "no launch seen", "ts": 97, "dur": 1, "tid": 7, "args": {"correlation": 99}},
    ]
    assert launches_of(events) == [
        DeviceLaunch("gate", "inner", 80.0, 2.5),
        DeviceLaunch("router", "outer", 90.0, 2.5),
        DeviceLaunch(None, "after", 95.0, 2.5),
        DeviceLaunch(None, "other thread", 96.0, 2.5),
        DeviceLaunch(None, "no launch seen", 97.0, 1.0),
    ]


def test_time_in_which_kernels_overlap_counts_once() -> None:
    launches = [
        DeviceLaunch("experts", "down", 4.0, 10.0),
        DeviceLaunch("experts", "gate_up", 0.0, 8.0),
        DeviceLaunch(None, "glue", 12.0, 1.0),
        DeviceLaunch("head", "product", 13.5, 2.0),
    ]
    assert slot_times(launches) == {"experts": 14.0, None: 0.0, "head": 1.5}


@pytest.mark.parametrize(
    "name",
    [
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>(float)",
        "ampere_sgemm_32x32_sliced1x4_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float>(cublasSplitKParams<float>)",
        "void dot_kernel<float, 128, 0>(cublasDotParams)",
    ],
)
def test_library_products_are_recognised(name: str) -> None:
    assert DeviceLaunch(None, name, 0.0, 1.0).is_library_product
    assert DeviceLaunch(None, name, 0.0, 1.0).is_product


@pytest.mark.parametrize(
    "name",
    [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(int)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(int)",
        "kernel_cutlass_kernel_ownpathkernelscutegemm_sm90Gemm_object_at__0",
        "router_kernel",
        "Memcpy DtoD (Device -> Device)",
    ],
)
def test_other_kernels_are_no_library_products(name: str) -> None:
    assert not DeviceLaunch(None, name, 0.0, 1.0).is_library_product


def test_our_own_products_are_products_too() -> None:
    assert DeviceLaunch(None, "kernel_cutlass_kernel_ownpathkernelscutegemm_sm90Gemm_object_at__0", 0.0, 1.0).is_product
    assert DeviceLaunch(None, "rope_grouped_linear_kernel", 0.0, 1.0).is_product


class Marks(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before(self, call: Watched, args: CallArguments) -> None:
        self.seen.append(call.slot)

    def after(self, call: Watched, args: CallArguments, result: Any) -> None:
        self.seen.append(f"/{call.slot} {args} {result}")


def test_an_observer_sees_every_call_from_both_sides() -> None:
    ledger = Ledger({"a": ("Runner", "kernel"), "b": ("Runner", "kernel")})
    inner = ledger.watch("b", lambda x: x + 1)
    outer = ledger.watch("a", lambda x: 2 * inner(x))
    with ledger.observe(Marks()) as marks:
        assert outer(3) == 8
    outer(4)
    assert marks.seen == ["a", "b", "/b (3,) 4", "/a (3,) 8"]
    assert dict(ledger.calls) == {"a": 2, "b": 2}
    assert ledger.summary() == [("Runner", "kernel", 2, 4)]


def test_a_call_is_told_from_both_sides_or_not_at_all() -> None:
    """Whoever detaches during a call, as a server's thread may, is still told its end; who attaches, only the next."""
    ledger = Ledger({"a": ("Runner", "kernel")})
    early, late = Marks(), Marks()

    def change() -> None:
        ledger.observers.detach(early)
        ledger.observers.attach(late)

    call = ledger.watch("a", change)
    ledger.observers.attach(early)
    call()
    assert (early.seen, late.seen) == (["a", "/a () None"], [])
    call()
    assert early.seen == ["a", "/a () None"]


def test_a_tap_returns_its_value_and_shows_it_to_observers_alone() -> None:
    class Values(Observer):
        def __init__(self) -> None:
            self.seen: dict[str, torch.Tensor] = {}

        def tapped(self, name: str, value: torch.Tensor) -> None:
            self.seen[name] = value

    ledger, x = Ledger({}), torch.ones(2)
    tap = ledger.tap("layers.0.attn.q")
    with ledger.observe(Values()) as values:
        assert tap(x) is x
    tap(x + 1)
    assert list(values.seen) == ["layers.0.attn.q"]
    assert values.seen["layers.0.attn.q"] is x
    assert not ledger.calls, "a tap is no call of a slot"
