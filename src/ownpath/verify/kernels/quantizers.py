"""K03: checks every quantiser of activations at every value of its format, every midpoint, and their neighbours.

Legend: R rows, K channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.conformance.bounds import rounding, sum_rounding
from ownpath.finding import Finding
from ownpath.kernels.spec import InputRounding
from ownpath.ops import OpKind
from ownpath.oracle.formats import (
    E2M1,
    E4M3,
    decode,
    e4m3_of,
    fp4_with_scale_of,
    fp8,
    hadamard_matrix,
    nvfp4_without_global,
)
from ownpath.verify.kernels.operands import largest_input_scale
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

REMEDY = "the quantiser does not round to nearest, ties to even, or takes its scale otherwise: docs/numerics.md"
KEY_BLOCK, INDEX_BLOCK, INPUT_BLOCK, NVFP4_BLOCK = 64, 32, 128, 16
EXPONENTS = (0, -3, 5)
"""Exponents of the scales, in turn."""


@dataclass(frozen=True)
class QuantizerCase:
    """A quantiser with its expected results. run: x [R, K] -> the values read back. low, high: their allowed range."""

    slot: str
    width: int
    block: int
    most: tuple[float, ...]
    run: Callable[[Tensor], Tensor]
    low_high: Callable[[Tensor], tuple[Tensor, Tensor]]


def check_quantizers(probe: Probe) -> Iterator[Finding]:
    """K03: checks every slot that quantises activations."""
    what = "quantisers at every value, middle and edge of their formats"
    tally = Tally("K03", probe.name, what, REMEDY, "no planned kernel here quantises activations by itself")
    for quantiser in quantizer_cases(probe):
        kernel = probe.kernels[quantiser.slot]
        with tally.catch_errors(quantiser.slot, kernel):
            tally.judge(quantiser.slot, kernel, _problem(probe, quantiser))
    yield from tally.findings()


def _problem(probe: Probe, quantiser: QuantizerCase) -> str:
    x = edges(quantiser.most, quantiser.block, quantiser.width, probe.dtype).to(probe.device)
    found = quantiser.run(x).double()
    low, high = quantiser.low_high(x)
    wrong = ~((found >= low) & (found <= high))
    if not bool(wrong.any()):
        return ""
    place = tuple(int(idx) for idx in wrong.nonzero()[0])
    value = f"{float(x[place]):.8g} becomes {float(found[place]):.8g}, not {float(low[place]):.8g}"
    return f"{int(wrong.sum())} of {wrong.numel()} values: {value}"


def edges(magnitudes: tuple[float, ...], block: int, width: int, dtype: torch.dtype) -> Tensor:
    """Makes rows of blocks whose first value sets a power-of-two scale and whose others are the format's edges times
    it.

    Also blocks whose largest value lies just beyond what the scale holds, tiny ones, and one of zeros.
    """
    block = min(block, width)
    values = torch.tensor(magnitudes)
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat((values, middle)).to(dtype)
    up, down = (torch.nextafter(near, torch.full_like(near, to)) for to in (torch.inf, 0.0))
    listed = torch.cat((near, up, down)).clamp(max=magnitudes[-1])
    listed = torch.cat((listed, -listed))
    per_block = block - 1
    listed = F.pad(listed, (0, -len(listed) % per_block)).view(-1, per_block)
    anchor = torch.full((len(listed), 1), magnitudes[-1], dtype=dtype)
    blocks = torch.cat((anchor, listed), 1)
    scales = torch.tensor(list(islice(cycle(EXPONENTS), len(blocks))))
    blocks = torch.ldexp(blocks.double(), scales[:, None]).to(dtype)
    beyond = torch.nextafter(blocks[:1], torch.full_like(blocks[:1], torch.inf))
    blocks = torch.cat((blocks, beyond, blocks[:1] * 2.0**-24, torch.zeros_like(beyond)))
    return _rows(blocks, width)


def _rows(blocks: Tensor, width: int) -> Tensor:
    """Puts blocks side by side [R, width], with zeros where no whole one fits."""
    across = width // blocks.shape[1]
    padded = F.pad(blocks, (0, 0, 0, -len(blocks) % across)).view(-1, across * blocks.shape[1])
    rows: Tensor = F.pad(padded, (0, width - padded.shape[1]))
    return rows


def quantizer_cases(probe: Probe) -> Iterator[QuantizerCase]:
    """Yields the quantisers of the planned slots."""
    for slot in probe.slots_of(OpKind.LINEAR):
        yield from _inputs(probe, slot)
    config = probe.config
    for slot in probe.slots_of(OpKind.KEY_QUANTIZER):
        rotary = config.qk_rope_head_dim
        yield QuantizerCase(
            slot, config.head_dim - rotary, KEY_BLOCK, E4M3, _keys(probe, slot), _expect_exact(fp8, KEY_BLOCK)
        )
    for slot in probe.slots_of(OpKind.INDEX_QUANTIZER):
        yield QuantizerCase(slot, config.index_head_dim, INDEX_BLOCK, E2M1, probe.slots[slot], _expect_index)


def _keys(probe: Probe, slot: str) -> Callable[[Tensor], Tensor]:
    """Wraps the slot: rotary channels stand behind the others, and must come back unchanged."""

    def run(x: Tensor) -> Tensor:
        rotary = probe.normal(slot, len(x), probe.config.qk_rope_head_dim).to(x.dtype)
        y: Tensor = probe.slots[slot](torch.cat((x, rotary), 1))
        if not torch.equal(y[:, x.shape[1] :], rotary):
            raise ValueError("the rotary channels are changed")
        return y[:, : x.shape[1]]

    return run


def _inputs(probe: Probe, slot: str) -> Iterator[QuantizerCase]:
    """Yields a linear's quantisers: the one in front of it, or the one that it launches itself for many rows."""
    op = probe.ops[slot][0]
    width = op.spec.shape[1]
    leaf: Any
    for leaf in probe.part.runners[slot].leaves:
        rounding, in_front = leaf.spec.rounding, bool(leaf.spec.official)
        if in_front and rounding is InputRounding.NVFP4:
            scale = largest_input_scale(op, [module.name for module in op.spec.modules], probe.stored)
            yield QuantizerCase(
                slot, width, NVFP4_BLOCK, E2M1, leaf.quantize_input, _expect_exact(nvfp4_without_global, scale)
            )
        elif in_front:
            yield QuantizerCase(slot, width, INPUT_BLOCK, E4M3, leaf.quantize_input, _expect_exact(fp8, INPUT_BLOCK))
        elif rounding is InputRounding.E4M3:
            powers = leaf.operand.weight.power_of_two
            run = _make_launch(leaf.operand.weight)
            yield QuantizerCase(slot, width, INPUT_BLOCK, E4M3, run, _expect_exact(fp8, INPUT_BLOCK, powers))


