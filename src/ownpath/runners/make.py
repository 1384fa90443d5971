"""From a plan and its filled operands to runners, one per slot of the plan's products."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.config import ModelConfig
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.kernels.official_experts.ref import ExpertWeights
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.numerics import dequantize
from ownpath.plan.plan import Plan, PlannedOp
from ownpath.qtensor import QuantTensor
from ownpath.runners.fp8 import Fp8Linear
from ownpath.runners.linear import ConcatLinear, GroupedLinear, Nvfp4Linear, PlainLinear, WideLinear
from ownpath.runners.moe import Fp8MoE, Nvfp4MoE, PlainMoE
from ownpath.runners.official import OfficialMoE, QuantizedInput, quantized_fp8, quantized_nvfp4
from ownpath.runners.w4a4 import Nvfp4LinearW4A4, Nvfp4MoEW4A4
from ownpath.weights.operands import Operand

Runner = Callable[..., Any]


def make_runners(plan: Plan, operands: Iterable[Operand]) -> dict[str, Runner]:
    """The runner of each slot, around the operands in the order of ``plan.ops``.

    A runner whose kernel has a layout of its own repacks the operand's buffers in place, one expert at a time, so
    that two copies never exist.
    """
    parts: dict[str, list[Any]] = {}
    with_workspace: dict[type, list[Any]] = {}
    for op, operand in zip(plan.ops, operands, strict=True):
        runner = make_runner(op, operand, plan.config)
        linear = runner.linear if isinstance(runner, QuantizedInput) else runner
        if isinstance(getattr(linear, "workspace", None), torch.Tensor):
            share_workspace(with_workspace.setdefault(type(linear), []), linear)
        parts.setdefault(op.spec.slot, []).append(WideLinear(runner) if op.spec.is_wide else runner)
    return {slot: found[0] if len(found) == 1 else ConcatLinear(found) for slot, found in parts.items()}


def share_workspace(sharing: list[Any], runner: Any) -> None:
    """Adds a runner to those of its kind that use one workspace, the largest that any of them asked for.

    They run one after the other on one stream, so that none needs what another left there.
    """
    sharing.append(runner)
    largest = max((other.workspace for other in sharing), key=lambda workspace: workspace.numel())
    for other in sharing:
        other.workspace = largest


def compile_configs(runners: Iterable[Runner]) -> list[Any]:
    """The compile-time configurations of every kernel that the runners may launch, each once."""
    found: dict[str, Any] = {}
    for runner in runners:
        for part in getattr(runner, "linears", None) or (runner,):
            inner = part.linear if isinstance(part, WideLinear) else part
            configs = getattr(inner, "compile_configs", None)
            found |= {config.name: config for config in configs()} if configs is not None else {}
    return list(found.values())


def make_runner(op: PlannedOp, operand: Operand, config: ModelConfig) -> Any:
    """The runner that the plan names for one op, around its operand."""
    kernel = KERNELS[op.choice.kernel.name]
    buffers = operand.buffers
    if op.choice.kernel.runner == "Nvfp4MoE":
        return _nvfp4_moe(op, operand, config.swiglu_limit, kernel)
    if op.choice.kernel.runner == "Fp8MoE":
        tensors = {name: buffers[name][0] for name in ("w13", "w13_scale", "w2", "w2_scale")}
        return Fp8MoE(**tensors, swiglu_limit=config.swiglu_limit, kernel=kernel)
    if op.choice.kernel.runner == "PlainMoE":
        return PlainMoE(buffers["w13"][0], buffers["w2"][0], config.swiglu_limit, kernel=kernel)
    if op.choice.kernel.runner == "Nvfp4Linear":
        return Nvfp4Linear(buffers["weight"], buffers["weight_scale"], buffers["weight_scale_2"], kernel=kernel)
    if op.choice.kernel.runner == "Nvfp4MoEW4A4":
        w13, w2 = (
            [buffers[f"{name}{part}"][0] for part in ("", "_scale", "_scale_2", "_input_scale")]
            for name in ("w13", "w2")
        )
        return Nvfp4MoEW4A4(w13, w2, config.swiglu_limit, kernel=kernel)
    if op.choice.kernel.runner == "Nvfp4LinearW4A4":
        parts = (buffers[name] for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"))
        return Nvfp4LinearW4A4(*parts, kernel=kernel)
    if op.choice.kernel.runner == "Fp8Linear":
        return Fp8Linear(buffers["weight"], buffers["scale"], kernel=kernel)
    if op.choice.kernel.runner == "QuantizedFp8Linear":
        return quantized_fp8(Fp8Linear(buffers["weight"], buffers["scale"], kernel=kernel))
    if op.choice.kernel.runner == "QuantizedNvfp4Linear":
        return _quantized_nvfp4(buffers, kernel)
    if op.choice.kernel.runner == "OfficialMoE":
        gate_up, down = (_expert_weights(op, buffers, name) for name in ("w13", "w2"))
        return OfficialMoE(gate_up, down, config.swiglu_limit, kernel=kernel)
    if op.choice.kernel.runner == "GroupedLinear":
        return GroupedLinear(_grouped_weight(op, operand), config.o_groups, kernel=kernel)
    assert op.choice.kernel.runner == "PlainLinear", op.choice.kernel.runner
    return PlainLinear(buffers["weight"], kernel=kernel)


def _nvfp4_moe(op: PlannedOp, operand: Operand, swiglu_limit: float, kernel: Kernel) -> Nvfp4MoE:
    """Experts for an NVFP4 kernel. Errors: CheckpointError naming slot and expert for MXFP4 that NVFP4 cannot say."""
    buffers = operand.buffers
    if op.encoding.format is NVFP4:
        names = ("w13", "w13_scale", "w13_scale_2", "w2", "w2_scale", "w2_scale_2")
        return Nvfp4MoE(**{name: buffers[name][0] for name in names}, swiglu_limit=swiglu_limit, kernel=kernel)
    tensors = {name: buffers[name][0] for name in ("w13", "w13_scale", "w2", "w2_scale")}
    try:
        rooms = operand.rooms["w13_scale"], operand.rooms["w2_scale"]
        return Nvfp4MoE.from_mxfp4(**tensors, swiglu_limit=swiglu_limit, rooms=rooms, kernel=kernel)
    except ValueError as error:
        raise CheckpointError(f"{op.spec.slot}: {error}") from None


def _quantized_nvfp4(buffers: dict[str, tuple[torch.Tensor, ...]], kernel: Kernel) -> QuantizedInput:
    """W4A4 by a W4A16 kernel: the input's global scale goes into the weights'. Fused shards share the largest."""
    input_scale = buffers["input_scale"][0].max()
    scale_2 = tuple(scale * input_scale for scale in buffers["weight_scale_2"])
    return quantized_nvfp4(Nvfp4Linear(buffers["weight"], buffers["weight_scale"], scale_2, kernel=kernel), input_scale)


def _expert_weights(op: PlannedOp, buffers: dict[str, tuple[torch.Tensor, ...]], name: str) -> ExpertWeights:
    """One side of the experts as stored. Gate and up share an input, so they share the larger input scale."""
    parts = {
        part: buffers[f"{name}{part}"][0]
        for part in ("", "_scale", "_scale_2", "_input_scale")
        if f"{name}{part}" in buffers
    }
    input_scale = parts.get("_input_scale")
    if input_scale is not None and input_scale.ndim == 2:
        input_scale = input_scale.amax(dim=1)
    return ExpertWeights(op.encoding.format, parts[""], parts.get("_scale"), parts.get("_scale_2"), input_scale)


def _grouped_weight(op: PlannedOp, operand: Operand) -> torch.Tensor:
    """``wo_a`` as plain floating point; from FP8, BF16 where that is exact (power-of-two scales), else float32.

    A kernel that takes BF16 alone gets BF16: the activations' dtype, to which any other kernel would round too.
    """
    (weight,) = operand.buffers["weight"]
    if op.choice.kernel.layout != "dequantized":
        return weight
    (scale,) = operand.buffers["scale"]
    is_narrow = scale.dtype == torch.float8_e8m0fnu or op.choice.kernel.activations == ("bfloat16",)
    dtype = torch.bfloat16 if is_narrow else torch.float32
    return dequantize(QuantTensor(weight, scale, None, FP8_BLOCK), dtype)
