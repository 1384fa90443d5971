"""Interprets Gluon kernels on the CPU, for tests only.

Triton 3.6 interprets its own language alone. A Gluon function computes what the same Triton function without layouts
would: layouts say which lane holds an element, never what it is. ``install`` puts functions in Gluon's place that drop
layouts and call Triton's. What layouts do wrong, only a device shows. Shared memory is an array that is NaN until
it is written; copies and products that a device runs behind the program's back are complete at once, so races show on a
device too. A kernel's constants must be ``tl.constexpr``, the name that the interpreter recognises.

Warps of several kinds are threads of which one runs at a time: at a barrier whose phase has not passed another goes on.
Where all wait, the interpreter says so.
"""

import builtins
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from support import ptx


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

    def _reinterpret(self, dtype: Any, shape: Any, layout: object = None) -> "_Shared":
        from triton.runtime import interpreter

        values = self.values.view(interpreter._get_np_dtype(dtype))
        assert list(values.shape) == [int(size) for size in shape]
        return _Shared(values, dtype)

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


def _assembly(text: Any, _: object, given: Sequence[Any], dtype: Any = None, pack: int = 1, **__: object) -> Any:
    """Returns what the instructions give; nothing for a prefetch. pack: elements that they take at a time."""
    if str(text).startswith("prefetch."):
        return None
    if str(text).startswith("mov.b32 $0, $1;"):
        return given[0]
    from triton.runtime import interpreter

    arrays = np.broadcast_arrays(*(one.handle.data for one in given))
    types, shape = dtype if isinstance(dtype, (list, tuple)) else (dtype,), list(arrays[0].shape)
    words = [word for one in arrays for word in _words(np.ascontiguousarray(one), int(pack))]
    widths = [interpreter._get_np_dtype(one) for one in types]
    counts = [max(1, int(pack) * np.dtype(one).itemsize // 4) for one in widths]
    found = iter(ptx.run(str(text), words, sum(counts)))
    results = [np.stack([next(found) for _ in range(count)], axis=-1) for count in counts]
    tensors = tuple(
        interpreter.tl.tensor(
            interpreter.TensorHandle(one.view(width).reshape(shape), kind), interpreter.tl.block_type(kind, shape)
        )
        for one, width, kind in zip(results, widths, types, strict=True)
    )
    return tensors if isinstance(dtype, (list, tuple)) else tensors[0]


def _words(values: np.ndarray, pack: int) -> list[np.ndarray]:
    """Returns the words that hold ``pack`` elements at a time."""
    groups = values.reshape(-1, pack).view(np.uint32)
    return [np.ascontiguousarray(groups[:, number]) for number in range(groups.shape[1])]


def _warpgroup_mma(left: Any, right: _Shared, total: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    import triton.language as tl

    left = left.load() if isinstance(left, _Shared) else left
    return tl.dot(left, right.load(), total if use_acc else None)


def _wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    return deps[0] if len(deps) == 1 else deps


@dataclass
class _Barrier:
    """A barrier: arrivals of a phase, those that are still to come, and the parity of the phase that is under way."""

    count: int
    left: int
    parity: int = 0


@dataclass
class _Kinds:
    """The kinds of warps that run: of each its threads' number, kept by the thread that plays it. waiting: kinds whose
    barrier has not passed since anyone last arrived anywhere."""

    turn: threading.Condition = field(default_factory=threading.Condition)
    own: threading.local = field(default_factory=threading.local)
    barriers: dict[int, _Barrier] = field(default_factory=dict)
    running: int = 1
    waiting: int = 0
    failed: list[BaseException] = field(default_factory=list)

    def at(self, shared: _Shared) -> int:
        return int(shared.values.__array_interface__["data"][0])

    def init(self, barrier: _Shared, count: Any) -> None:
        self.barriers[self.at(barrier)] = _Barrier(int(count), int(count))

    def arrive(self, barrier: _Shared, *, count: Any = 1, pred: Any = True) -> None:
        if not bool(pred):
            return
        found = self.barriers[self.at(barrier)]
        found.left -= int(count)
        assert found.left >= 0, "more arrivals than a phase has"
        if not found.left:
            found.left, found.parity, self.waiting = found.count, found.parity ^ 1, 0
            self.turn.notify_all()

    def arrive_all(self, barrier: _Shared, increment_count: bool = True) -> None:
        """Every thread of the kind arrives, its copies being complete."""
        assert not increment_count
        self.arrive(barrier, count=self.own.num_threads)

    def wait(self, barrier: _Shared, phase: Any) -> None:
        found = self.barriers[self.at(barrier)]
        while found.parity == int(phase):
            self.waiting += 1
            if self.failed or self.waiting >= self.running:
                self.turn.notify_all()
                raise RuntimeError("all kinds of warps wait")
            self.turn.wait()

    def specialize(self, parts: Sequence[Any], num_warps: Sequence[int], num_registers: Sequence[int]) -> None:
        """Runs the parts, the first one in the program's own warps."""
        self.running, self.waiting, self.failed = len(parts), 0, []
        with self.turn:
            pairs = zip(parts, (8, *num_warps), strict=True)
            threads = [threading.Thread(target=self._play, args=(part, int(warps))) for part, warps in pairs]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
        self.running = 1
        if self.failed:
            raise self.failed[0]

    def _play(self, part: tuple[Callable[..., object], tuple[object, ...]], num_warps: int) -> None:
        function, arguments = part
        with self.turn:
            self.own.num_threads = 32 * num_warps
            try:
                function(*arguments)
            except BaseException as error:
                self.failed.append(error)
            self.running -= 1
            self.turn.notify_all()


_KINDS = _Kinds()
_OWN: dict[str, Any] = {
    "allocate_shared_memory": _allocate,
    "inline_asm_elementwise": _assembly,
    "convert_layout": lambda value, layout, assert_trivial=False: value,
    "thread_barrier": lambda: None,
    "warp_specialize": _KINDS.specialize,
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
        async_copy_global_to_shared=_copy,
        commit_group=lambda: None,
        wait_group=lambda num_outstanding: None,
        mbarrier_arrive=_KINDS.arrive_all,
    )
    ampere.async_copy = hopper.async_copy = copies
    hopper.mbarrier = SimpleNamespace(
        init=_KINDS.init, arrive=_KINDS.arrive, wait=_KINDS.wait, MBarrierLayout=lambda: None
    )
    block_type.layout = None  # Gluon's tensors know theirs
