"""Which kernel a runner gets when nobody chose one, and the operand in the layout that a kernel wants."""

from typing import Any

import torch

from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.qtensor import QuantTensor


def default_kernel(op: str, operand: torch.Tensor) -> Kernel:
    """The Hopper kernel of ``op`` for an operand on such a GPU, else the torch reference."""
    is_hopper = operand.is_cuda and torch.cuda.get_device_capability(operand.device)[0] == 9
    return KERNELS[f"{'cute' if is_hopper else 'ref'}.{op}"]


def prepared(kernel: Kernel, *operand: Any) -> tuple[Any, ...]:
    """What to call the kernel with: its own layout where it has one, the operand as stored otherwise."""
    prepare = getattr(kernel, "prepare", None)
    return operand if prepare is None else (prepare(*operand),)


def restored(kernel: Kernel, operand: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inverse of ``prepared`` for a matrix: what the kernel holds, as it is stored."""
    restore = getattr(kernel, "restore", None)
    return operand if restore is None else tuple(restore(*operand))


def restored_expert(kernel: Kernel, operand: tuple[Any, ...], expert: int) -> tuple[Any, ...]:
    """The inverse of ``prepared`` for one expert: its part of each side's tensors."""
    restore = getattr(kernel, "restore", None)
    if restore is not None:
        return tuple(restore(*operand, expert))
    return tuple(tuple(part[expert] for part in side) for side in operand)


def gate_and_up(fused: QuantTensor) -> tuple[QuantTensor, QuantTensor]:
    """An expert's fused matrix in two, gate rows first.

    Shapes: qdata [2F, ...]; scale [2F, ...], or a grid for each half [2, R, C]; global_scale [2].
    """

    def half(idx: int) -> QuantTensor:
        scale = fused.scale
        if scale is not None:
            scale = scale[idx] if scale.ndim == 3 else scale.chunk(2)[idx]
        global_scale = None if fused.global_scale is None else fused.global_scale[idx]
        return QuantTensor(fused.qdata.chunk(2)[idx], scale, global_scale, fused.format)

    return half(0), half(1)


def compile_configs(kernel: Kernel, operand: tuple[Any, ...]) -> list[Any]:
    """The compile-time configurations of what calls may launch; none for kernels that are compiled elsewhere."""
    configs = getattr(kernel, "configs", None)
    return [] if configs is None else list(configs(*operand))
