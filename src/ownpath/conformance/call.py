"""One call of a kernel through its runner."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ownpath.ops import OpKind


@dataclass(frozen=True)
class KernelCall:
    """A callable and its arguments; the first of them is the activations. slot: its name in findings."""

    slot: str
    kind: OpKind
    run: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.run(*self.args)

    def with_args(self, *args: Any) -> "KernelCall":
        """Returns the same slot with other arguments."""
        return replace(self, args=args)

    @cached_property
    def is_product(self) -> bool:
        """True if the operation multiplies by a stored matrix."""
        return self.kind in (OpKind.LINEAR, OpKind.GROUPED, OpKind.MOE)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """Yields every tensor of a slot's result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)
