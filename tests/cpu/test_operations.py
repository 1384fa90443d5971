"""``torch.ops.ownpath``: every runner's call as an operation that torch may hold, checked as torch checks its own."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ownpath.bench.operands import random_fp8, random_moe, random_nvfp4
from ownpath.bench.shapes import LinearShape, moe_shape
from ownpath.formats import FP8_BLOCK, FP32
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.hyper.ref import HyperWeights, Mix
from ownpath.qtensor import QuantTensor
from ownpath.runners import (
    ConcatLinear,
    Fp8Linear,
    GroupedLinear,
    HyperBoundary,
    IndexQuantizer,
    KeyQuantizer,
    Nvfp4Linear,
    Nvfp4MoE,
    PlainLinear,
    QuantizedLinear,
    RMSNorm,
    Router,
    SharedKeyAttention,
    SwiGLU,
    SwigluMlp,
    WideLinear,
)
from ownpath.runners.linear import LinearRunner
from ownpath.runners.ops import HANDLES, OPERATIONS

DTYPES = (torch.float32, torch.bfloat16)
T, D, S, N, H = 5, 64, 4, 4, 64
"""Tokens, hidden, streams, heads, head dim."""
NAMES = [schema.partition("(")[0] for schema, _, _ in OPERATIONS]


@dataclass(frozen=True)
class Case:
    """One operation. op: what it takes in front of the handle; args: what its runner is called with."""

    name: str
    runner: Any
    op: tuple[Any, ...]
    args: tuple[Any, ...]

    @property
    def op_args(self) -> tuple[Any, ...]:
        return (*self.op, getattr(self.runner, "linear", self.runner).handle)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def linears(dtype: torch.dtype) -> list[Case]:
    x = normal(2, T, D, dtype=dtype)
    operands = random_nvfp4(LinearShape("", 48, D), torch.Generator().manual_seed(1))
    nvfp4 = Nvfp4Linear(operands.weight, operands.weight_scale, operands.weight_scale_2)
    wide = WideLinear(PlainLinear(normal(24, D, dtype=torch.bfloat16)))
    grouped = GroupedLinear(normal(2 * 24, N * H // 2, dtype=dtype), 2)
    o, angles = normal(T, N, H, dtype=dtype), normal(T, H // 4)
    rotation = angles.cos(), angles.sin()
    return [
        Case("linear", nvfp4, (x,), (x,)),
        Case("linear_wide", wide, (x,), (x,)),
        Case("grouped_linear", grouped, (o, *rotation), (o, rotation)),
    ]


def experts(dtype: torch.dtype) -> list[Case]:
    shape = moe_shape("tiny")
    weights = random_moe(shape, torch.Generator().manual_seed(2))
    moe = Nvfp4MoE(*(getattr(weights, field.name) for field in fields(weights)), swiglu_limit=10.0)
    x, ids = normal(T, shape.hidden, dtype=dtype), torch.arange(2 * T).view(T, 2) % shape.num_experts
    routing = normal(T, 2).abs()
    return [Case("experts", moe, (x, ids, routing, None, 0), (x, ids, routing))]


def companions(dtype: torch.dtype) -> list[Case]:
    x, logits, ids = normal(T, D, dtype=dtype), normal(T, 8), torch.arange(T)
    gate = WideLinear(PlainLinear(normal(8, D)))
    router = Router(gate, 2, 2.5, normal(8), None)
    q, keys = normal(T, N, H, dtype=dtype), normal(9, H, dtype=dtype)
    visible = torch.arange(9)[None, :] <= torch.arange(T)[:, None] + 2
    by_columns = normal(D, T, dtype=dtype).T
    attention, kv = SharedKeyAttention(normal(N), H**-0.5), normal(T, 192, dtype=dtype)
    return [
        Case("rms_norm", RMSNorm(normal(D), 1e-6), (x,), (x,)),
        Case("rms_norm", RMSNorm(None, 1e-6), (by_columns,), (by_columns,)),
        Case("router", router, (logits, ids), (x, ids)),
        Case("swiglu", SwiGLU(10.0), (x,), (x,)),
        Case("attention", attention, (q, keys, visible), (q, keys, visible)),
        Case("quantize_kv", KeyQuantizer(64), (kv,), (kv,)),
        Case("quantize_index", IndexQuantizer(), (x,), (x,)),
    ]


def boundaries(dtype: torch.dtype) -> list[Case]:
    """The first one, one in the middle, and the last."""
    x, y = normal(T, S, D, dtype=dtype), normal(T, D, dtype=dtype)
    mix = Mix(normal(T, S).sigmoid(), normal(T, S, S).softmax(-1))
    inner, last = (
        HyperBoundary(
            HyperWeights(normal(num_mix, S * D), normal(num_mix), normal(num_scales), normal(D), 20, 1e-6, 1e-6, 1e-6)
        )
        for num_mix, num_scales in ((24, 3), (S, 1))
    )
    other, spread = normal(T, D, dtype=dtype), (x, y, mix.post_TS, mix.comb_TSS)
    return [
        Case("hyper_boundary", inner, (x, None, None, None, None), (x, None, None)),
        Case("hyper_boundary", inner, (*spread, None), (x, y, mix)),
        Case("hyper_boundary", last, (*spread, other), (x, y, mix, other)),
    ]


MAKERS: tuple[Callable[[torch.dtype], list[Case]], ...] = (linears, experts, companions, boundaries)
CASES = [pytest.param(case, id=f"{case.name} {dtype}") for dtype in DTYPES for make in MAKERS for case in make(dtype)]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    return [tensor for part in value or () for tensor in tensors_of(part)]


def test_every_operation_has_a_case() -> None:
    assert {param.values[0].name for param in CASES} == set(NAMES)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: Case) -> None:
    """Schema, fake implementation, autograd registration and AOT dispatch with dynamic shapes."""
    operation = getattr(torch.ops.ownpath, case.name).default
    with torch.inference_mode(False):
        outcomes = torch.library.opcheck(operation, case.op_args)
    assert set(outcomes.values()) == {"SUCCESS"}


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """In one graph, without a break."""
    torch.compiler.reset()
    return torch.compile(lambda *args, **given: run(*args, **given), backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_call_gives_the_same_bits(case: Case) -> None:
    """The runner's own call."""
    expected, found = tensors_of(case.runner(*case.args)), tensors_of(compiled(case.runner)(*case.args))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runners_around_other_runners_compile(dtype: torch.dtype) -> None:
    x, shards = normal(T, D, dtype=dtype), [QuantTensor(normal(rows, D), None, None, FP32) for rows in (24, 8)]
    plain = [LinearRunner("ref.plain_linear", StoredLinear((shard,))) for shard in shards]
    operands = random_fp8(LinearShape("", 2 * D, D), torch.Generator().manual_seed(1))
    fp8 = StoredLinear((QuantTensor(operands.weight, operands.scale, None, FP8_BLOCK),))
    mlp = SwigluMlp(Fp8Linear(operands.weight, operands.scale), PlainLinear(normal(D, D)), 10.0)
    for runner in (ConcatLinear(plain), QuantizedLinear("ref.fp8_linear", fp8), mlp):
        assert torch.equal(compiled(runner)(x), runner(x))


def test_experts_with_everything_given_compile() -> None:
    """A shared expert, ids of other ranks, and the caller's memory for the result."""
    (case,) = experts(torch.float32)
    x, ids, routing = case.args
    expert_map = torch.tensor([6, -1, 4, 3, -1, 1, 0, 2], dtype=torch.int32)
    expected = case.runner(x, ids, routing, num_shared=1, expert_map=expert_map)
    out = torch.full_like(x, torch.nan)
    found = compiled(case.runner)(x, ids, routing, num_shared=1, expert_map=expert_map, out=out)
    assert torch.equal(found, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_runner_that_is_gone_is_an_error(name: str) -> None:
    case = next(case for make in MAKERS for case in make(torch.float32) if case.name == name)
    handle, arguments = case.op_args[-1], case.op
    del case
    gc.collect()
    with pytest.raises(ValueError, match=f"ownpath has no runner {handle}: it was dropped"):
        getattr(torch.ops.ownpath, name)(*arguments, handle)


def test_handles_are_never_used_again() -> None:
    first = SwiGLU(10.0)
    handle = first.handle
    assert HANDLES.runner(handle) is first
    del first
    gc.collect()
    assert SwiGLU(10.0).handle > handle
