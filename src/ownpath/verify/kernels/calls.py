"""Makes a call of every planned slot that a prompt runs too, with arguments of the kind that serving passes."""

from collections.abc import Iterator

import torch

from ownpath.conformance.call import KernelCall
from ownpath.conformance.params import ArgumentSizes, arguments
from ownpath.model.attention import AttentionCore
from ownpath.ops import OpKind
from ownpath.plan.opspec import CompanionSpec, OpSpec
from ownpath.verify.kernels.probe import Probe


def calls(probe: Probe, num_rows: int) -> Iterator[KernelCall]:
    """Yields a call of every planned slot that takes this many rows."""
    for planned in {op.spec.slot: op for op in probe.part.plan.decided}.values():
        spec = planned.spec
        run = probe.slots.get(spec.slot)
        if run is None or spec.kind.is_of_lines:
            continue
        if spec.kind is OpKind.ATTENTION:
            if not isinstance(run, AttentionCore):
                continue
            run = run.layer.softmax
        args = arguments(spec.kind, probe.draw, spec.slot, num_rows, sizes_of(probe, spec, num_rows))
        yield KernelCall(spec.slot, spec.kind, run, args)


def sizes_of(probe: Probe, spec: OpSpec | CompanionSpec, num_rows: int) -> ArgumentSizes:
    """Returns the sizes of a planned slot's arguments."""
    config, kind, layer = probe.config, spec.kind, probe.layer
    if kind is OpKind.GROUPED:
        assert layer is not None
        angles = layer.rope.at(torch.arange(num_rows, device=probe.device)).angles
        return ArgumentSizes(config.head_dim, num_heads=config.num_attention_heads, angles=angles)
    if kind is OpKind.MOE:
        assert layer is not None
        experts = probe.subject.expert_ids(layer.layer_idx)
        return ArgumentSizes(config.hidden_size, expert_ids=experts, num_experts_per_tok=config.num_experts_per_tok)
    if kind is OpKind.ROUTER:
        return ArgumentSizes(config.hidden_size, vocab_size=config.vocab_size)
    if kind is OpKind.HYPER:
        return ArgumentSizes(config.hidden_size, num_streams=config.hc_mult)
    if isinstance(spec, OpSpec):
        return ArgumentSizes(spec.shape[1])
    if kind is OpKind.ATTENTION:
        return ArgumentSizes(spec.dims[1], num_heads=spec.dims[0])
    heads = config.num_attention_heads if spec.slot.endswith(".q_head_norm") else 0
    return ArgumentSizes(spec.dims[0] * (2 if kind is OpKind.SWIGLU else 1), num_heads=heads)
