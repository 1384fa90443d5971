"""Other systems' kernels, each behind one adapter that imports its system only when asked to prepare.

An adapter calls public entry points only, with the settings that the system itself chooses for the shape.
"""

import importlib.util

import torch

from ownpath.bench.contender import Missing


def missing_package(module: str, package: str, device: str) -> Missing | None:
    """Returns the reason why a CUDA system cannot run here, or None if it can."""
    if torch.device(device).type != "cuda":
        return Missing("not applicable", "needs a CUDA device")
    if importlib.util.find_spec(module) is None:
        return Missing("not installed", f"no package {package}")
    return None
