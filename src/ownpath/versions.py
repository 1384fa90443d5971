"""Versions of the installed software that results depend on, for the provenance of every result."""

import importlib.metadata
import platform

import torch

_PACKAGES = (
    *("ownpath", "torch", "triton", "nvidia-cutlass-dsl", "numpy", "safetensors", "tokenizers"),
    *("humming-kernels", "quack-kernels"),
)


def versions() -> dict[str, str]:
    """Returns the versions of Python, torch's CUDA ("" without it) and the installed packages, by name.

    A source tree that is not installed has no entry.
    """
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
