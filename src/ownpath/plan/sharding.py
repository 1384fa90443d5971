"""Sharding: the region of each stored tensor that a rank takes, by one rule per kind of module. Pure.

| module | what divides it | cut |
|---|---|---|
| wq_b, attn_sink; wo_a; wo_b | attention by heads | rows of heads; rows of groups of heads; columns of those groups |
| experts' w1 and w3; w2 | experts by width | rows; columns |
| experts | experts by ids | each whole, on one rank |
| the shared expert's w1 and w3; w2 | attention by heads | rows; columns |
| head | always | rows |
| all else | nothing | whole on every rank: low-rank products, compressors, the indexer, the gate, norms, embedding |

The indexer's scores are sums over its heads: cut, it would exchange a score for every entry. Cuts fall on whole heads
or groups, and on whole blocks of scales. Block scales follow their matrix; scalars are whole wherever their matrix is.

Example: wq_b of 64 heads of 512 is [32768, R]; of two ranks, rank 1 takes rows 16384 to 32768, and of its scales of
128 x 128 the rows 128 to 256.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import lcm

from ownpath.checkpoint.schema import Encoding, ModuleSpec, ParamSpec, PartSpec
from ownpath.config import ONE_RANK, ModelConfig, Parallel
from ownpath.splits import AttentionSplit, ExpertSplit


class ShardingError(ValueError):
    """Raised for a module that cannot be divided by its rule; the message names it and its sizes."""


SCALARS = ("global_scale", "input_scale")
"""Roles of a module's tensors that hold one number."""


class Cut(Enum):
    """The dimension of a weight [out, in] that is divided among ranks."""

    ROWS = 0
    COLUMNS = 1


@dataclass(frozen=True)
class Region:
    """Indices [start, stop) of one dimension of a stored tensor; other dimensions are whole."""

    dim: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{'rows' if self.dim == 0 else 'columns'} {self.start} to {self.stop}"

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of this region of a tensor."""
        size = self.stop - self.start
        return (*stored[: self.dim], size, *stored[self.dim + 1 :])


class Divided(Enum):
    """The condition of a rule: its cut is made where ranks divide this."""

    HEADS = "attention by heads"
    WIDTH = "experts by width"
    VOCABULARY = "the vocabulary"

    def is_cut(self, parallel: Parallel) -> bool:
        """Returns True if these ranks divide it."""
        if self is Divided.HEADS:
            return parallel.attention is AttentionSplit.HEADS
        return self is Divided.VOCABULARY or parallel.experts is ExpertSplit.WIDTH


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = r".*\.ffn\.experts\.\d+"
_RULES = (
    (r".*\.attn\.wq_b", Cut.ROWS, Divided.HEADS),
    (r".*\.attn\.attn_sink", Cut.ROWS, Divided.HEADS),
    (r".*\.attn\.wo_a", Cut.ROWS, Divided.HEADS),
    (r".*\.attn\.wo_b", Cut.COLUMNS, Divided.HEADS),
    (r".*\.ffn\.shared_experts\.w[13]", Cut.ROWS, Divided.HEADS),
    (r".*\.ffn\.shared_experts\.w2", Cut.COLUMNS, Divided.HEADS),
    (rf"{_EXPERT}\.w[13]", Cut.ROWS, Divided.WIDTH),
    (rf"{_EXPERT}\.w2", Cut.COLUMNS, Divided.WIDTH),
    (r"head", Cut.ROWS, Divided.VOCABULARY),
)
"""Module or parameter -> the dimension that is cut, and where. Without a rule, every rank has the whole tensor."""


def cut_of(name: str, parallel: Parallel = ONE_RANK) -> Cut | None:
    """Returns how a module or parameter is cut where these ranks divide it; ``None``: whoever has it has all of it."""
    found = _rule_of(_NUMBER.sub("0", name))
    return None if found is None or not found[1].is_cut(parallel) else found[0]


@cache
def _rule_of(name: str) -> tuple[Cut, Divided] | None:
    """Returns the rule of a name. Layers and experts in it have the number 0: of 10^5 names there are few kinds."""
    found = ((cut, divided) for pattern, cut, divided in _RULES if re.fullmatch(pattern, name))
    return next(found, None)


def is_replicated(name: str, parallel: Parallel, role: str = "") -> bool:
    """Returns True if every rank has all of a tensor of a module in this role, or of a parameter."""
    if parallel.experts is ExpertSplit.IDS and ".ffn.experts." in name:
        return parallel.size == 1
    return role in SCALARS or cut_of(name, parallel) is None or parallel.size == 1


def held_experts(slot: str, count: int, parallel: Parallel) -> tuple[int, ...] | None:
    """Returns the experts that a rank has, whole; ``None``: it has all, or a part of each.

    Errors: ShardingError naming the slot, for experts that do not divide into ranks.
    """
    if parallel.size == 1 or parallel.experts is ExpertSplit.WIDTH:
        return None
    if count % parallel.size:
        raise ShardingError(f"{slot}: {count} experts do not divide into {parallel.size} ranks")
    return tuple(parallel.share(count))


def regions_of(
    config: ModelConfig, modules: Sequence[ModuleSpec], encoding: Encoding, parallel: Parallel
) -> tuple[Region | None, ...]:
    """Returns each weight's [out, in] region for a rank, ``None`` for all of it; empty if every weight is whole.

    Errors: ShardingError naming the module, for a size that does not divide into whole units.
    """
    if parallel.size == 1:
        return ()
    return tuple(_module_region(config, module, encoding, parallel) for module in modules)


def _module_region(config: ModelConfig, module: ModuleSpec, encoding: Encoding, parallel: Parallel) -> Region | None:
    cut = cut_of(module.name, parallel)
    if cut is None:
        return None
    return _cut_region(module, cut, encoding, parallel, _unit(config, module.name))


def expert_region(module: ModuleSpec, encoding: Encoding, parallel: Parallel) -> Region | None:
    """Returns a rank's [out, in] region of an expert's or the shared expert's w1, w2 or w3; ``None`` for all of it.

    Errors: ShardingError naming the module, for a size that does not divide into whole blocks of scales.
    """
    cut = cut_of(module.name, parallel)
    return None if cut is None or parallel.size == 1 else _cut_region(module, cut, encoding, parallel)


def _cut_region(module: ModuleSpec, cut: Cut, encoding: Encoding, parallel: Parallel, unit: int = 1) -> Region:
    """unit: the number of rows or columns that stay together."""
    block = encoding.format.block or (1, 1)
    return _share(module.name, cut.value, module.shape[cut.value], lcm(block[cut.value], unit), parallel)


def require_whole_blocks(modules: Sequence[ModuleSpec], regions: Sequence[Region | None], block: int) -> None:
    """Checks that cuts of columns fall on whole blocks of an input that is quantised. Errors: ShardingError."""
    for module, region in zip(modules, regions, strict=False):
        if region is not None and region.dim == Cut.COLUMNS.value and (region.stop - region.start) % block:
            cut = f"{module.shape[1]} columns, {region.stop - region.start} of them a rank's"
            raise ShardingError(f"{module.name}: {cut}, divide no input that is quantised in blocks of {block}")


def param_region(param: ParamSpec, parallel: Parallel) -> Region | None:
    """Returns a parameter's region for a rank, ``None`` for all of it."""
    cut = cut_of(param.key, parallel)
    if cut is None or parallel.size == 1:
        return None
    return _share(param.key, cut.value, param.shape[cut.value], 1, parallel)


