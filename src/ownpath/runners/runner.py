"""The base classes of runners: a kernel and its operand behind one call."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ownpath.formats import Format
from ownpath.kernels.contract import Config, Kernel
from ownpath.kernels.registry import SPECS, spec_of
from ownpath.kernels.spec import KernelSpec
from ownpath.ops import OpKind

KernelOrName = KernelSpec | str
"""A kernel's spec, as chosen by a plan, or its name."""


class Runner(ABC):
    """A slot's callable. leaves: the kernel runners inside; a composite runner has those of its members."""

    __call__: Callable[..., Any]

    @property
    @abstractmethod
    def leaves(self) -> "tuple[KernelRunner, ...]": ...


class KernelRunner(Runner):
    """A runner of one kernel. kernel: the implementation that ``spec`` names."""

    spec: KernelSpec
    kernel: Kernel[object]

    @property
    def leaves(self) -> "tuple[KernelRunner, ...]":
        """This runner."""
        return (self,)

    def compile_configs(self) -> Sequence[Config]:
        """Returns the configurations of every kernel compiled to disk that calls may launch."""
        return ()

    @abstractmethod
    def variant(self, *args: Any) -> str | None:
        """Returns the names of the variants that a call with these arguments launches; ``None`` without variants."""


def chosen_spec(kernel: KernelOrName) -> KernelSpec:
    """Returns the spec of a kernel. Errors: ValueError for an unknown name."""
    if isinstance(kernel, KernelSpec):
        return kernel
    try:
        return spec_of(kernel)
    except KeyError:
        raise ValueError(f"there is no kernel {kernel!r}") from None


def default_spec(kind: OpKind, stored: Format, device: torch.device) -> KernelSpec:
    """Returns the default kernel: on a Hopper GPU the Hopper kernel, elsewhere the torch reference."""
    sm = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        sm = 10 * major + minor
    fitting = (spec for spec in SPECS if spec.is_default and spec.kind is kind and stored in spec.formats)
    return next(spec for spec in fitting if _runs_on(spec, sm))


def _runs_on(spec: KernelSpec, sm: int | None) -> bool:
    if spec.min_sm is None:
        return True
    return sm is not None and spec.min_sm <= sm and (spec.end_sm is None or sm < spec.end_sm)
