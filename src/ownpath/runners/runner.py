"""A kernel and its operand behind one call, and what anybody may ask of it."""

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
"""A kernel: its spec, as a plan chose it, or its name."""


class Runner(ABC):
    """What stands in a slot. leaves: the runners around kernels; one that only puts others together has theirs."""

    __call__: Callable[..., Any]

    @property
    @abstractmethod
    def leaves(self) -> "tuple[KernelRunner, ...]": ...


class KernelRunner(Runner):
    """A runner around one kernel. kernel: what ``spec`` names."""

    spec: KernelSpec
    kernel: Kernel[Any]

    @property
    def leaves(self) -> "tuple[KernelRunner, ...]":
        """Itself."""
        return (self,)

    def compile_configs(self) -> Sequence[Config]:
        """Everything compiled to disk that calls may launch, for compiling ahead."""
        return ()

    @abstractmethod
    def variant(self, *args: Any) -> str | None:
        """Names of the configurations that a call with these arguments launches; ``None``: there is one form."""


def chosen_spec(kernel: KernelOrName) -> KernelSpec:
    """The spec of a kernel. Errors: ValueError for a name that there is not."""
    if isinstance(kernel, KernelSpec):
        return kernel
    try:
        return spec_of(kernel)
    except KeyError:
        raise ValueError(f"there is no kernel {kernel!r}") from None


def default_spec(kind: OpKind, stored: Format, device: torch.device) -> KernelSpec:
    """What runs where nobody chose: the Hopper kernel on a Hopper GPU, elsewhere the torch reference."""
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
