"""What a slot's callable really is: runners, kernels and layouts, told by the objects themselves and not by a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ownpath.kernels.registry import KERNELS, SPECS, VARIANTS
from ownpath.runners.official import QuantizedInput

Runner = Callable[..., Any]
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Use:
    """Several of a kind are joined by "+", as in a plan: a slot whose shards are stored differently.

    layout: what the catalogue says that this runner lays out for this kernel; " or " between several, of which the
        stored format decides.
    """

    runner: str
    kernel: str
    layout: str


def use_of(runner: Runner) -> Use:
    """The runners, kernels and layouts behind a slot's callable.

    What is no runner of ours has the name of its type or function; a kernel that is not registered has its own, with
    the word ``unregistered``.
    """
    found = [(_runner_name(leaf), _kernel_name(leaf)) for leaf in _leaves(runner)]
    layouts = [" or ".join(_layouts(*names)) or UNKNOWN for names in found]
    names, kernels = zip(*found, strict=True)
    return Use(_joined(names), _joined(kernels), _joined(layouts))


def variant_of(runner: Runner, args: tuple[Any, ...]) -> str:
    """The compiled configurations that a call with these arguments launches; for a kernel that has one form only, where
    its implementation is."""
    return _joined(_variant(leaf, args) for leaf in _leaves(runner))


def _leaves(runner: Runner) -> tuple[Runner, ...]:
    """The runners around kernels. One that quantises first is one with its linear."""
    parts = () if isinstance(runner, QuantizedInput) else getattr(runner, "parts", ())
    return tuple(chain.from_iterable(map(_leaves, parts))) if parts else (runner,)


def _around_kernel(leaf: Runner) -> Runner:
    return leaf.linear if isinstance(leaf, QuantizedInput) else leaf


def _runner_name(leaf: Runner) -> str:
    if isinstance(leaf, QuantizedInput):
        return f"Quantized{type(leaf.linear).__name__}"
    return getattr(leaf, "__qualname__", type(leaf).__name__)


def _kernel_name(leaf: Runner) -> str:
    kernel = getattr(_around_kernel(leaf), "_kernel", leaf)
    own = getattr(kernel, "__qualname__", type(kernel).__name__)
    return KERNELS.name_of(kernel) or f"unregistered {kernel.__module__}.{own}"


def _variant(leaf: Runner, args: tuple[Any, ...]) -> str:
    name = _kernel_name(leaf)
    if name in VARIANTS:
        inner: Any = _around_kernel(leaf)
        variant: str = VARIANTS[name](*inner.kernel_arguments(*args))
        return variant
    return KERNELS.place(name) if name in KERNELS else UNKNOWN


def _layouts(runner: str, kernel: str) -> list[str]:
    fitting = (spec.layout for spec in SPECS if (spec.runner, spec.name) == (runner, kernel))
    return list(dict.fromkeys(fitting))


def _joined(names: Any) -> str:
    return "+".join(dict.fromkeys(names))
