"""Checks scalar scales: valid as multipliers, consistent with their neighbours, calibrated or filled in."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.scales import scale_fault
from ownpath.finding import Finding
from ownpath.inspect.tensor_bytes import read_values
from ownpath.plan.census import StoredModule

MAX_RATIO = 1000.0
"""Largest factor between a scale and the median of its layer's experts, either way: three decades. Experts of one
layer start alike and see the same hidden states; their largest values differ by a factor of ten, not of a thousand."""

SMALLEST_NORMAL = 2.0**-126
"""Smallest normal float32: below it, a scale is an integer's bits, or a value that underflowed."""

_SCALARS = ("global_scale", "input_scale")
_EXPERT = re.compile(r"((?:layers|mtp)\.\d+)\.ffn\.experts\.(\d+)\.(w[123])")


@dataclass(frozen=True)
class Scalar:
    """One scalar scale of a module. role: ``global_scale`` or ``input_scale``. value: the multiplier that it means."""

    module: str
    role: str
    key: str
    value: float


@dataclass(frozen=True)
class Coverage:
    """Counts of routed experts' matrices by ``input_scale``: a value of their own, or the maximum given to the
    uncalibrated."""

    num_own: int
    num_shared: int


@dataclass(frozen=True)
class GateUp:
    """Pairs of w1 and w3 of one expert, and how many share a global scale."""

    num_pairs: int
    num_equal: int


def read_scalars(
    modules: Iterable[StoredModule], index: CheckpointIndex, broken: frozenset[Path], problems: list[Finding]
) -> tuple[Scalar, ...]:
    """Reads every scalar scale of ``modules``; those that cannot be multipliers are added to ``problems``."""
    owners = {}
    for stored in modules:
        for part in stored.encoding.parts:
            if part.role in _SCALARS:
                owners[f"{stored.spec.name}.{part.suffix}"] = (stored.spec.name, part)
    scalars = []
    for info, data in read_values((index[key] for key in owners), broken, problems):
        module, part = owners[info.name]
        value = float(torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype])[0])
        fault = scale_fault(value, part.is_divisor)
        meant = 1 / value if part.is_divisor and value else value
        kind = None if fault is None else fault[0] if part.role == "global_scale" else "input-scale"
        if fault is None and meant < SMALLEST_NORMAL:
            fault = "", f"scale is {value}, an integer's bits or an underflow by its size"
            kind = "scalar-scale" if part.role == "global_scale" else "out-of-band-scale"
        if fault is not None and kind is not None:
            problems.append(make_problem(kind, info.name, f"tensor {info}: {fault[1]}"))
        else:
            scalars.append(Scalar(module, part.role, info.name, meant))
    return tuple(scalars)


def out_of_band(scalars: Iterable[Scalar]) -> Iterator[Finding]:
    """Yields experts' scales that are ``MAX_RATIO`` away from their layer's median; 1.0 is the scale of a matrix of
    zeros."""
    for (role, layer, projection), group in _by_layer(scalars).items():
        middle = median(scalar.value for scalar in group)
        for scalar in group:
            if not middle / MAX_RATIO <= scalar.value <= middle * MAX_RATIO and scalar.value != 1:
                where = f"{layer}'s {projection} experts have a median {role} of {middle:.3g}"
                message = f"tensor {scalar.key!r}: scale is {scalar.value:.3g}; {where}"
                yield make_problem("out-of-band-scale", scalar.key, message)


def farthest_from_median(scalars: Iterable[Scalar]) -> float:
    """Returns the largest factor between an expert's scale and its layer's median, either way; 1 without experts."""
    factors = [1.0]
    for group in _by_layer(scalars).values():
        middle = median(scalar.value for scalar in group)
        factors += [max(scalar.value / middle, middle / scalar.value) for scalar in group if scalar.value != 1]
    return max(factors)


def calibration(scalars: Iterable[Scalar]) -> dict[str, Coverage]:
    """Counts, per projection, the experts that share the maximum ``input_scale`` of their layer, or of all layers.

    Exporters give that maximum to experts that no calibration token reached; the expert it was measured on has it
    too, so that one of each group of sharers is calibrated.
    """
    by_projection: dict[str, list[list[float]]] = defaultdict(list)
    for (role, _, projection), group in _by_layer(scalars).items():
        if role == "input_scale":
            by_projection[projection].append([scalar.value for scalar in group])
    return {projection: _coverage(layers) for projection, layers in sorted(by_projection.items())}


def _coverage(layers: list[list[float]]) -> Coverage:
    values = [value for layer in layers for value in layer]
    overall = max(values)
    is_global_fill = values.count(overall) > 1
    num_shared = 0
    for layer in layers:
        highest = max(layer)
        if layer.count(highest) > 1 or (is_global_fill and highest == overall):
            num_shared += layer.count(highest)
    return Coverage(len(values) - num_shared, num_shared)


def gate_up(scalars: Iterable[Scalar], problems: list[Finding]) -> GateUp:
    """Compares the global scales of each expert's w1 and w3; pairs that differ are added to ``problems``."""
    global_scales = {scalar.module: scalar for scalar in scalars if scalar.role == "global_scale"}
    num_pairs = num_equal = 0
    for module, gate in global_scales.items():
        match = _EXPERT.fullmatch(module)
        up = global_scales.get(module.removesuffix("w1") + "w3")
        if match is None or match[3] != "w1" or up is None:
            continue
        num_pairs += 1
        num_equal += gate.value == up.value
        if gate.value != up.value:
            message = f"tensor {gate.key!r} is {gate.value:.6g}, but {up.key!r} is {up.value:.6g}"
            problems.append(make_problem("gate-up-scale", module.removesuffix(".w1"), message))
    return GateUp(num_pairs, num_equal)


def _by_layer(scalars: Iterable[Scalar]) -> dict[tuple[str, str, str], list[Scalar]]:
    groups: dict[tuple[str, str, str], list[Scalar]] = defaultdict(list)
    for scalar in scalars:
        match = _EXPERT.fullmatch(scalar.module)
        if match is not None:
            groups[scalar.role, match[1], match[3]].append(scalar)
    return groups
