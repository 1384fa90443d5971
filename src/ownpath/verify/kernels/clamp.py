"""K06: checks the shared expert beyond swiglu_limit, its activation and the whole. (Routed experts: ``experts``.)

Legend: R rows, D hidden, F expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ownpath.conformance.bounds import deviation
from ownpath.conformance.exact import ExpertMatrices, ExpertSteps, expert, swiglu
from ownpath.conformance.params import CLAMP_FACTORS, LOUD
from ownpath.finding import Finding
from ownpath.ops import OpKind
from ownpath.verify.kernels.experts import CLAMP_REMEDY
from ownpath.verify.kernels.operands import inputs_of
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally


def check_clamp(probe: Probe) -> Iterator[Finding]:
    """K06: checks the shared expert."""
    for slot in probe.slots_of(OpKind.SWIGLU):
        tally = Tally("K06", slot, "the activation around the clamp, and the shared expert beyond it", CLAMP_REMEDY)
        with tally.catch_errors(slot, probe.kernels[slot]):
            _check_activation(probe, slot, tally)
            _check_expert(probe, slot.removesuffix(".swiglu"), tally)
        yield from tally.findings()


def _check_activation(probe: Probe, slot: str, tally: Tally) -> None:
    """Checks the activation: every gate with every up, repeated as a row has room."""
    limit, width = probe.config.swiglu_limit, probe.config.moe_intermediate_size
    ends = torch.tensor([sign * factor * limit for factor in CLAMP_FACTORS for sign in (1, -1)])
    pairs = torch.cartesian_prod(ends, ends).to(probe.device, probe.dtype)
    num_rows = -(-len(pairs) // width)
    gate, up = (column.repeat(-(-num_rows * width // len(pairs)))[: num_rows * width] for column in pairs.T)
    gate, up = gate.view(num_rows, width), up.view(num_rows, width)
    found: Tensor = probe.slots[slot](torch.cat((gate, up), 1))
    tally.add(slot, probe.kernels[slot], deviation(found, swiglu(gate, up, limit)))


def _check_expert(probe: Probe, shared: str, tally: Tally) -> None:
    """Runs the layer's own shared expert on large rows, to check that it calls the activation."""
    assert probe.layer is not None
    (w13, *others), (w2,) = probe.ops[f"{shared}.w13"], probe.ops[f"{shared}.w2"]
    x = probe.normal(f"{shared} x", len(LOUD), probe.config.hidden_size)
    x_RD = probe.draw.scale_rows(x, LOUD)
    inputs, hidden = (inputs_of(op, probe.stored)[0] for op in (w13, w2))  # as a call with few rows reads them
    both = torch.cat([probe.stored.matrix(m.name, op.encoding) for op in (w13, *others) for m in op.spec.modules])
    w1, w3 = both.chunk(2)
    matrices = ExpertMatrices(w1, w3, probe.stored.matrix(f"{shared}.w2", w2.encoding))
    steps = ExpertSteps(probe.config.swiglu_limit, probe.dtype, inputs.quantize, hidden.quantize, rounds_products=True)
    found = probe.layer.block.ffn.moe.shared_experts(x_RD)
    kernel = f"{probe.kernels[f'{shared}.w13']}, {probe.kernels[f'{shared}.w2']}"
    tally.add(shared, kernel, deviation(found, expert(x_RD, matrices, steps)))
