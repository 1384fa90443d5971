"""Plans the products of a model that one rank of another engine leaves to us. Pure.

The engine names slots and the share of each that this rank has: it divides, and adds up what its ranks computed. Each
slot is planned by itself, because the engine calls each by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import ONE_RANK, Parallel
from ownpath.plan.opspec import model_ops
from ownpath.plan.plan import Plan
from ownpath.plan.planner import Planner


@dataclass(frozen=True)
class RankShare:
    """A rank's part of a slot's product.

    parallel: its part of each matrix, by the rules of ``sharding``. experts: the ids of the experts that it has, in
    the order in which the engine counts them here; ``None``: all.
    """

    parallel: Parallel = ONE_RANK
    experts: tuple[int, ...] | None = None


def plan_part(whole: Plan, index: CheckpointIndex, shares: Mapping[str, RankShare]) -> Plan:
    """Plans the slots of ``shares`` and nothing else. whole: the plan of the whole checkpoint, which has checked it.

    Errors: PlanError, and ShardingError for a share that cuts through a head, a group or a block of scales.
    """
    ops = []
    for spec in model_ops(whole.config):
        if spec.slot in shares:
            share = shares[spec.slot]
            planner = Planner(whole.config, index, whole.caps, whole.demands, share.parallel)
            ops += planner.apart(spec.of_experts(share.experts))
    return replace(whole, ops=tuple(ops), companions=(), params=(), caches=())
