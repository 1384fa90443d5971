"""Changes loaded weights, runners or layers on their way into verify, in the place of what loads them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

from ownpath.assembly import LoadedPart
from ownpath.verify import layer
from ownpath.verify.layer import LoadedLayer
from ownpath.weights.load import LoadedWeights

Loaded = TypeVar("Loaded")


def _as_loaded(loaded: Loaded) -> Loaded:
    return loaded


@dataclass(frozen=True)
class Interference:
    """weights: as the file filled them, before kernels repack. part: in its runners. layer: put together.

    replaced: what runs, not what is loaded: owner, attribute, and what takes its place, made from the right one.
    """

    weights: Callable[[LoadedWeights], LoadedWeights] = _as_loaded
    part: Callable[[LoadedPart], LoadedPart] = _as_loaded
    layer: Callable[[LoadedLayer], LoadedLayer] = _as_loaded
    replaced: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, whatever verify loads goes through the three."""
        changes: dict[str, Callable[..., Any]] = {
            "load_weights": self.weights,
            "assemble": self.part,
            "layer_of": self.layer,
        }
        with ExitStack() as stack:
            for name, change in changes.items():
                stack.enter_context(patch.object(layer, name, _followed(getattr(layer, name), change)))
            for owner, name, made in self.replaced:
                stack.enter_context(patch.object(owner, name, made(getattr(owner, name))))
            yield


def _followed(load: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(load(*args, **kwargs))
