"""Which kernel a runner gets when nobody chose one, and the operand in the layout that a kernel wants."""

from typing import Any

import torch

from ownpath.kernels.registry import KERNELS, Kernel


def default_kernel(op: str, operand: torch.Tensor) -> Kernel:
    """The Hopper kernel of ``op`` for an operand on such a GPU, else the torch reference."""
    is_hopper = operand.is_cuda and torch.cuda.get_device_capability(operand.device)[0] == 9
    return KERNELS[f"{'cute' if is_hopper else 'ref'}.{op}"]


def prepared(kernel: Kernel, *operand: Any) -> tuple[Any, ...]:
    """What to call the kernel with: its own layout where it has one, the operand as stored otherwise."""
    prepare = getattr(kernel, "prepare", None)
    return operand if prepare is None else (prepare(*operand),)


def compile_configs(kernel: Kernel, operand: tuple[Any, ...]) -> list[Any]:
    """The compile-time configurations of what calls may launch; none for kernels that are compiled elsewhere."""
    configs = getattr(kernel, "configs", None)
    return [] if configs is None else list(configs(*operand))
