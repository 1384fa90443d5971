"""Other systems' kernels, each behind one adapter that imports its system only when asked to prepare.

An adapter calls public entry points only, with the settings that the system itself chooses for the shape.
"""

import importlib.util
from pathlib import Path

import torch

from ownpath.bench.contender import Missing


def missing_package(module: str, package: str, device: str) -> Missing | None:
    """Returns the reason why a CUDA system cannot run here, or None if it can."""
    if torch.device(device).type != "cuda":
        return Missing("not applicable", "needs a CUDA device")
    if importlib.util.find_spec(module) is None:
        return Missing("not installed", f"no package {package}")
    return None


def missing_library(system: str, file: str, library: Path | None, device: str) -> Missing | None:
    """Returns the reason why a system that is one library of operations cannot run here, or None if it can."""
    if torch.device(device).type != "cuda":
        return Missing("not applicable", "needs a CUDA device")
    if library is None:
        return Missing("not installed", f"no {file}: --library {system}=FILE, or OWNPATH_BENCH_{system.upper()}")
    if not library.is_file():
        return Missing("not installed", f"{library} is no file")
    return None
