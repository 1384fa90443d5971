"""A call of every planned slot, with arguments of the kind that serving gives it.

Legend: T tokens, S streams, D hidden, N heads, H head dim, K keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ownpath.model.attention import AttentionCore
from ownpath.ops import OpKind
from ownpath.plan.opspec import CompanionSpec, OpSpec
from ownpath.runners import Mix
from ownpath.verify.kernels.probe import Probe


@dataclass(frozen=True)
class Call:
    """One slot's callable and arguments; the first tensor of them is the activations."""

    slot: str
    kind: OpKind
    run: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.run(*self.args)

    def with_args(self, *args: Any) -> "Call":
        """The same slot, called otherwise."""
        return replace(self, args=args)

    @cached_property
    def is_product(self) -> bool:
        """Whether a stored matrix is behind it."""
        return self.kind in (OpKind.LINEAR, OpKind.GROUPED, OpKind.MOE)


def calls(probe: Probe, num_rows: int) -> Iterator[Call]:
    """A call of every planned slot that takes this many rows."""
    for planned in {op.spec.slot: op for op in probe.part.plan.decided}.values():
        spec = planned.spec
        run = probe.slots.get(spec.slot)
        if run is None:
            continue
        if spec.kind is OpKind.ATTENTION:
            if not isinstance(run, AttentionCore):
                continue
            run = run.softmax
        yield Call(spec.slot, spec.kind, run, _ARGUMENTS[spec.kind](probe, spec, num_rows))


def tensors_of(result: Any) -> Iterator[Tensor]:
    """Every tensor of what a slot returns."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)
    elif is_dataclass(result):
        for field in fields(result):
            yield from tensors_of(getattr(result, field.name))


def _linear(probe: Probe, spec: OpSpec, num_rows: int) -> tuple[Any, ...]:
    return (probe.rows(spec.slot, num_rows, spec.shape[1]),)


def _grouped(probe: Probe, spec: OpSpec, num_rows: int) -> tuple[Any, ...]:
    config = probe.config
    assert probe.layer is not None
    o_TNH = probe.rows(spec.slot, num_rows, config.num_attention_heads * config.head_dim)
    positions = torch.arange(num_rows, device=probe.device)
    return o_TNH.unflatten(1, (config.num_attention_heads, -1)), probe.layer.rope.at(positions).angles


def _experts(probe: Probe, spec: OpSpec, num_rows: int) -> tuple[Any, ...]:
    assert probe.layer is not None
    chosen = torch.tensor(probe.subject.expert_ids(probe.layer.layer_idx))
    slots = min(probe.config.num_experts_per_tok, len(chosen))
    generator = torch.Generator().manual_seed(num_rows)
    ids = chosen[torch.rand(num_rows, len(chosen), generator=generator).topk(slots).indices]
    weights = torch.rand(num_rows, slots, generator=generator) + 0.1
    x = probe.rows(spec.slot, num_rows, probe.config.hidden_size)
    return x, ids.to(probe.device), weights.to(probe.device)


def _hyper(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    return streams(probe, spec.slot, num_rows)


def streams(probe: Probe, slot: str, num_rows: int) -> tuple[Tensor, Tensor, Mix]:
    """Streams [T, S, D], an output [T, D] and the mix that spreads it."""
    s, dim = probe.config.hc_mult, probe.config.hidden_size
    x_TSD = probe.rows(slot, num_rows, s * dim).unflatten(1, (s, dim))
    post_TS = torch.sigmoid(probe.normal(f"{slot} post", num_rows, s)) * 2
    comb_TSS = torch.softmax(probe.normal(f"{slot} comb", num_rows, s, s), dim=-1)
    return x_TSD, probe.rows(f"{slot} y", num_rows, dim), Mix(post_TS, comb_TSS)


def _norm(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    (width,) = spec.dims
    if not spec.slot.endswith(".q_head_norm"):
        return (probe.rows(spec.slot, num_rows, width),)
    heads = probe.config.num_attention_heads
    return (probe.rows(spec.slot, num_rows, heads * width).unflatten(1, (heads, width)),)


def _router(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    token_ids = torch.arange(num_rows, device=probe.device) % probe.config.vocab_size
    # Of ordinary size: scores of logits below -100 are zero in float32, and so are the weights' sums.
    return probe.normal(spec.slot, num_rows, probe.config.hidden_size).to(probe.dtype), token_ids


def _swiglu(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    return (probe.rows(spec.slot, num_rows, 2 * spec.dims[0]),)


def _attention(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    heads, dim = spec.dims
    # Of ordinary size: the sink takes all the weight from a key whose score is some hundreds below.
    q_tNH = probe.normal(f"{spec.slot} q", num_rows, heads, dim).to(probe.dtype)
    age_tK = torch.arange(num_rows, device=probe.device)[:, None] - torch.arange(num_rows, device=probe.device)
    return q_tNH, probe.normal(f"{spec.slot} keys", num_rows, dim).to(probe.dtype), age_tK >= 0


def _keys(probe: Probe, spec: CompanionSpec, num_rows: int) -> tuple[Any, ...]:
    return (probe.rows(spec.slot, num_rows, spec.dims[0]),)


_ARGUMENTS: dict[OpKind, Callable[..., tuple[Any, ...]]] = {
    OpKind.LINEAR: _linear,
    OpKind.GROUPED: _grouped,
    OpKind.MOE: _experts,
    OpKind.HYPER: _hyper,
    OpKind.NORM: _norm,
    OpKind.ROUTER: _router,
    OpKind.SWIGLU: _swiglu,
    OpKind.ATTENTION: _attention,
    OpKind.KEY_QUANTIZER: _keys,
    OpKind.INDEX_QUANTIZER: _keys,
}
