"""A few of many configurations for `make test`; the others are marked slow, and `make test-slow` has them all.

What is kept has every value of every field, and every combination of flags, which is a form of a kernel's code. What it
gives up are other combinations of sizes: a register too many in one of those alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest


def features(config: Any) -> Iterator[tuple[object, ...]]:
    """The values of a configuration's fields, a tuple's one by one, and its flags together."""
    fields = vars(config)
    yield (type(config), *(name for name, value in fields.items() if value is True))
    for name, value in fields.items():
        for one in value if isinstance(value, tuple) else (value,):
            yield type(config), name, one


def covering(configs: Sequence[Any]) -> list[Any]:
    """The fewest that a greedy choice finds, in their order: each next one has most of what is not covered yet."""
    wanted = {feature for config in configs for feature in features(config)}
    chosen: list[Any] = []
    while wanted:
        best = max(configs, key=lambda config: len(wanted.intersection(features(config))))
        chosen.append(best)
        wanted.difference_update(features(best))
    return [config for config in configs if config in chosen]


def slow_beside(kept: Sequence[Any], configs: Iterable[Any]) -> list[Any]:
    """Parameters of a test: all of them, and those that are not kept are slow."""
    return [config if config in kept else pytest.param(config, marks=pytest.mark.slow) for config in configs]
