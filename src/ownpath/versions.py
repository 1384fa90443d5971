"""Versions of the installed software that decides how things run, for every result that names its origin."""

import importlib.metadata
import platform

import torch

_PACKAGES = (
    *("ownpath", "torch", "triton", "nvidia-cutlass-dsl", "numpy", "safetensors", "tokenizers"),
    *("humming-kernels", "quack-kernels"),
)


def versions() -> dict[str, str]:
    """Returns versions of Python, torch's CUDA ("" without), and the installed packages; a source tree is no
    package."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
