"""Kernel specs: everything that plan, runners, trace, verify, bench and docs need to know of a kernel.

Each family of kernels is a folder with a ``spec.py`` whose ``SPECS`` lists its kernels, best first. Importing a spec
imports no torch and touches no device.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from ownpath.formats import Format
from ownpath.official import PLAIN, Step
from ownpath.ops import OpKind


class InputRounding(StrEnum):
    """The rounding of activations before a kernel multiplies them."""

    EXACT = "exact"
    """None: W4A16 and W8A16."""
    E4M3 = "e4m3_1x128"
    """E4M3 with a scale per 1 x 128, a power of two if the weight's scales are."""
    E4M3_POWER_OF_TWO = "e4m3_1x128_power_of_two"
    """E4M3 with a power-of-two scale per 1 x 128, for any weight's scales."""
    NVFP4 = "nvfp4_1x16"
    """E2M1 with an E4M3 scale per 1 x 16 and the checkpoint's calibrated ``input_scale``."""


@dataclass(frozen=True)
class Evidence:
    """The test that compares a kernel with its twin, and its bench. Paths are relative to the repository.

    twin: the torch function that defines the result, as ``module:function`` in ``ownpath.kernels``.
    """

    twin: str
    test: str
    bench: str


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's contract.

    name: its name in plans, ledgers and reports.
    formats: stored formats it takes; empty for an op without a stored matrix.
    runner: its runner's name in plans.
    why: what it does, for the plan's text.
    entry: path of its ``Kernel``, ``module:attribute`` in ``ownpath.kernels``.
    min_sm, end_sm: lowest compute capability times ten, and the first that is too new; ``None`` runs anywhere
        torch does.
    dim_multiple: every dimension of its operand must be a multiple of it.
    first_dim: the required first dimension; ``dim_multiple`` then applies to the others.
    dim_power_of_two: every dimension must be a power of two.
    max_dim: the largest dimension it takes.
    activations: dtypes it takes; empty for any.
    is_batch_invariant: a row's bits do not depend on the other rows of the call, nor on their number.
    packages: packages that must be importable.
    official: steps that it computes as DeepSeek's published code does.
    launches: patterns of the device kernels' names that every call launches; empty where torch's libraries launch.
    leaves_to_library: it passes calls on to torch's libraries; the variant of such a call is ``LIBRARY_VARIANT``.
    rounding: rounding of activations, for calls of ``rounds_from`` rows or more.
    rounds_weight: it may round a weight to the activations' dtype before it multiplies.
    converts_scales: MXFP4's block scales are converted to NVFP4's when loaded, which refuses what E4M3 cannot hold.
    is_default: a runner made without a chosen kernel uses it, where the device allows.
    evidence: ``None`` for the torch references, with which others are compared.
    """

    name: str
    kind: OpKind
    formats: tuple[Format, ...]
    runner: str
    layout: str
    why: str
    entry: str
    min_sm: int | None = None
    end_sm: int | None = None
    dim_multiple: int = 1
    first_dim: int | None = None
    dim_power_of_two: bool = False
    max_dim: int | None = None
    activations: tuple[str, ...] = ()
    is_batch_invariant: bool = False
    packages: tuple[str, ...] = ()
    official: frozenset[Step] = PLAIN
    launches: tuple[str, ...] = ()
    leaves_to_library: bool = False
    rounding: InputRounding = InputRounding.EXACT
    rounds_from: int = 1
    rounds_weight: bool = False
    converts_scales: bool = False
    is_default: bool = False
    evidence: Evidence | None = None

    @property
    def is_torch(self) -> bool:
        """True if torch and its libraries compute it, not a kernel of this package."""
        return not self.launches

    @property
    def is_pushed(self) -> bool:
        """True for an exchange between ranks by a kernel, which pushes into the other ranks' windows."""
        return self.kind.is_exchange and not self.is_torch

    @property
    def reads_host(self) -> bool:
        """True if a call waits for values on the host, so that no graph can hold it: torch's experts ask which experts
        were chosen, torch's decode steps how long rows are, torch's sampler which rows draw, torch's exchanges for the
        other ranks."""
        return self.is_torch and (self.kind in _HOST_READERS or self.kind.is_exchange)


_HOST_READERS = frozenset(
    {
        OpKind.MOE,
        OpKind.ENTRIES,
        OpKind.CHUNK_ENTRIES,
        OpKind.CHUNK_RINGS,
        OpKind.SELECT,
        OpKind.ATTEND,
        OpKind.ATTEND_CHUNK,
        OpKind.SAMPLE,
        OpKind.GO_ON_DRAFTING,
    }
)
_QUANTIZER_WHY = {
    Step.FP8_INPUTS: "input in E4M3 with a power-of-two scale per 1 x 128",
    Step.NVFP4_INPUTS: "input in NVFP4 with the file's input_scale",
}


def behind_quantizer(kernel: KernelSpec, step: Step) -> KernelSpec:
    """Returns the spec of a plain linear whose input is quantised and read back first, as ``step`` requires."""
    rounding = InputRounding.E4M3_POWER_OF_TWO if step is Step.FP8_INPUTS else InputRounding.NVFP4
    why = f"{_QUANTIZER_WHY[step]}, read back exactly; then {kernel.why}"
    runner = f"Quantized{kernel.runner}"
    return replace(kernel, runner=runner, official=frozenset({step}), why=why, rounding=rounding, is_default=False)
