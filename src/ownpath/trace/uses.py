"""What a slot's callable really is: runners, kernels and layouts, told by the objects themselves and not by a plan."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ownpath.kernels.registry import KERNELS
from ownpath.runners.runner import KernelRunner, Runner

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Use:
    """Several of a kind are joined by "+", as in a plan: a slot whose shards are stored differently."""

    runner: str
    kernel: str
    layout: str


def use_of(runner: Callable[..., Any]) -> Use:
    """The runners, kernels and layouts behind a slot's callable.

    What is no runner of ours has the name of its type or function, and a kernel that is called ``unregistered``.
    """
    if not isinstance(runner, Runner):
        named = runner if isinstance(runner, FunctionType | type) else type(runner)
        return Use(named.__qualname__, f"unregistered {named.__module__}.{named.__qualname__}", UNKNOWN)
    return Use(*map(_joined, zip(*map(_names, runner.leaves), strict=True)))


def variant_of(runner: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The compiled configurations that a call with these arguments launches; for a kernel that has one form only, where
    its implementation is."""
    if not isinstance(runner, Runner):
        return UNKNOWN
    return _joined(_variant(leaf, args) for leaf in runner.leaves)


def _names(leaf: KernelRunner) -> tuple[str, str, str]:
    """Runner, kernel and layout: what its spec says, if it holds that kernel; otherwise what it holds."""
    spec = leaf.spec
    if leaf.kernel is KERNELS[spec.name]:
        return spec.runner, spec.name, spec.layout
    held = type(leaf.kernel)
    return spec.runner, f"unregistered {held.__module__}.{held.__qualname__}", UNKNOWN


def _variant(leaf: KernelRunner, args: tuple[Any, ...]) -> str:
    variant = leaf.variant(*args)
    return leaf.spec.entry if variant is None else variant


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))
