"""What a runner's kernel holds, beside what the file holds: pairs of tensors that must be equal, module by module.

The kernel's side is read back out of its layout by the runner (``stored``, ``stored_expert``); the file's side comes
from ``FileTensors``, with the meaning of its bytes from the oracle's tables. Scales are compared as values where the
kernel holds them in another dtype, codes and all other scales bit by bit. Two things may differ from the file without a
change of meaning, and are allowed for: codes under a zero scale (a kernel that cannot say zero holds zeros under
2^-9), and the scale of a block of zeros in MXFP4 that became NVFP4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ownpath.checkpoint.schema import Encoding, ModuleSpec
from ownpath.formats import BF16, FP32, MXFP4, NVFP4
from ownpath.kernels.spec import InputRounding
from ownpath.ops import OpKind
from ownpath.oracle.formats import decode, e4m3_of, e8m0_of
from ownpath.oracle.stored import spread_blocks
from ownpath.plan.plan import PlannedOp
from ownpath.qtensor import QuantTensor
from ownpath.runners import Runner
from ownpath.verify.file_tensors import FileTensors

PACKED = "packed_64x128"


@dataclass(frozen=True)
class TensorPair:
    """What must be equal, and of what: role says it in a word. key: the tensor in the file. Shapes are equal."""

    module: str
    role: str
    key: str
    file: Tensor
    kernel: Tensor


@dataclass(frozen=True)
class KernelModule:
    """One stored matrix with what the kernel holds for it."""

    module: ModuleSpec
    weight: QuantTensor


def ops_with_runners(op_list: tuple[PlannedOp, ...], runner: Runner) -> Iterator[tuple[PlannedOp, Any]]:
    """Each op of a slot with the runner that holds its operand."""
    return zip(op_list, runner.leaves, strict=True)


def read_modules(op: PlannedOp, runner: Any, expert_ids: tuple[int, ...]) -> Iterator[KernelModule]:
    """What ``runner`` holds of each module of ``op``; of routed experts, those that are given."""
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
    """Codes (or values) and block scales of one module."""
    encoding, name, weight = op.encoding, held.module.name, held.weight
    keys = {part.role: key for part, key in zip(encoding.parts, encoding.keys(name), strict=True)}
    codes = raw(keys["qdata"])
    if encoding.format in (BF16, FP32):
        yield TensorPair(name, "values", keys["qdata"], codes, weight.qdata)
        return
    stored_scale = raw(keys["scale"])
    if weight.format in (BF16, FP32):
        values = _decoded_fp8(codes, stored_scale).to(weight.qdata.dtype)
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
    """MXFP4's scales, twice each, and what they became: NVFP4's with the global scale. Over zeros any will do."""
    assert weight.scale is not None
    assert weight.global_scale is not None
    twice = scale.repeat_interleave(2, dim=1)
    is_zero = ((codes & 0x77).unflatten(1, (-1, 16)) == 0).all(dim=-1).repeat_interleave(2, dim=1)
    meant = _scale_values(weight.scale) * weight.global_scale.double().reshape(-1)[0]
    return twice, torch.where(is_zero, twice, meant)


def alpha_pair(op: PlannedOp, held: KernelModule, raw: FileTensors) -> TensorPair | None:
    """The factor that the kernel receives for one module, and the file's, in float64; ``None``: the format has none."""
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
    """What a stored scalar means as a multiplier, in float64 [1]."""
    stored = raw(encoding.key(module, role)).double().reshape(1)
    return 1 / stored if encoding.part(role).is_divisor else stored


def _input_scale(op: PlannedOp, module: str, raw: FileTensors) -> Tensor:
    """Matrices that share an input share the largest of their input scales: fused shards, and an expert's w1 and w3."""
    names = [other.name for other in op.spec.modules]
    if op.spec.kind is OpKind.MOE:
        stem, _, projection = module.rpartition(".")
        names = [f"{stem}.w2"] if projection == "w2" else [f"{stem}.w1", f"{stem}.w3"]
    return torch.stack([multiplier(op.encoding, name, "input_scale", raw) for name in names]).amax(dim=0)


def block_scales(stored: Tensor, encoding: Encoding) -> Tensor:
    """Block scales of a file as float64. One byte is E4M3 in NVFP4 and E8M0 elsewhere."""
    if stored.dtype != torch.uint8:
        return stored.double()
    return decode(stored, e4m3_of if encoding.format is NVFP4 else e8m0_of)


def _scale_values(scale: Tensor) -> Tensor:
    """Block scales of a kernel as float64."""
    if scale.element_size() > 1:
        return scale.double()
    return decode(scale, e8m0_of if scale.dtype == torch.float8_e8m0fnu else e4m3_of)


def _decoded_fp8(codes: Tensor, stored_scale: Tensor) -> Tensor:
    """E4M3 with a scale for 128 x 128, rounded to float32 once, as every product of the two is."""
    scale = decode(stored_scale, e8m0_of) if stored_scale.dtype == torch.uint8 else stored_scale
    return (decode(codes, e4m3_of) * spread_blocks(scale.double(), codes.shape)).float()
