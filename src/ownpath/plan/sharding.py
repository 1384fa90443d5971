"""Sharding: the region of each stored tensor that a rank takes, by one rule per kind of module. Pure.

Tensor parallel: rows of heads (wq_b, attn_sink) and of head groups (wo_a), columns of those groups (wo_b), rows and
columns of the experts' inner width, rows of the vocabulary. All else is whole on every rank. Cuts fall on whole heads
or groups, and on whole blocks of scales.

Example: wq_b of 64 heads of 512 is [32768, R]; of two ranks, rank 1 takes rows 16384 to 32768, and of its scales of
128 x 128 the rows 128 to 256.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import lcm

from ownpath.checkpoint.schema import Encoding, ModuleSpec, ParamSpec, PartSpec
from ownpath.config import ModelConfig, Parallel


class ShardingError(ValueError):
    """Raised for a module that cannot be cut by its rule, or whose parts no kernel adds up; the message names it."""


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

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of this region of a tensor."""
        size = self.stop - self.start
        return (*stored[: self.dim], size, *stored[self.dim + 1 :])


_RULES = (
    (r".*\.attn\.wq_b", Cut.ROWS),
    (r".*\.attn\.attn_sink", Cut.ROWS),
    (r".*\.attn\.wo_a", Cut.ROWS),
    (r".*\.attn\.wo_b", Cut.COLUMNS),
    (r".*\.ffn\.(experts\.\d+|shared_experts)\.w[13]", Cut.ROWS),
    (r".*\.ffn\.(experts\.\d+|shared_experts)\.w2", Cut.COLUMNS),
    (r"head", Cut.ROWS),
)
"""Module or parameter -> the dimension that is divided. Without a rule, every rank has the whole tensor."""


def cut_of(name: str) -> Cut | None:
    """Returns the rule of a module or parameter; ``None``: every rank has all of it."""
    return next((cut for pattern, cut in _RULES if re.fullmatch(pattern, name)), None)


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
    cut = cut_of(module.name)
    if cut is None:
        return None
    block = encoding.format.block or (1, 1)
    unit = lcm(block[cut.value], _unit(config, module.name))
    return _share(module.name, cut.value, module.shape[cut.value], unit, parallel)


def param_region(param: ParamSpec, parallel: Parallel) -> Region | None:
    """Returns a parameter's region for a rank, ``None`` for all of it."""
    cut = cut_of(param.key)
    if cut is None or parallel.size == 1:
        return None
    return _share(param.key, cut.value, param.shape[cut.value], 1, parallel)


def part_region(part: PartSpec, module: ModuleSpec, region: Region | None) -> Region | None:
    """Returns the region of one of a module's tensors (codes or block scales); ``None``: all of it."""
    if region is None or part.role in ("global_scale", "input_scale"):
        return None
    ends = []
    for end in (region.start, region.stop):
        n, k = (end, module.shape[1]) if region.dim == 0 else (module.shape[0], end)
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


def require_supported(parallel: Parallel) -> None:
    """Refuses more than one rank. Errors: ShardingError naming what is missing."""
    if parallel.size > 1:
        raise ShardingError(
            f"{parallel.size} ranks: attn.wo_b and ffn.w2 are cut by columns, so that each rank has a part of their "
            "sums, and no kernel here adds the parts up"
        )


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
