"""Registers every runner's call as a torch operation, ``torch.ops.ownpath.*``, with a fake implementation.

``torch.compile``, CUDA graphs and other engines can then hold a call without tracing into it. An operation takes the
tensors of one call and the ``handle`` of its runner, an integer; the runner holds the weights and must outlive every
graph that refers to it. Inside ``torch.compile`` runners call their operation by themselves.

Source: PyTorch's ``torch.library``.
"""

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ownpath.runners.companions import (
        HyperBoundary,
        IndexQuantizer,
        KeyQuantizer,
        RMSNorm,
        Router,
        SharedKeyAttention,
        SwiGLU,
    )
    from ownpath.runners.grouped import GroupedRunner
    from ownpath.runners.linear import LinearRunner
    from ownpath.runners.moe import MoeRunner

Returned = TypeVar("Returned")


class Handles:
    """Maps handles to live runners. A call with the handle of a runner that is gone is an error."""

    def __init__(self) -> None:
        self._runners: WeakValueDictionary[int, object] = WeakValueDictionary()
        self._next = count()

    def new(self, runner: object) -> int:
        """Registers a runner and returns its handle."""
        handle = next(self._next)
        self._runners[handle] = runner
        return handle

    def runner(self, handle: int) -> object:
        """Returns the runner of a handle. Errors: ValueError for one that is gone."""
        found = self._runners.get(handle)
        if found is None:
            raise ValueError(f"ownpath has no runner {handle}: it was dropped while something still refers to it")
        return found


HANDLES = Handles()
LIBRARY = torch.library.Library("ownpath", "DEF")


def linear(x: Tensor, runner: "LinearRunner") -> Tensor:
    """Computes y [..., N]."""
    return runner.run(x)


def linear_wide(x: Tensor, runner: "LinearRunner") -> Tensor:
    """Computes y [..., N] in at least float32."""
    return runner.run_wide(x)


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, num_shared: int, runner: "MoeRunner"
) -> Tensor:
    """Computes y [T, D]."""
    return runner.run(x, topk_ids, topk_weights, num_shared=num_shared, expert_map=expert_map)


def grouped_linear(o: Tensor, cos: Tensor, sin: Tensor, runner: "GroupedRunner") -> Tensor:
    """Computes y [T, G, R]."""
    return runner.run(o, cos, sin)


def rms_norm(x: Tensor, runner: "RMSNorm") -> Tensor:
    """Computes y, like x."""
    return runner.run(x)


def router(logits: Tensor, token_ids: Tensor, runner: "Router") -> tuple[Tensor, Tensor]:
    """Returns expert ids and weights [T, K]."""
    return runner.run(logits, token_ids)


def swiglu(gate_up: Tensor, runner: "SwiGLU") -> Tensor:
    """Computes y [..., F]."""
    return runner.run(gate_up)


def hyper_boundary(
    x: Tensor, y: Tensor | None, post: Tensor | None, comb: Tensor | None, runner: "HyperBoundary"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes new streams, normed input, and the mix's post and comb; these are empty after the last sublayer."""
    return runner.run_flat(x, y, post, comb)


def attention(q: Tensor, keys: Tensor, visible: Tensor, runner: "SharedKeyAttention") -> Tensor:
    """Computes [t, N, H]."""
    return runner.run(q, keys, visible)


def quantize_kv(kv: Tensor, runner: "KeyQuantizer") -> Tensor:
    """Rounds keys to the cache's format and reads them back."""
    return runner.run(kv)


def quantize_index(x: Tensor, runner: "IndexQuantizer") -> Tensor:
    """Rounds index queries or keys to the index cache's format and reads them back."""
    return runner.run(x)


def _fake_linear(x: Tensor, runner: "LinearRunner") -> Tensor:
    return x.new_empty((*x.shape[:-1], runner.out_features))


def _fake_linear_wide(x: Tensor, runner: "LinearRunner") -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:-1], runner.out_features), dtype=dtype)


def _fake_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, num_shared: int, runner: "MoeRunner"
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_grouped(o: Tensor, cos: Tensor, sin: Tensor, runner: "GroupedRunner") -> Tensor:
    return runner.new_out(o)


def _fake_like(x: Tensor, runner: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_router(logits: Tensor, token_ids: Tensor, runner: "Router") -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], runner.num_experts_per_tok)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


def _fake_swiglu(gate_up: Tensor, runner: "SwiGLU") -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_boundary(
    x: Tensor, y: Tensor | None, post: Tensor | None, comb: Tensor | None, runner: "HyperBoundary"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, s, dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    mix = s if runner.makes_mix else 0
    streams, h = x.new_empty(x.shape), x.new_empty((num_tokens, dim))
    return streams, h, x.new_empty((num_tokens, mix), dtype=wide), x.new_empty((num_tokens, mix, mix), dtype=wide)


def _fake_attention(q: Tensor, keys: Tensor, visible: Tensor, runner: "SharedKeyAttention") -> Tensor:
    return q.new_empty(q.shape)


OPERATIONS = (
    ("linear(Tensor x, int runner) -> Tensor", linear, _fake_linear),
    ("linear_wide(Tensor x, int runner) -> Tensor", linear_wide, _fake_linear_wide),
    (
        "experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, int num_shared, int runner)"
        " -> Tensor",
        experts,
        _fake_experts,
    ),
    ("grouped_linear(Tensor o, Tensor cos, Tensor sin, int runner) -> Tensor", grouped_linear, _fake_grouped),
    ("rms_norm(Tensor x, int runner) -> Tensor", rms_norm, _fake_like),
    ("router(Tensor logits, Tensor token_ids, int runner) -> (Tensor, Tensor)", router, _fake_router),
    ("swiglu(Tensor gate_up, int runner) -> Tensor", swiglu, _fake_swiglu),
    (
        "hyper_boundary(Tensor x, Tensor? y, Tensor? post, Tensor? comb, int runner)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        hyper_boundary,
        _fake_boundary,
    ),
    ("attention(Tensor q, Tensor keys, Tensor visible, int runner) -> Tensor", attention, _fake_attention),
    ("quantize_kv(Tensor kv, int runner) -> Tensor", quantize_kv, _fake_like),
    ("quantize_index(Tensor x, int runner) -> Tensor", quantize_index, _fake_like),
)
"""(schema, implementation, fake implementation). Both take the runner itself as their last argument."""


def _by_handle(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """Wraps a function so that it takes a handle in place of the runner."""
    find = HANDLES.runner

    def call(*args: object) -> Returned:
        return function(*args[:-1], find(args[-1]))  # type: ignore[arg-type]

    return call


def _dense(
    function: Callable[..., Tensor | tuple[Tensor, ...] | None],
) -> Callable[..., Tensor | tuple[Tensor, ...] | None]:
    """Wraps a function so that its results are contiguous as the fake ones are: a torch reference may return a view."""

    def call(*args: object) -> Tensor | tuple[Tensor, ...] | None:
        found = function(*args)
        if found is None or isinstance(found, Tensor):
            return None if found is None else found.contiguous()
        return tuple(part.contiguous() for part in found)

    return call


def register(
    schema: str, function: Callable[..., Tensor | tuple[Tensor, ...] | None], fake: Callable[..., object]
) -> None:
    """Defines an operation. function, fake: take the runner itself as their last argument, the schema its handle."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _dense(_by_handle(function)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ownpath::{name}", _by_handle(fake), lib=LIBRARY)


for _schema, _function, _fake in OPERATIONS:
    register(_schema, _function, _fake)