def part_region(part: PartSpec, module: ModuleSpec, region: Region | None) -> Region | None:
    """Returns the region of one of a module's tensors (codes or block scales); ``None``: all of it."""
    return None if region is None or part.role in SCALARS else _part_region(part, module.shape, region)


@cache
def _part_region(part: PartSpec, shape: tuple[int, int], region: Region) -> Region:
    ends = []
    for end in (region.start, region.stop):
        n, k = (end, shape[1]) if region.dim == 0 else (shape[0], end)
        ends.append(part.shape(n, k)[region.dim])
    return Region(region.dim, *ends)


def local_module(module: ModuleSpec, region: Region | None) -> ModuleSpec:
    """Returns a module with a rank's shape."""
    if region is None:
        return module
    rows, columns = region.shape(module.shape)
    return ModuleSpec(module.name, (rows, columns))


def local_modules(modules: tuple[ModuleSpec, ...], regions: tuple[Region | None, ...]) -> tuple[ModuleSpec, ...]:
    """Returns modules with a rank's shapes. regions: one for each; empty where every module is whole."""
    return tuple(map(local_module, modules, regions)) if regions else modules


def _unit(config: ModelConfig, name: str) -> int:
    """Returns the number of rows or columns that stay together: a head's of wq_b, a group's of wo_a and wo_b."""
    units = {"wq_b": config.head_dim, "wo_a": config.o_lora_rank, "wo_b": config.o_lora_rank}
    return units.get(name.rpartition(".")[2], 1)


def _share(name: str, dim: int, size: int, unit: int, parallel: Parallel) -> Region:
    share = size // parallel.size
    if size % parallel.size or share % unit:
        kind = "columns" if dim else "rows"
        raise ShardingError(f"{name}: {size} {kind} do not divide into {parallel.size} ranks of whole {unit}s")
    return Region(dim, parallel.rank * share, (parallel.rank + 1) * share)
