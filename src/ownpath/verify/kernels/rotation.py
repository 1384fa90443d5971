"""K07: checks the rotation by position and its inverse, for queries, keys and compressed entries.

Legend: P positions, F frequencies, N heads, H head dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ownpath.attention.rope import Rope
from ownpath.conformance.bounds import ANGLE_STEPS, FLOAT32_ROUND, Deviation, deviation, rounding, worse
from ownpath.conformance.exact import grouped_product, rotation
from ownpath.conformance.params import POSITIONS
from ownpath.finding import Finding
from ownpath.oracle.formulas import frequencies
from ownpath.verify.kernels.operands import loss_at_load
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

KERNEL = "torch"
REMEDY = "theta and YaRN belong to the layer's kind: rope_theta where nothing is compressed, else compress_rope_theta"


def check_rotation(probe: Probe) -> Iterator[Finding]:
    """K07: checks a layer's own table, those of its compressors, and the output projection that undoes the rotation."""
    if probe.layer is None:
        return
    tally = Tally("K07", probe.name, "rotation and its inverse at positions up to a million, in float64", REMEDY)
    config = probe.config
    ratio = (*config.backbone_layers(), *config.draft_layers())[probe.layer.layer_idx].ratio
    attn = f"{probe.name}.attn"
    for where, rope, compressing in _tables(probe, attn, compressing=bool(ratio)):
        with tally.catch_errors(where, KERNEL):
            tally.add(where, KERNEL, _compare_table(probe, rope, compressing))
    slot = f"{attn}.wo_a"
    with tally.catch_errors(slot, probe.kernels[slot]):
        tally.add(slot, probe.kernels[slot], _compare_output(probe, slot))
    yield from tally.findings()


def _tables(probe: Probe, attn: str, *, compressing: bool) -> Iterator[tuple[str, Rope, bool]]:
    """Yields (name, table, whether it is that of compressing layers)."""
    assert probe.layer is not None
    yield f"{attn} rotation", probe.layer.rope, compressing
    core: Any = probe.slots[f"{attn}.core"]  # entries are rotated in there
    if core.layer.compressor is not None:
        yield f"{attn}.compressor rotation", core.layer.compressor.rope, True
    if core.layer.index_compressor is not None:
        yield f"{attn}.indexer.compressor rotation", core.layer.index_compressor.rope, True


def positions(probe: Probe) -> Tensor:
    """Returns all positions of the model."""
    return torch.tensor([min(place, probe.config.max_position_embeddings - 1) for place in POSITIONS])


def _compare_table(probe: Probe, rope: Rope, compressing: bool) -> Deviation:
    """Rotates forward and back at every position, and compares each with angles in float64."""
    at_P = positions(probe)
    freqs_F = frequencies(probe.config, int(compressing), torch.float64)
    angles_PF = (at_P[:, None].double() * freqs_F).to(probe.device)
    x = probe.normal("rotation", len(at_P), 3, probe.config.head_dim).to(probe.dtype)
    rotated = rope.at(at_P.to(probe.device))
    forth = deviation(rotated.apply(x), rotation(x, angles_PF))
    return worse(forth, deviation(rotated.invert(x), rotation(x, -angles_PF)))


def _compare_output(probe: Probe, slot: str) -> Deviation:
    """Checks that ``wo_a`` undoes the rotation: rotated outputs must give what unrotated ones would.

    Rotating rounds once to the activations' dtype, which the product spreads like any rounding of its input.
    """
    assert probe.layer is not None
    config = probe.config
    at_P = positions(probe).to(probe.device)
    shape = (len(at_P), config.num_attention_heads, config.head_dim)
    u_PNH = probe.normal("undone", *shape).to(probe.dtype)
    rotated = probe.layer.rope.at(at_P)
    found: Tensor = probe.slots[slot](rotated.apply(u_PNH), rotated.angles)
    (op,) = probe.ops[slot]
    matrix = probe.stored.matrix(op.spec.modules[0].name, op.encoding)
    lost = loss_at_load(op, matrix, probe.dtype)
    # Rounded twice, by a dtype and by cosines and sines; each channel by no more than its pair is long.
    pairs = u_PNH.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    error_PNH = pairs * (2 * rounding(probe.dtype) + ANGLE_STEPS * FLOAT32_ROUND)
    return deviation(found.flatten(1), grouped_product(u_PNH.double(), error_PNH, config.o_groups, matrix, lost))
