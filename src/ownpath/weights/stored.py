"""Filled buffers in the form that kernels take: shards of a matrix, or stacks of experts."""

from dataclasses import replace

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4
from ownpath.kernels.contract import StoredExperts, StoredGroups, StoredLinear
from ownpath.numerics import ScaleSpanError, dequantize, mxfp4_scale_as_nvfp4
from ownpath.plan.ops import PlannedOp
from ownpath.qtensor import QuantTensor
from ownpath.weights.operands import OperandBuffers


def stored_linear(op: PlannedOp, operand: OperandBuffers) -> StoredLinear:
    """Returns a dense op's shards. Their shared input is quantised once, with the largest of their input scales.

    Errors: CheckpointError naming a module with MXFP4 scales that its NVFP4 kernel cannot represent.
    """
    buffers, fmt = operand.buffers, op.encoding.format
    weights = buffers["weight"]
    if fmt in (FP8_BLOCK, MXFP8, MXFP4):
        pairs = zip(weights, buffers["scale"], strict=True)
        shards = tuple(QuantTensor(weight, scale, None, fmt) for weight, scale in pairs)
        if op.choice.kernel.converts_scales:
            names = (module.name for module in op.spec.modules)
            shards = tuple(_shard_as_nvfp4(name, shard) for name, shard in zip(names, shards, strict=True))
        return StoredLinear(shards)
    if fmt is not NVFP4:
        return StoredLinear(tuple(QuantTensor(weight, None, None, fmt) for weight in weights))
    parts = zip(weights, buffers["weight_scale"], buffers["weight_scale_2"], strict=True)
    shards_NVFP4 = tuple(QuantTensor(weight, scale, scale_2, fmt) for weight, scale, scale_2 in parts)
    input_scales = buffers.get("input_scale")
    if input_scales is None:
        return StoredLinear(shards_NVFP4)
    return StoredLinear(shards_NVFP4, torch.stack([scale.max() for scale in input_scales]).max())


def stored_experts(op: PlannedOp, operand: OperandBuffers, swiglu_limit: float) -> StoredExperts:
    """Returns the routed experts. For an NVFP4 kernel on MXFP4 experts, block scales are converted to E4M3.

    Errors: CheckpointError naming slot and expert for MXFP4 scales that NVFP4 cannot represent.
    """
    stored = unconverted_experts(op, operand, swiglu_limit)
    if not op.choice.kernel.converts_scales:
        return stored
    gate_up, down = (_mxfp4_as_nvfp4(op, operand, name) for name in ("w13", "w2"))
    return replace(stored, gate_up=gate_up, down=down)


def unconverted_experts(op: PlannedOp, operand: OperandBuffers, swiglu_limit: float) -> StoredExperts:
    """Returns the routed experts in the format of the file; the buffers may be on ``meta``."""
    gate_up, down = (_side(op, operand, name) for name in ("w13", "w2"))
    gate_up_input, down_input = (_input_scale(operand, name) for name in ("w13", "w2"))
    return StoredExperts(gate_up, down, swiglu_limit, gate_up_input, down_input)


def _side(op: PlannedOp, operand: OperandBuffers, name: str) -> QuantTensor:
    parts = [operand.buffers.get(f"{name}{part}") for part in ("", "_scale", "_scale_2")]
    qdata, scale, global_scale = (None if part is None else part[0] for part in parts)
    assert qdata is not None
    return QuantTensor(qdata, scale, global_scale, op.encoding.format)


def _input_scale(operand: OperandBuffers, name: str) -> torch.Tensor | None:
    """Returns input scales, float32 [E]. Gate and up share an input, so the larger of their scales is used."""
    found = operand.buffers.get(f"{name}_input_scale")
    if found is None:
        return None
    return found[0].amax(dim=1) if found[0].ndim == 2 else found[0]


def _mxfp4_as_nvfp4(op: PlannedOp, operand: OperandBuffers, name: str) -> QuantTensor:
    """Converts each E8M0 scale to two E4M3 scales, in ``scale_memory``, and a power of two per expert. Exact."""
    codes, scale = operand.buffers[name][0], operand.buffers[f"{name}_scale"][0]
    try:
        converted, global_scale = mxfp4_scale_as_nvfp4(
            f"{name}_scale", codes, scale, operand.scale_memory[f"{name}_scale"]
        )
    except ScaleSpanError as error:
        expert = f"{op.spec.slot}.{error.expert}"
        modules = f"{expert}.w2" if name == "w2" else f"{expert}.w1 and {expert}.w3"
        raise CheckpointError(f"{modules}: {error}; {_hint(op.spec.slot)}") from None
    except ValueError as error:
        raise CheckpointError(f"{op.spec.slot}: {error}") from None
    if name == "w13":
        global_scale = global_scale[:, None].expand(-1, 2) if global_scale.ndim == 1 else global_scale
    return QuantTensor(codes, converted, global_scale, NVFP4)


def _shard_as_nvfp4(name: str, weight: QuantTensor) -> QuantTensor:
    """Converts a dense MXFP4 matrix as ``_mxfp4_as_nvfp4`` does an expert's."""
    assert weight.scale is not None, name
    try:
        converted, global_scale = mxfp4_scale_as_nvfp4("its scale", weight.qdata[None], weight.scale[None])
    except ScaleSpanError as error:
        raise CheckpointError(f"{name}: {error}; {_hint(name)}") from None
    return QuantTensor(weight.qdata, converted[0], global_scale[0], NVFP4)


def _hint(name: str) -> str:
    return f"`--reference {name}` has torch compute it from the scales as they are"


def stored_groups(op: PlannedOp, operand: OperandBuffers, num_groups: int) -> StoredGroups:
    """Returns ``wo_a`` as stored; or, for a kernel that takes decoded weights, in plain floating point.

    That is BF16 where it is exact (power-of-two scales), else float32. A kernel that takes only BF16 gets BF16, the
    activations' dtype, to which other kernels round the weight too.
    """
    (weight,) = operand.buffers["weight"]
    scale = operand.buffers["scale"][0] if "scale" in operand.buffers else None
    matrix = QuantTensor(weight, scale, None, op.encoding.format)
    if op.choice.kernel.layout != "dequantized":
        return StoredGroups(matrix, num_groups)
    assert scale is not None
    is_narrow = scale.dtype == torch.float8_e8m0fnu or op.choice.kernel.activations == ("bfloat16",)
    fmt = BF16 if is_narrow else FP32
    decoded = dequantize(matrix, torch.bfloat16 if is_narrow else torch.float32)
    return StoredGroups(QuantTensor(decoded, None, None, fmt), num_groups)