def _make_launch(weight: Any) -> Callable[[Tensor], Tensor]:
    """Runs the Hopper quantiser that precedes a product, and reads its output back."""
    from ownpath.kernels.fp8.config import QuantizeConfig
    from ownpath.kernels.fp8.launch import quantize_launch, workspace_bytes
    from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, BLOCK_BYTES, unpack_blocks

    def run(x: Tensor) -> Tensor:
        num_blocks = weight.num_k_blocks
        num_bytes = workspace_bytes(len(x), num_blocks)
        workspace = torch.full((num_bytes,), 255, dtype=torch.uint8, device=x.device)
        quantize_launch(QuantizeConfig(weight.power_of_two), x, workspace, num_blocks)
        blocks = workspace.view(-1, num_blocks, ACT_BLOCK_BYTES)
        stored = blocks[..., :BLOCK_BYTES].contiguous()
        codes = unpack_blocks(stored, torch.arange(64), len(x), num_blocks * INPUT_BLOCK).view(torch.uint8)
        scale = blocks[..., BLOCK_BYTES:].contiguous().view(torch.float32).transpose(1, 2).flatten(0, 1)[: len(x)]
        value = decode(codes, e4m3_of).unflatten(1, (num_blocks, INPUT_BLOCK))
        read: Tensor = (value * scale.double()[..., None]).flatten(1)[:, : x.shape[1]]
        return read

    return run


Expected = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps an input to the lower and the upper bound of the values read back."""


def _expect_exact(quantize: Callable[..., Tensor], *how: object) -> Expected:
    def expected(x: Tensor) -> tuple[Tensor, Tensor]:
        value = quantize(x, *how)
        return value, value

    return expected


def _expect_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds Hadamard's rotation, rounded, then E2M1: the least and the most that float32 sums may give."""
    matrix = hadamard_matrix(x.shape[1]).to(x.device)
    turned = x.double() @ matrix
    slack = sum_rounding(x.shape[1]) * (x.double().abs() @ matrix.abs()) + rounding(x.dtype) * turned.abs()
    found = [fp4_with_scale_of(turned + sign * slack, turned, INDEX_BLOCK) for sign in (-1.0, 0.0, 1.0)]
    return torch.stack(found).amin(0), torch.stack(found).amax(0)
