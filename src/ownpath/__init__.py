"""ownpath: DeepSeek-V4 NVFP4 checkpoints on a path whose every step has a name.

``Nvfp4Linear`` and ``Nvfp4MoE`` are the public kernels, and ``MegaMoE`` is experts over several ranks (``open_window``
lets GPUs exchange rows by kernels): usable on tensors as a ModelOpt file holds them, without any checkpoint or engine.
They are imported when first asked for, so that ``import ownpath`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ownpath.runners import MegaMoE, Nvfp4Linear, Nvfp4MoE, open_window

__all__ = ["MegaMoE", "Nvfp4Linear", "Nvfp4MoE", "open_window"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ownpath' has no attribute {name!r}")
    from ownpath import runners

    return getattr(runners, name)
