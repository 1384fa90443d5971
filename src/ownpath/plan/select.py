"""Selects the kernel of an op from the specs: a Choice, or a Refusal with the reasons."""

from dataclasses import dataclass

from ownpath.formats import CacheFormat, Format
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import InputRounding, KernelSpec
from ownpath.official import PLAIN, Step, numerics_name
from ownpath.ops import OpKind


@dataclass(frozen=True)
class Caps:
    """A device's capabilities. sm: CUDA compute capability times ten, ``None`` off CUDA.

    packages: the kernel toolchains that can be imported.
    """

    device_type: str
    name: str
    sm: int | None = None
    packages: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Demands:
    """The engine's requirements on every kernel.

    activations: name of the activations' dtype.
    is_batch_invariant: a row's bits must not depend on the other rows of the call, nor on their number.
    official: steps to compute as DeepSeek's published code does.
    reference: names of slots or modules, with ``*`` for any text, that torch computes from the stored form.
    cache_format: the format of keys in the caches.
    """

    activations: str = "float32"
    is_batch_invariant: bool = False
    official: frozenset[Step] = PLAIN
    reference: frozenset[str] = frozenset()
    cache_format: CacheFormat = CacheFormat.BF16


@dataclass(frozen=True)
class Choice:
    """The kernel of an op, and why; ``passed_over``: why each better kernel for the same format cannot run it."""

    kernel: KernelSpec
    why: str
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """The result when no kernel can run an op; ``reason`` says what each candidate lacks."""

    reason: str


REFERENCES = tuple(spec for spec in SPECS if spec.evidence is None and not spec.converts_scales)
"""The torch references that read what is stored, without a conversion that could refuse it."""


def select(
    kind: OpKind,
    stored: Format | None,
    caps: Caps,
    specs: tuple[KernelSpec, ...] = SPECS,
    demands: Demands | None = None,
    dims: tuple[int, ...] = (),
    steps: frozenset[Step] = PLAIN,
    no_input_scale: str = "",
) -> Choice | Refusal:
    """Selects the first of the specs (best first) that can run ``kind`` on weights of format ``stored``.

    stored: ``None`` for a companion. dims: the op's sizes, where a kernel's tiles constrain them.
    steps: the op's steps whose numerics can be chosen; the kernel computes exactly the demanded ones officially.
    no_input_scale: the calibrated scale of the input that is not there, in words; empty where all are.
    """
    demands = demands or Demands()
    official = steps & demands.official
    lacks: list[str] = []
    passed_over: list[str] = []
    for kernel in specs:
        if kernel.kind is not kind:
            continue
        if kernel.official - official:
            continue  # rounds where it was not demanded
        lack = _lack(kernel, stored, caps, demands, dims)
        if lack is None and no_input_scale and kernel.rounding is InputRounding.NVFP4:
            lack = f"quantises its input and needs the scale of it: {no_input_scale}"
        if lack is None and kernel.official != official:
            lack = f"computes {numerics_name(official - kernel.official)} as plain numerics do"
        if lack is None:
            return Choice(kernel, kernel.why, tuple(passed_over))
        lacks.append(f"{kernel.name} {lack}")
        if stored is None or stored in kernel.formats:
            passed_over.append(lacks[-1])
    for_what = f" for {stored}" if stored is not None else ""
    return Refusal(f"no {kind} kernel{for_what}: " + "; ".join(lacks))


def _lack(kernel: KernelSpec, stored: Format | None, caps: Caps, demands: Demands, dims: tuple[int, ...]) -> str | None:
    """Returns the reason why a kernel cannot run an op, or ``None`` if it can."""
    if stored is not None and stored not in kernel.formats:
        return f"takes {'/'.join(map(str, kernel.formats))}"
    if kernel.min_sm is not None and (caps.sm is None or caps.sm < kernel.min_sm):
        return f"needs sm_{kernel.min_sm}, this is {caps.name}"
    if kernel.end_sm is not None and caps.sm is not None and caps.sm >= kernel.end_sm:
        return f"is made for sm_{kernel.min_sm}, this is {caps.name}"
    missing = [package for package in kernel.packages if package not in caps.packages]
    if missing:
        return f"needs the package {missing[0]}"
    if kernel.activations and demands.activations not in kernel.activations:
        return f"takes {'/'.join(kernel.activations)} activations, not {demands.activations}"
    if demands.is_batch_invariant and not kernel.is_batch_invariant:
        return "is not batch-invariant"
    if kernel.first_dim is not None and dims and dims[0] != kernel.first_dim:
        return f"needs a first dimension of {kernel.first_dim}, not {dims[0]}"
    uneven = [size for size in dims[kernel.first_dim is not None :] if size % kernel.dim_multiple]
    if uneven:
        return f"needs dimensions that are multiples of {kernel.dim_multiple}, not {uneven[0]}"
    if kernel.max_dim is not None and dims and max(dims) > kernel.max_dim:
        return f"takes dimensions up to {kernel.max_dim}, not {max(dims)}"
    if kernel.dim_power_of_two and any(size & (size - 1) for size in dims):
        return f"needs powers of two, not {next(size for size in dims if size & (size - 1))}"
    return None
