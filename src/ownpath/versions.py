"""What is installed here and decides how things run, for every result that names where it comes from."""

import importlib.metadata
import platform

import torch

_PACKAGES = (
    *("ownpath", "torch", "triton", "nvidia-cutlass-dsl", "numpy", "safetensors", "tokenizers"),
    *("humming-kernels", "quack-kernels"),
)


def versions() -> dict[str, str]:
    """Of Python, of torch's CUDA ("" without), and of the packages that are installed; a source tree is no package."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
