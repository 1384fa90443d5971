"""K06 of the shared expert: its activation and the whole of it, beyond swiglu_limit. (Routed ones: ``experts``.)

Legend: R rows, D hidden, F expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ownpath.ops import OpKind
from ownpath.verify.finding import Finding
from ownpath.verify.kernels.compare import Exact, deviation
from ownpath.verify.kernels.exact import Inputs, inputs_of
from ownpath.verify.kernels.expert_math import Matrices, Steps, expert, swiglu
from ownpath.verify.kernels.experts import CLAMP_REMEDY, LOUD
from ownpath.verify.kernels.limits import EXP_STEPS, FLOAT32_ROUND
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.report import Tally, error_of

FACTORS = (0.0, 0.5, 0.999, 1.0, 1.001, 2.0, 30.0)
"""Of the limit, with both signs: what gate and up are."""


def check_clamp(probe: Probe) -> Iterator[Finding]:
    """K06 of the shared expert."""
    for slot in probe.slots_of(OpKind.SWIGLU):
        tally = Tally("K06", slot, "the activation around the clamp, and the shared expert beyond it", CLAMP_REMEDY)
        try:
            _activation(probe, slot, tally)
            _whole(probe, slot.removesuffix(".swiglu"), tally)
        except Exception as error:  # whatever a kernel can raise is what is looked for
            tally.fail(slot, probe.kernels[slot], error_of(error))
        yield from tally.findings()


def _activation(probe: Probe, slot: str, tally: Tally) -> None:
    """Every gate with every up, as often as a row has room."""
    limit, width = probe.config.swiglu_limit, probe.config.moe_intermediate_size
    ends = torch.tensor([sign * factor * limit for factor in FACTORS for sign in (1, -1)])
    pairs = torch.cartesian_prod(ends, ends).to(probe.device, probe.dtype)
    num_rows = -(-len(pairs) // width)
    gate, up = (column.repeat(-(-num_rows * width // len(pairs)))[: num_rows * width] for column in pairs.T)
    gate, up = gate.view(num_rows, width), up.view(num_rows, width)
    found: Tensor = probe.slots[slot](torch.cat((gate, up), 1))
    value = swiglu(gate.double(), up.double(), limit)
    tally.add(slot, probe.kernels[slot], deviation(found, Exact(value, EXP_STEPS * FLOAT32_ROUND * value.abs())))


def _whole(probe: Probe, shared: str, tally: Tally) -> None:
    """The layer's own shared expert on loud rows: that the activation is the one that it calls."""
    assert probe.layer is not None
    (w13, *others), (w2,) = probe.ops[f"{shared}.w13"], probe.ops[f"{shared}.w2"]
    x = probe.normal(f"{shared} x", len(LOUD), probe.config.hidden_size)
    x_RD = (x * torch.tensor(LOUD, device=x.device)[:, None]).to(probe.dtype)
    inputs, hidden = (_few(inputs_of(op, probe.stored)) for op in (w13, w2))
    both = torch.cat([probe.stored.matrix(m.name, op.encoding) for op in (w13, *others) for m in op.spec.modules])
    w1, w3 = both.chunk(2)
    matrices = Matrices(w1, w3, probe.stored.matrix(f"{shared}.w2", w2.encoding))
    steps = Steps(probe.config.swiglu_limit, probe.dtype, inputs.quantize, hidden.quantize, rounds_products=True)
    found = probe.layer.block.ffn.shared_experts(x_RD)
    kernel = f"{probe.kernels[f'{shared}.w13']}, {probe.kernels[f'{shared}.w2']}"
    tally.add(shared, kernel, deviation(found, expert(x_RD, matrices, steps)))


def _few(kinds: tuple[Inputs, ...]) -> Inputs:
    """How a call with few rows reads its input."""
    return kinds[0]
