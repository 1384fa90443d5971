"""The implementations behind the kernel names of the plan's catalogue."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from ownpath.kernels.ref import linear, moe

Kernel = Callable[..., Any]

KERNELS: MappingProxyType[str, Kernel] = MappingProxyType(
    {
        "ref.nvfp4_linear": linear.nvfp4_linear,
        "ref.fp8_linear": linear.fp8_linear,
        "ref.plain_linear": linear.plain_linear,
        "ref.grouped_linear": linear.grouped_linear,
        "ref.nvfp4_moe": moe.nvfp4_moe,
    }
)
