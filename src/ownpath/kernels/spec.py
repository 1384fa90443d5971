"""What a kernel says of itself: everything that plan, runners, trace, verify, bench and docs ask about it.

Each family of kernels is a folder with a ``spec.py`` whose ``SPECS`` lists its kernels, best first. Importing a spec
imports no torch and touches no device.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from ownpath.formats import Format
from ownpath.official import PLAIN, Step
from ownpath.ops import OpKind


class InputRounding(StrEnum):
    """What a kernel multiplies in place of its activations."""

    EXACT = "exact"
    """The activations themselves: W4A16 and W8A16."""
    E4M3 = "e4m3_1x128"
    """E4M3 with a scale per 1 x 128, a power of two where the weight's scales are."""
    E4M3_POWER_OF_TWO = "e4m3_1x128_power_of_two"
    """E4M3 with a power-of-two scale per 1 x 128, whatever the weight's scales are."""
    NVFP4 = "nvfp4_1x16"
    """E2M1 with an E4M3 scale per 1 x 16 and the checkpoint's calibrated ``input_scale``."""


@dataclass(frozen=True)
class Evidence:
    """Where a kernel is held to its twin, and where it is measured. Paths are relative to the repository.

    twin: the torch function that defines what it computes, as ``module:function`` in ``ownpath.kernels``.
    """

    twin: str
    test: str
    bench: str


@dataclass(frozen=True)
class KernelSpec:
    """One kernel's contract.

    name: how plans, ledgers and reports name it.
    formats: stored formats it takes; empty for an op without a stored matrix.
    runner: how plans name the runner around it.
    why: what it does, in the plan's words.
    entry: where its ``Kernel`` is, as ``module:attribute`` in ``ownpath.kernels``.
    min_sm, end_sm: lowest compute capability times ten, and the first that is too new; ``None`` runs anywhere
        torch does.
    dim_multiple: every dimension of its operand must be a multiple of it.
    first_dim: what the first dimension must be; the multiple is asked of the others then.
    dim_power_of_two: every dimension must be a power of two.
    activations: dtypes it takes; empty for any.
    is_batch_invariant: a row's bits do not depend on the other rows of the call, nor on their number.
    packages: what must be importable.
    official: the steps that it computes as DeepSeek's published code does.
    launches: patterns of the names of the device kernels that every call launches; empty where torch's libraries do.
    rounding: what it multiplies in place of its activations, from ``rounds_from`` rows of a call on.
    rounds_weight: it may bring a weight to the activations' dtype before it multiplies.
    is_default: what a runner takes where its device allows it and nobody chose a kernel.
    evidence: ``None`` for the torch references, which are what others are held to.
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
    activations: tuple[str, ...] = ()
    is_batch_invariant: bool = False
    packages: tuple[str, ...] = ()
    official: frozenset[Step] = PLAIN
    launches: tuple[str, ...] = ()
    rounding: InputRounding = InputRounding.EXACT
    rounds_from: int = 1
    rounds_weight: bool = False
    is_default: bool = False
    evidence: Evidence | None = None

    @property
    def is_torch(self) -> bool:
        """Whether torch and its libraries compute it, rather than a kernel of this package."""
        return not self.launches


_QUANTIZER_WHY = {
    Step.FP8_INPUTS: "input in E4M3 with a power-of-two scale per 1 x 128",
    Step.NVFP4_INPUTS: "input in NVFP4 with the file's input_scale",
}


def behind_quantizer(kernel: KernelSpec, step: Step) -> KernelSpec:
    """A linear of plain numerics whose input is quantised first and read back, as ``step`` asks for."""
    rounding = InputRounding.E4M3_POWER_OF_TWO if step is Step.FP8_INPUTS else InputRounding.NVFP4
    why = f"{_QUANTIZER_WHY[step]}, read back exactly; then {kernel.why}"
    runner = f"Quantized{kernel.runner}"
    return replace(kernel, runner=runner, official=frozenset({step}), why=why, rounding=rounding, is_default=False)
