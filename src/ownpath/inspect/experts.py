"""Compares experts with the others of their layer: weights that are far larger or smaller, and uncalibrated inputs."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from statistics import median

from ownpath.checkpoint.problems import make_problem
from ownpath.finding import Finding
from ownpath.inspect.scalars import Scalar

LEAST_RATIO = 10.0
"""Ratio below which no expert is an outlier: the largest weights of one layer's sound experts differ by as much."""
FALSE_ALARM = 1e-6
"""Probability that a sound expert is called an outlier; a model has some 10^4 to 10^5 of their matrices."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""

_EXPERT = re.compile(r"((?:layers|mtp)\.\d+)\.ffn\.experts\.(\d+)\.(w[123])")


def outlier_limit(num_experts: int) -> float:
    """Returns how many robust standard deviations from the median of ``num_experts`` are too many.

    Few experts tell their own spread badly, so that the tail of Student's t with one degree of freedom fewer counts:
    P(|t| > z) is about (1 + z^2 / n)^(-n / 2), which is solved for z.
    """
    n = num_experts - 1
    return math.sqrt(n * (FALSE_ALARM ** (-2 / n) - 1))


def expert_outliers(largest_scale: Mapping[str, float], scalars: Iterable[Scalar]) -> Iterator[Finding]:
    """Yields experts whose largest block is out of its layer's range, in log.

    largest_scale: module -> its largest block scale, of modules whose scales were all read.
    """
    for (layer, projection), sizes in _sizes(largest_scale, scalars).items():
        middle, spread = _middle_and_spread(sizes.values())
        limit = max(math.log(LEAST_RATIO), outlier_limit(len(sizes)) * spread)
        for module, size in sizes.items():
            if abs(size - middle) > limit:
                ratio, allowed = math.exp(size - middle), math.exp(limit)
                where = f"its largest block is {ratio:.3g} times the median of {layer}'s {projection} experts"
                yield make_problem(
                    "expert-outlier", module, f"module {module!r}: {where} (up to {allowed:.3g} is usual)"
                )


def expert_spread(largest_scale: Mapping[str, float], scalars: Iterable[Scalar]) -> float | None:
    """Returns the largest ratio of an expert's largest block to its layer's median, either way; ``None``: none was
    read."""
    ratios = []
    for sizes in _sizes(largest_scale, scalars).values():
        middle, _ = _middle_and_spread(sizes.values())
        ratios += [math.exp(abs(size - middle)) for size in sizes.values()]
    return max(ratios, default=None)


def _sizes(largest_scale: Mapping[str, float], scalars: Iterable[Scalar]) -> dict[tuple[str, str], dict[str, float]]:
    """Groups the log of each module's largest block by (layer, projection); groups of three at least, zero matrices
    apart."""
    multipliers = {scalar.module: scalar.value for scalar in scalars if scalar.role == "global_scale"}
    groups: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for module, scale in largest_scale.items():
        match = _EXPERT.fullmatch(module)
        if match is not None and scale > 0:
            groups[match[1], match[3]][module] = math.log(scale * multipliers.get(module, 1.0))
    return {group: sizes for group, sizes in groups.items() if len(sizes) >= 3}


def _middle_and_spread(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    middle = median(listed)
    return middle, MAD_TO_SIGMA * median(abs(value - middle) for value in listed)


def uncalibrated_experts(scalars: Iterable[Scalar]) -> Iterator[Finding]:
    """Yields experts whose ``input_scale`` is 1: the value that tools fill in where nothing was measured.

    A matrix of zeros has 1 for both of its scales, and needs none.
    """
    listed = list(scalars)
    zeros = {scalar.module for scalar in listed if scalar.role == "global_scale" and scalar.value == 1}
    for scalar in listed:
        if scalar.role == "input_scale" and scalar.value == 1 and scalar.module not in zeros:
            message = f"tensor {scalar.key!r}: input scale is exactly 1, a default and no measurement"
            yield make_problem("uncalibrated-expert", scalar.key, message)
