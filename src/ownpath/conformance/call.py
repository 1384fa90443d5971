"""One call of a kernel through its runner."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ownpath.ops import OpKind


@dataclass(frozen=True)
class KernelCall:
    """A callable and its arguments; the first of them is the activations. slot: what it is called in findings."""

    slot: str
    kind: OpKind
    run: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.run(*self.args)

    def with_args(self, *args: Any) -> "KernelCall":
        """The same slot, called otherwise."""
        return replace(self, args=args)

    @cached_property
    def is_product(self) -> bool:
        """Whether a stored matrix is behind it."""
        return self.kind in (OpKind.LINEAR, OpKind.GROUPED, OpKind.MOE)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """Every tensor of what a slot returns."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)
    elif is_dataclass(result):
        for field in fields(result):
            yield from tensors_of(getattr(result, field.name))
