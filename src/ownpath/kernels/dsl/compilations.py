"""Counts the kernels that are compiled in this process, or taken compiled from Triton's cache, at the first call that
needs them, and the graphs that are captured. A server's steps should need none that its start did not."""

from importlib.util import find_spec
from typing import Any


class Compilations:
    """count: kernels so far. num_captured: graphs."""

    def __init__(self) -> None:
        self.count = self.num_captured = 0

    def watch_triton(self) -> None:
        """Counts Triton's from now on, where it is installed. A hook that somebody has set stays."""
        if find_spec("triton") is None:
            return
        import triton

        if triton.knobs.runtime.jit_post_compile_hook is None:
            triton.knobs.runtime.jit_post_compile_hook = self._count_one

    def _count_one(self, **_: Any) -> None:
        self.count += 1


COMPILATIONS = Compilations()
"""Compilers belong to the process, and so do the counts."""
