"""The compiler of the CuTe kernels: any by which all of them were compiled and compared (docs/vllm.md).

An engine beside us may pin its own: vLLM 0.26 has 4.6.0, vLLM 0.33 has 4.8.0. The version is part of a kernel's key in
the cache, so that each compiler has kernels of its own, and a note never claims another's.
"""

import importlib.metadata
from functools import lru_cache

PACKAGE = "nvidia-cutlass-dsl"
COMPARED = ("4.6.0", "4.8.0", "4.8.1")
"""Oldest first. The last one is what is measured, and what ``ownpath[cute]`` installs."""


@lru_cache(maxsize=1)
def installed_version() -> str | None:
    """Returns the installed compiler's version; ``None`` without one."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler_name() -> str:
    """Returns the compiler whose kernels are used here: the installed one, or the newest where there is none to use."""
    version = installed_version()
    return f"{PACKAGE} {version if version in COMPARED else COMPARED[-1]}"


def why_not() -> str | None:
    """Says why no kernel can be compiled here; ``None`` where they can."""
    version = installed_version()
    if version is None:
        return f"{PACKAGE} is not installed"
    if version not in COMPARED:
        return f"{PACKAGE} {version} is installed, and the kernels were compared with {', '.join(COMPARED)} only"
    return None
