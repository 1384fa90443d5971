"""Pairs what a runner's kernel holds with what the file holds, module by module; the two must be equal.

The runner reads the kernel's side back out of its layout (``stored``, ``stored_expert``); the file's side comes from
``FileTensors``, decoded by the oracle's tables. Scales are compared as values where the kernel holds them in another
dtype, codes and all other scales bit by bit. Two differences from the file do not change any value and are allowed:
codes under a zero scale (a kernel that cannot store zero holds zeros under 2^-9), and the scale of a block of zeros in
MXFP4 that became NVFP4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ownpath.checkpoint.schema import Encoding, ModuleSpec
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, NVFP4
from ownpath.kernels.spec import InputRounding
from ownpath.ops import OpKind
from ownpath.oracle.formats import decode, e2m1_pair_of, e4m3_of, e8m0_of
from ownpath.oracle.weights import spread_blocks
from ownpath.plan.ops import PlannedOp
from ownpath.qtensor import QuantTensor
from ownpath.runners import Runner
from ownpath.verify.file_tensors import FileTensors

PACKED = "packed_64x128"


@dataclass(frozen=True)
class TensorPair:
    """Two tensors of one shape that must be equal. role: their role in a word. key: the tensor in the file."""

    module: str
    role: str
    key: str
    file: Tensor
    kernel: Tensor


@dataclass(frozen=True)
class KernelModule:
    """One stored matrix as the kernel holds it."""

    module: ModuleSpec
    weight: QuantTensor


def ops_with_runners(op_list: tuple[PlannedOp, ...], runner: Runner) -> Iterator[tuple[PlannedOp, Any]]:
    """Yields each op of a slot with the runner that holds its operand."""
    return zip(op_list, runner.leaves, strict=True)


def read_modules(op: PlannedOp, runner: Any, expert_ids: tuple[int, ...]) -> Iterator[KernelModule]:
    """Reads each module of ``op`` back from ``runner``; of routed experts, those in ``expert_ids``."""
    modules = op.spec.modules
    if op.spec.kind is OpKind.MOE:
        num_experts = len(modules) // 3
        for expert in expert_ids:
            for projection, weight in enumerate(runner.stored_expert(expert)):
                yield KernelModule(modules[projection * num_experts + expert], weight)
        return
    parts = runner.stored()
    if len(parts) == len(modules):
        yield from map(KernelModule, modules, parts)
        return
    (fused,), start = parts, 0
    for module in modules:
        rows = slice(start, start + module.shape[0])
        scale, global_scale = (None if part is None else part[rows] for part in (fused.scale, fused.global_scale))
        yield KernelModule(module, QuantTensor(fused.qdata[rows], scale, global_scale, fused.format))
        start = rows.stop


def weight_pairs(op: PlannedOp, held: KernelModule, raw: FileTensors) -> Iterator[TensorPair]:
    """Yields codes (or values) and block scales of one module."""
    encoding, name, weight = op.encoding, held.module.name, held.weight
    keys = {part.role: key for part, key in zip(encoding.parts, encoding.keys(name), strict=True)}
    codes = raw(keys["qdata"])
    if encoding.format in (BF16, FP32):
        yield TensorPair(name, "values", keys["qdata"], codes, weight.qdata)
        return
    stored_scale = raw(keys["scale"])
    if weight.format in (BF16, FP32):
        values = _decoded(codes, stored_scale, encoding).to(weight.qdata.dtype)
        yield TensorPair(name, "values", keys["qdata"], values, weight.qdata)
        return
    assert weight.scale is not None, name
    if encoding.format is NVFP4 and op.choice.kernel.layout == PACKED:
        scale, kernel_scale = stored_scale & 0x7F, weight.scale.view(torch.uint8)
        is_dead = scale == 0
        codes = codes.masked_fill(is_dead.repeat_interleave(8, dim=1), 0)
        kernel_scale = torch.where(is_dead, scale, kernel_scale)
    elif encoding.format is MXFP4 and weight.format is NVFP4:
        scale, kernel_scale = _mxfp4_scales(codes, block_scales(stored_scale, encoding), weight)
    elif stored_scale.element_size() == weight.scale.element_size() == 1:
        scale, kernel_scale = stored_scale, weight.scale.view(torch.uint8)
    else:
        scale, kernel_scale = block_scales(stored_scale, encoding), _scale_values(weight.scale)
    yield TensorPair(name, "codes", keys["qdata"], codes, weight.qdata.view(torch.uint8))
    yield TensorPair(name, "scales", keys["scale"], scale, kernel_scale)


def _mxfp4_scales(codes: Tensor, scale: Tensor, weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Returns MXFP4's scales, twice each, and the NVFP4 scales (with global scale) that replaced them. Zero blocks
    match."""
    assert weight.scale is not None
    assert weight.global_scale is not None
    twice = scale.repeat_interleave(2, dim=1)
    is_zero = ((codes & 0x77).unflatten(1, (-1, 16)) == 0).all(dim=-1).repeat_interleave(2, dim=1)
    meant = _scale_values(weight.scale) * weight.global_scale.double().reshape(-1)[0]
    return twice, torch.where(is_zero, twice, meant)


