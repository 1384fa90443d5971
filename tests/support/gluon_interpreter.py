"""Interprets Gluon kernels on the CPU, for tests only.

Triton 3.6 interprets its own language alone. A Gluon function computes what the same Triton function without layouts
would: layouts say which lane holds an element, never what it is. ``install`` puts functions in Gluon's place that drop
layouts and call Triton's. What layouts do wrong, only a device shows. A kernel's constants must be ``tl.constexpr``,
the name that the interpreter recognises.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Language(ModuleType):
    """Gluon's language: Triton's, looked up when called, because the interpreter replaces it for each launch."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import triton.language as tl

        if name.endswith("Layout"):
            return lambda *_: None
        if name in ("arange", "zeros"):
            function = getattr(tl, name)
            return lambda first, second, layout=None: function(first, second)
        return getattr(tl, name)


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    import triton

    return triton.jit(function, **options)


def _mma(left: Any, right: Any, total: Any) -> Any:
    import triton.language as tl

    return tl.dot(left, right, total)


def install() -> None:
    """Replaces Gluon's compiler and language in this process, for kernels that are imported afterwards."""
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia import ampere

    gluon.jit, gluon.language, ampere.mma_v2 = _jit, _Language("language"), _mma
