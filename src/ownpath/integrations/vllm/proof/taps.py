"""Taps on the modules of a running model: each enqueues copies of a call's tensors into buffers of its own.

A tap replaces a method of one object by a function that calls it. Before the call it copies what goes in, after
it what came out; both copies are ``copy_`` into memory that was there before, on the stream of the call. So a CUDA
graph that is captured with taps holds the copies too, and every replay fills the same buffers, although no Python runs
then.

Buffers are made at the first call outside a capture, which engines run before they capture anything. A tap that would
have to make one while a graph is captured does not: it is ``missed``, and the reason is kept.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

NO_FLOAT, NO_INTEGER = 0xFF, 0x7F
"""The byte that buffers hold before a step: NaN in every float format; in integers a number that is no id."""
Kept = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Point:
    """A place to tap: modules by their path (``*`` stands for one part of it), and the method that is called.

    holder: the module's attribute whose method it is, where it is not the module's own. takes: parameters whose tensors
    are copied before the call; ``in`` is the first tensor, whatever its name. changes: parameters that the call writes
    into, copied after it. keeps: attributes of the method's owner that hold tensors after the call, of which as many
    rows are copied as the call has. returns: names of the results, in order. What is ``None`` or no tensor is left out.
    """

    path: str
    method: str = "forward"
    takes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    returns: tuple[str, ...] = ("out",)
    holder: str = ""

    def owner(self, module: torch.nn.Module) -> object:
        """Returns the object whose method is called; ``None`` where the module has none."""
        owner: object = getattr(module, self.holder, None) if self.holder else module
        return owner if hasattr(owner, self.method) else None

    def matches(self, path: str) -> bool:
        """True for a path of as many parts, each of which fits."""
        own, parts = self.path.split("."), path.split(".")
        return len(own) == len(parts) and all(map(fnmatchcase, parts, own))


@dataclass
class Taps:
    """The taps of one model and what they hold. max_rows: of a buffer; of a call with more, the first ones are kept.

    has_run: the model's forward has run since the step began, from Python and not from a graph.
    missed: why a value could not be captured, by its key. absent: points that fit no module. Keys are
    ``<path>.<method>:<name>``; a method that is called again in one step adds ``#1``, ``#2``.
    """

    max_rows: int
    is_capturing: Callable[[], bool] = field(default=lambda: False)
    buffers: Kept = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    has_run: bool = False
    absent: list[str] = field(default_factory=list)
    _removers: list[Callable[[], None]] = field(default_factory=list)

    def add(self, root: torch.nn.Module, points: Sequence[Point]) -> None:
        """Puts taps on every module that a point fits. Each forward of the root counts its calls from 0: engines run
        the model more than once between two steps, to warm up and to capture."""
        modules = dict(root.named_modules())
        self._removers.append(root.register_forward_pre_hook(self._begin_forward).remove)
        for point in points:
            found = {path: point.owner(module) for path, module in modules.items() if point.matches(path)}
            found = {path: owner for path, owner in found.items() if owner is not None}
            for path, owner in found.items():
                self._wrap(owner, path, point)
            self.absent += [] if found else [f"{point.path}.{point.method}"]

    def remove(self) -> None:
        """Gives every module its own method back, and the memory free."""
        while self._removers:
            self._removers.pop()()
        self.buffers.clear()

    @torch.no_grad()
    def start_step(self) -> None:
        """Marks every buffer as unwritten; calls are counted from 0."""
        self.calls.clear()
        self.rows.clear()
        self.has_run = False
        for buffer in self.buffers.values():
            buffer.view(torch.uint8).fill_(_unwritten(buffer))

    @torch.no_grad()
    def take(self, num_rows: int) -> Kept:
        """Returns copies, on the CPU, of what the step wrote; buffers that it did not write are left out.

        num_rows: of the step. Where Python ran, a buffer's own count is used, if it is not larger: between the parts of
        a captured graph Python runs on rows that are filled up to a captured size. A replayed graph fills the first.
        """
        found = {}
        for key, buffer in self.buffers.items():
            rows = buffer[: min(self.rows.get(key, num_rows), num_rows)]
            if key in self.rows or bool((rows.view(torch.uint8) != _unwritten(rows)).any()):
                found[key] = rows.to("cpu", copy=True)
        return found

    def _begin_forward(self, *_: object) -> None:
        self.calls.clear()
        self.has_run = True

    def _wrap(self, owner: object, path: str, point: Point) -> None:
        original: Callable[..., Any] = getattr(owner, point.method)
        signature, name = inspect.signature(original), f"{path}.{point.method}"

        def tapped(*args: Any, **kwargs: Any) -> Any:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            bound = signature.bind(*args, **kwargs).arguments | {"in": next(tensors, None)}
            call = self.calls.get(name, 0)
            self.calls[name] = call + 1
            suffix = f"#{call}" if call else ""
            self._keep_all(name, suffix, {part: bound.get(part) for part in point.takes})
            result = original(*args, **kwargs)
            self._keep_all(name, suffix, {part: bound.get(part) for part in point.changes})
            first = bound["in"]
            held = {part: getattr(owner, part, None) for part in point.keeps}
            held = {part: value[: len(first)] for part, value in held.items() if value is not None}
            self._keep_all(name, suffix, held)
            results = result if isinstance(result, tuple | list) else (result,)
            self._keep_all(name, suffix, dict(zip(point.returns, results, strict=False)))
            return result

        setattr(owner, point.method, tapped)
        self._removers.append(lambda: delattr(owner, point.method))

    def _keep_all(self, name: str, suffix: str, values: Mapping[str, Any]) -> None:
        for part, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                self._keep(f"{name}:{part}{suffix}", value)

    @torch.no_grad()
    def _keep(self, key: str, value: torch.Tensor) -> None:
        value = value[: self.max_rows]
        buffer = self._buffer(key, value)
        if buffer is not None:
            buffer[: len(value)].copy_(value)
            self.rows[key] = len(value)

    def _buffer(self, key: str, value: torch.Tensor) -> torch.Tensor | None:
        """Returns the tap's memory, made outside captures alone."""
        buffer = self.buffers.get(key)
        if buffer is not None and buffer.shape[1:] == value.shape[1:] and buffer.dtype == value.dtype:
            return buffer
        if self.is_capturing():
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            self.missed[key] = f"no buffer for {shape} {dtype} was made before the graph was captured"
            return None
        with torch.inference_mode(False):  # memory that may be written inside and outside of that mode
            made = torch.empty((self.max_rows, *value.shape[1:]), dtype=value.dtype, device=value.device)
        made.view(torch.uint8).fill_(_unwritten(made))
        self.buffers[key] = made
        return made


def _unwritten(buffer: torch.Tensor) -> int:
    return NO_FLOAT if buffer.is_floating_point() else NO_INTEGER