def alpha_pair(op: PlannedOp, held: KernelModule, raw: FileTensors) -> TensorPair | None:
    """Pairs the factor that the kernel receives for one module with the file's, in float64; ``None``: the format has
    none."""
    if op.encoding.format is not NVFP4:
        return None
    assert held.weight.global_scale is not None, held.module.name
    alpha = multiplier(op.encoding, held.module.name, "global_scale", raw)
    kernel_spec = op.choice.kernel
    if kernel_spec.rounding is InputRounding.NVFP4 and kernel_spec.runner != "OfficialMoE":
        # Such a kernel receives one factor: the weight's global scale times the input's.
        alpha = alpha * _input_scale(op, held.module.name, raw)
    kernel = held.weight.global_scale.double().reshape(-1)
    key = op.encoding.key(held.module.name, "global_scale")
    return TensorPair(held.module.name, "factors", key, alpha.expand_as(kernel), kernel)


def multiplier(encoding: Encoding, module: str, role: str, raw: FileTensors) -> Tensor:
    """Returns a stored scalar as a multiplier, in float64 [1]."""
    stored = raw(encoding.key(module, role)).double().reshape(1)
    return 1 / stored if encoding.part(role).is_divisor else stored


def _input_scale(op: PlannedOp, module: str, raw: FileTensors) -> Tensor:
    """Returns the largest input scale of the matrices that share an input: fused shards, and an expert's w1 and w3."""
    names = [other.name for other in op.spec.modules]
    if op.spec.kind is OpKind.MOE:
        stem, _, projection = module.rpartition(".")
        names = [f"{stem}.w2"] if projection == "w2" else [f"{stem}.w1", f"{stem}.w3"]
    return torch.stack([multiplier(op.encoding, name, "input_scale", raw) for name in names]).amax(dim=0)


def block_scales(stored: Tensor, encoding: Encoding) -> Tensor:
    """Decodes block scales of a file as float64. One byte is E4M3 in NVFP4 and E8M0 elsewhere."""
    if stored.dtype != torch.uint8:
        return stored.double()
    return decode(stored, e4m3_of if encoding.format is NVFP4 else e8m0_of)


def _scale_values(scale: Tensor) -> Tensor:
    """Decodes block scales of a kernel as float64."""
    if scale.element_size() > 1:
        return scale.double()
    return decode(scale, e8m0_of if scale.dtype == torch.float8_e8m0fnu else e4m3_of)


def _decoded(codes: Tensor, stored_scale: Tensor, encoding: Encoding) -> Tensor:
    """Decodes codes times block scales, rounded to float32 once, as every product of the two is."""
    scale = block_scales(stored_scale, encoding)
    values = decode(codes, e2m1_pair_of).flatten(-2) if encoding.format is MXFP4 else decode(codes, e4m3_of)
    spread = spread_blocks(scale, values.shape) if encoding.format is FP8_BLOCK else scale.repeat_interleave(32, dim=1)
    return (values * spread).float()
