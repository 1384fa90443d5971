"""Interprets Gluon kernels on the CPU, for tests only.

Triton 3.6 interprets its own language alone. A Gluon function computes what the same Triton function without layouts
would: layouts say which lane holds an element, never what it is. ``install`` puts functions in Gluon's place that drop
layouts and call Triton's. What layouts do wrong, only a device shows. Shared memory is an array that is NaN until
it is written; copies and products that a device runs behind the program's back are complete at once, so races show on a
device too. A kernel's constants must be ``tl.constexpr``, the name that the interpreter recognises.
"""

import builtins
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


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
        if name == "full":
            return lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype)
        return _OWN[name] if name in _OWN else getattr(tl, name)


class _Shared:
    """A part of shared memory. values: a view of the array that holds it, as the interpreter holds elements."""

    def __init__(self, values: np.ndarray, dtype: Any) -> None:
        self.values, self.dtype, self.shape = values, dtype, list(values.shape)

    def index(self, number: Any) -> "_Shared":
        return _Shared(self.values[int(number)], self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> "_Shared":
        kept = (builtins.slice(None),) * int(dim) + (builtins.slice(int(start), int(start) + int(length)),)
        return _Shared(self.values[kept], self.dtype)

    def permute(self, order: Any) -> "_Shared":
        return _Shared(self.values.transpose(order), self.dtype)

    def store(self, value: Any) -> None:
        self.values[...] = value.handle.data

    def load(self, layout: object = None) -> Any:
        from triton.runtime import interpreter

        handle = interpreter.TensorHandle(self.values.copy(), self.dtype)
        return interpreter.tl.tensor(handle, interpreter.tl.block_type(self.dtype, self.shape))


def _allocate(dtype: Any, shape: Any, layout: object = None) -> _Shared:
    from triton.runtime import interpreter

    sizes = [int(size) for size in shape]
    bytes_each = interpreter._get_np_dtype(dtype).itemsize
    unwritten = np.full((*sizes, bytes_each), 255, np.uint8).view(interpreter._get_np_dtype(dtype))
    return _Shared(unwritten[..., 0], dtype)


def _copy(shared: _Shared, pointer: Any, mask: Any = None) -> None:
    import triton.language as tl

    shared.store(tl.load(pointer, mask=mask, other=None if mask is None else 0))


def _warpgroup_mma(left: Any, right: _Shared, total: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    import triton.language as tl

    left = left.load() if isinstance(left, _Shared) else left
    return tl.dot(left, right.load(), total if use_acc else None)


def _wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    return deps[0] if len(deps) == 1 else deps


_OWN: dict[str, Any] = {
    "allocate_shared_memory": _allocate,
    "convert_layout": lambda value, layout: value,
    "thread_barrier": lambda: None,
}


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    import triton

    return triton.jit(function, **options)


def _mma(left: Any, right: Any, total: Any) -> Any:
    import triton.language as tl

    return tl.dot(left, right, total)


def install() -> None:
    """Replaces Gluon's compiler and language in this process, for kernels that are imported afterwards."""
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia import ampere, hopper
    from triton.language import block_type

    gluon.jit, gluon.language, ampere.mma_v2 = _jit, _Language("language"), _mma
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _warpgroup_mma, _wait
    hopper.fence_async_shared = lambda: None
    copies = SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda num_outstanding: None
    )
    ampere.async_copy = hopper.async_copy = copies
    block_type.layout = None  # Gluon's tensors know theirs
