"""Reads the runners, kernels and layouts behind a slot's callable from the objects themselves, not from a plan."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType

from ownpath.kernels.registry import KERNELS
from ownpath.runners.runner import KernelRunner, Runner
from ownpath.trace.observers import CallArguments, SlotCallable

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Use:
    """Names of a slot's runner, kernel and layout; a slot with several ops joins their names by "+", as a plan does."""

    runner: str
    kernel: str
    layout: str


def use_of(runner: SlotCallable) -> Use:
    """Returns the runners, kernels and layouts behind a slot's callable.

    A callable that is not a ``Runner`` has the name of its type or function and an ``unregistered`` kernel.
    """
    if not isinstance(runner, Runner):
        named = runner if isinstance(runner, FunctionType | type) else type(runner)
        return Use(named.__qualname__, f"unregistered {named.__module__}.{named.__qualname__}", UNKNOWN)
    return Use(*map(_join, zip(*map(_names, runner.leaves), strict=True)))


def variant_of(runner: SlotCallable, args: CallArguments) -> str:
    """Returns the variants that a call with these arguments launches.

    For a kernel without variants, returns the path of its implementation.
    """
    if not isinstance(runner, Runner):
        return UNKNOWN
    return _join(_variant(leaf, args) for leaf in runner.leaves)


def _names(leaf: KernelRunner) -> tuple[str, str, str]:
    """Returns runner, kernel and layout by the leaf's spec, or by its kernel's type if that is not registered."""
    spec = leaf.spec
    if leaf.kernel is KERNELS[spec.name]:
        return spec.runner, spec.name, spec.layout
    held = type(leaf.kernel)
    return spec.runner, f"unregistered {held.__module__}.{held.__qualname__}", UNKNOWN


def _variant(leaf: KernelRunner, args: CallArguments) -> str:
    variant = leaf.variant(*args)
    return leaf.spec.entry if variant is None else variant


def _join(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(names))
