"""Tables of an inspection: modules that are stored alike share a row."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.plan.census import Census
from ownpath.plan.show import ranges

_MODULE = re.compile(r"(layers|mtp)\.(\d+)\.(?:ffn\.experts\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class ModuleRow:
    """Modules of one name in all their layers and experts, stored in one encoding and shape."""

    modules: str
    encoding: str
    format: str
    shape: tuple[int, int]
    num_modules: int
    num_bytes: int


def module_rows(census: Census, index: CheckpointIndex) -> list[ModuleRow]:
    """Returns rows in forward order; ``layers.{0-42}.ffn.experts.{0-255}.w1`` stands for all those modules."""
    groups: dict[tuple[object, ...], list[tuple[int, int, int]]] = {}
    for stored in census.modules:
        name, stack, layer_idx, expert = stored.spec.name, "", -1, -1
        match = _MODULE.fullmatch(name)
        if match is not None:
            stack, layer_idx, expert, name = match[1], int(match[2]), int(match[3] or -1), match[4]
        kind = (name, expert >= 0, stack, stored.encoding.name, str(stored.encoding.format), stored.spec.shape)
        groups.setdefault(kind, []).append((layer_idx, expert, stored.num_bytes(index)))
    return [_row(kind, members) for kind, members in groups.items()]


def _row(kind: tuple[object, ...], members: list[tuple[int, int, int]]) -> ModuleRow:
    name, is_expert, stack, encoding, format_name, shape = kind
    assert isinstance(shape, tuple)
    title = str(name)
    if is_expert:
        title = f"ffn.experts.{ranges(tuple(sorted({expert for _, expert, _ in members})))}.{title}"
    if stack:
        title = f"{stack}.{ranges(tuple(sorted({layer_idx for layer_idx, _, _ in members})))}.{title}"
    num_bytes = sum(size for _, _, size in members)
    return ModuleRow(title, str(encoding), str(format_name), shape, len(members), num_bytes)


def bytes_by_format(census: Census, index: CheckpointIndex) -> dict[str, int]:
    """Sums stored bytes of modules by format, of the other tensors by dtype, and of those that are not read."""
    sizes: Counter[str] = Counter()
    for stored in census.modules:
        sizes[str(stored.encoding.format)] += stored.num_bytes(index)
    for param in census.params:
        sizes[f"other {index[param.key].dtype}"] += index[param.key].num_bytes
    for key in census.ignored:
        sizes["not read"] += index[key].num_bytes
    return dict(sizes)


def num_parameters(census: Census, index: CheckpointIndex) -> int:
    """Counts the numbers that are read, once each: packed codes by the values they stand for, without scales and id
    tables."""
    tables = (param.shape for param in census.params if "I64" not in param.dtypes)
    return sum(prod(stored.spec.shape) for stored in census.modules) + sum(map(prod, tables))
