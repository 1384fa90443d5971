"""Hyper-connections by vLLM's names and arguments: our boundary's bits, eager and compiled, and a guarded patch."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ownpath.integrations.vllm.hyper import (
    CHOICE,
    HOPPER,
    HOPPER_INVARIANT,
    HYPERS,
    REFERENCE,
    Hyper,
    choose_kernel,
)
from ownpath.integrations.vllm.seam import CPU, NVIDIA, install_hyper
from ownpath.integrations.vllm.versions import VllmRefusal
from ownpath.kernels.hyper.ref import HyperWeights, Mix, hyper_boundary, hyper_post, hyper_pre

EPS, ITERS = 1e-6, 20


@dataclass(frozen=True)
class Case:
    """Streams x, a sublayer's output y, its mix, and the next boundary's weights."""

    x: Tensor
    y: Tensor
    mix: Mix
    weights: HyperWeights

    @property
    def given(self) -> tuple[Any, ...]:
        """As vLLM passes them, behind the streams."""
        weights = self.weights
        return weights.fn, weights.scale, weights.base, EPS, EPS, EPS, 2.0, ITERS

    @property
    def norm(self) -> dict[str, Any]:
        return {"norm_weight": self.weights.norm_weight, "norm_eps": EPS}


def make_case(num_tokens: int, dim: int = 64) -> Case:
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = HyperWeights(
        normal(24, 4 * dim) / 16, normal(24), 1 + normal(3) / 4, (1 + normal(dim) / 8).bfloat16(), ITERS, EPS, EPS, EPS
    )
    mix = Mix(2 * torch.sigmoid(normal(num_tokens, 4)), torch.softmax(normal(num_tokens, 4, 4), -1))
    return Case(normal(num_tokens, 4, dim).bfloat16(), normal(num_tokens, dim).bfloat16(), mix, weights)


@pytest.fixture
def ours() -> Hyper:
    return HYPERS.new(REFERENCE)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 130])
def test_each_name_is_our_boundary(num_tokens: int, ours: Hyper) -> None:
    case = make_case(num_tokens)
    x, y, mix, weights = case.x, case.y, case.mix, case.weights
    first, middle = hyper_boundary(x, None, None, weights), hyper_boundary(x, y, mix, weights)
    assert first.mix is not None
    assert middle.mix is not None
    post, comb, h = ours.pre(x, *case.given, **case.norm)
    assert torch.equal(h, first.h_TD)
    assert torch.equal(post, first.mix.post_TS.unsqueeze(-1))
    assert torch.equal(comb, first.mix.comb_TSS)
    found = ours.fused(y, x, mix.post_TS.unsqueeze(-1), mix.comb_TSS, *case.given, n_splits=1, tile_n=1, **case.norm)
    wanted = middle.x_TSD, middle.mix.post_TS.unsqueeze(-1), middle.mix.comb_TSS, middle.h_TD
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert torch.equal(ours.post(y, x, mix.post_TS.unsqueeze(-1), mix.comb_TSS), hyper_post(x, y, mix))
    last = HyperWeights(weights.fn[:4], weights.base[:4], weights.scale[:1], weights.norm_weight, 0, EPS, EPS, EPS)
    assert torch.equal(ours.head(x, last.fn, last.scale, last.base, EPS, EPS), hyper_pre(x, last)[0])


def test_an_embedding_is_every_stream(ours: Hyper) -> None:
    case = make_case(3)
    fn_broadcast = case.weights.fn.unflatten(1, (4, -1)).sum(1)
    streams, *found = ours.pre_broadcast(case.y, *case.given, **case.norm, fn_broadcast=fn_broadcast)
    assert torch.equal(streams, case.y.unsqueeze(1).repeat(1, 4, 1))
    assert all(torch.equal(*pair) for pair in zip(found, ours.pre(streams, *case.given, **case.norm), strict=True))


def test_without_a_norm_the_layer_input_is_not_normed(ours: Hyper) -> None:
    """As vLLM's model for CPUs calls it, which has a module for the norm."""
    case = make_case(5)
    post, comb, h = ours.pre(residual=case.x, **dict(zip(
        ("fn", "hc_scale", "hc_base", "rms_eps", "hc_pre_eps", "hc_sinkhorn_eps", "hc_post_mult_value",
         "sinkhorn_repeat"), case.given, strict=True)))  # fmt: skip
    wanted, mix = hyper_pre(case.x, case.weights)
    assert mix is not None
    assert torch.equal(h, wanted)
    assert torch.equal(post[..., 0], mix.post_TS)
    assert torch.equal(comb, mix.comb_TSS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_compiler_sees_is_one_operation_a_call(
    device: str, ours: Hyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the eager bits, new memory for every result, and the right shapes for a compiler."""
    case = make_case(5)
    head = case.weights.fn[:4], case.weights.scale[:1], case.weights.base[:4], EPS, EPS
    inputs = case.y, case.x, case.mix.post_TS.unsqueeze(-1), case.mix.comb_TSS

    def compute(device: str) -> list[Tensor]:
        def at(parts: tuple[Any, ...]) -> list[Any]:
            return [part.to(device) if isinstance(part, Tensor) else part for part in parts]

        norm = {"norm_weight": case.weights.norm_weight.to(device), "norm_eps": EPS}
        found = ours.fused(*at(inputs), *at(case.given), **norm)
        bare = ours.pre(*at((case.x, *case.given)))
        broadcast = ours.pre_broadcast(*at((case.y, *case.given)), **norm)
        return [*found, *bare, *broadcast, ours.post(*at(inputs)), ours.head(*at((case.x, *head)))]

    eager = compute("cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = compute(device)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in eager]
    if device == "cpu":
        assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))
        weights = case.weights
        tensors, settings = (
            [weights.fn, weights.base, weights.scale, weights.norm_weight],
            [float(ITERS), EPS, EPS, EPS],
        )
        streams, *_ = torch.ops.ownpath_vllm_hyper.boundary(case.x, None, None, None, tensors, settings, REFERENCE)
        assert streams.data_ptr() != case.x.data_ptr()


def test_an_operation_of_a_model_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"hyper-connections with triton\.none"):
        HYPERS.find("triton.none")


@pytest.mark.parametrize(("idx", "value", "said"), [(4, 1e-5, "hc_pre_eps 1e-05"), (6, 1.0, "hc_post_mult_value must")])
def test_settings_that_v4_does_not_have_are_refused(idx: int, value: float, said: str, ours: Hyper) -> None:
    case = make_case(1)
    given = list(case.given)
    given[idx] = value
    with pytest.raises(ValueError, match=said):
        ours.pre(case.x, *given, **case.norm)
    with pytest.raises(TypeError, match="window"):
        ours.pre(case.x, *case.given, window=3)


def test_the_kernel_is_chosen_by_device_and_variable() -> None:
    assert choose_kernel({}, 90) == choose_kernel({CHOICE: "ours"}, 90) == HOPPER
    assert choose_kernel({}, 90, is_batch_invariant=True) == HOPPER_INVARIANT
    assert choose_kernel({CHOICE: "torch"}, 90) == choose_kernel({}, None) == choose_kernel({}, 100) == REFERENCE
    with pytest.raises(VllmRefusal, match="OWNPATH_VLLM_HYPER is 'triton'"):
        choose_kernel({CHOICE: "triton"}, 90)


def stock(name: str, names: tuple[str, ...]) -> ModuleType:
    """A model's file that has vLLM's functions or classes under these names."""
    module = ModuleType(name)
    for key in names:
        part = type(key, (), {"__module__": "vllm.model_executor.layers.mhc"})
        setattr(module, key, part)
    return module


FUNCTIONS = ("mhc_pre_tilelang", "mhc_pre_broadcast_tilelang", "mhc_fused_post_pre_tilelang", "mhc_post_tilelang",
             "hc_head_fused_kernel_tilelang")  # fmt: skip
CLASSES = ("MHCPreOp", "MHCPostOp", "MHCFusedPostPreOp", "HCHeadOp")


@pytest.mark.parametrize(("name", "names"), [(NVIDIA, FUNCTIONS), (CPU, CLASSES)])
def test_the_patch_is_told_and_may_be_made_again(name: str, names: tuple[str, ...]) -> None:
    module, case = stock(name, names), make_case(2)
    for _ in range(2):
        assert install_hyper(module, REFERENCE).startswith(
            f"hyper-connections: {REFERENCE} in place of vLLM's ({names[0]}"
        )
    part = vars(module)[names[0]]
    call = part if name == NVIDIA else part()
    assert torch.equal(call(case.x, *case.given, **case.norm)[2], hyper_boundary(case.x, None, None, case.weights).h_TD)
    assert HOPPER in install_hyper(module, HOPPER)


def test_what_somebody_else_replaced_stays_and_is_named() -> None:
    module = stock(NVIDIA, FUNCTIONS)
    module.mhc_post_tilelang = len
    before = dict(vars(module))
    with pytest.raises(VllmRefusal, match=r"nvidia\.model\.mhc_post_tilelang are not vLLM's own"):
        install_hyper(module, REFERENCE)
    assert vars(module) == before
    del module.mhc_post_tilelang
    with pytest.raises(VllmRefusal, match="mhc_post_tilelang"):
        install_hyper(module, REFERENCE)
    with pytest.raises(VllmRefusal, match=r"no seam for hyper-connections in vllm\.models\.deepseek_v4\.amd\.model"):
        install_hyper(ModuleType("vllm.models.deepseek_v4.amd.model"), REFERENCE)
