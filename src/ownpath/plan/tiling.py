"""Checks that the plans of all ranks together hold a checkpoint: every stored element belongs to exactly one rank, or
to every rank where that is the rule. Pure: no rank asks another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ownpath.plan.plan import Plan
from ownpath.plan.sharding import Region, is_replicated

_NOTHING = Region(-1, 0, 0)
Owners = tuple[Region | None, ...]
"""Each rank's region of a tensor: ``None`` for all of it, ``_NOTHING``."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that a plan names. is_replicated: the rule is that every rank has all of it."""

    key: str
    shape: tuple[int, ...]
    is_replicated: bool


def tiling_faults(plans: Sequence[Plan]) -> list[str]:
    """Lists the tensors that the plans of all ranks, in their order, do not hold as they should; a sentence each.

    Tensors of one shape that are held alike are looked at once: a model has 10^5 of them and few kinds.
    """
    held = [held_regions(plan) for plan in plans]
    tensors = {tensor.key: tensor for tensor in planned_tensors(plans[0])}
    faults = [f"rank {plan.parallel.rank} is at place {n}" for n, plan in enumerate(plans) if plan.parallel.rank != n]
    for rank, regions in enumerate(held):
        faults += [f"tensor {key!r}: rank {rank} alone plans it" for key in regions if key not in tensors]
    known: dict[object, list[str]] = {}
    for key, tensor in tensors.items():
        owners = tuple(regions.get(key, _NOTHING) for regions in held)
        kind = tensor.shape, tensor.is_replicated, owners
        if kind not in known:
            known[kind] = list((_replica_faults if tensor.is_replicated else _tile_faults)(tensor.shape, owners))
        faults += [f"tensor {key!r}: {fault}" for fault in known[kind]]
    return faults


def planned_tensors(plan: Plan) -> Iterator[PlannedTensor]:
    """Yields every tensor that some rank of a plan reads."""
    for op in plan.ops:
        for module in (*op.spec.modules, *op.elsewhere):
            for key, part in zip(op.encoding.keys(module.name), op.encoding.parts, strict=True):
                replicated = is_replicated(module.name, plan.parallel, part.role)
                yield PlannedTensor(key, part.shape(*module.shape), replicated)
    for param in plan.params:
        yield PlannedTensor(param.key, param.shape, is_replicated(param.key, plan.parallel))


def held_regions(plan: Plan) -> dict[str, Region | None]:
    """Returns what the plan's rank reads, by key; ``None``: all of the tensor."""
    held: dict[str, Region | None] = {param.key: plan.param_regions.get(param.key) for param in plan.params}
    for op in plan.ops:
        held |= op.regions_by_key
    return held


def _replica_faults(shape: tuple[int, ...], owners: Owners) -> Iterator[str]:
    for rank, region in enumerate(owners):
        if region is not None:
            what = "nothing" if region is _NOTHING else str(region)
            yield f"rank {rank} has {what} of it, and every rank should have all"


def _tile_faults(shape: tuple[int, ...], owners: Owners) -> Iterator[str]:
    """Walks along the dimension that is cut."""
    found = {rank: region for rank, region in enumerate(owners) if region is not _NOTHING}
    whole = [rank for rank, region in found.items() if region is None]
    regions = [(region, rank) for rank, region in found.items() if region is not None]
    if whole:
        if len(found) > 1:
            yield f"rank {whole[0]} has all of it, and ranks {', '.join(map(str, found))} have some"
        return
    if len({region.dim for region, _ in regions}) != 1:
        yield "ranks cut it along different dimensions" if regions else "no rank has it"
        return
    dim, end = regions[0][0].dim, 0
    for region, rank in sorted(regions, key=lambda item: item[0].start):
        if region.start < end:
            yield f"rank {rank}'s {region} are another rank's too"
        elif region.start > end:
            yield f"{Region(dim, end, region.start)} are no rank's"
        end = max(end, region.stop)
    if end < shape[dim]:
        yield f"{Region(dim, end, shape[dim])} are no rank's"
