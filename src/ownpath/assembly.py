"""From a plan to what runs: weights in the planned layouts, their runners, and the builder of the model's modules.

The plan may be a whole model's or that of some of its slots: serving and verifying assemble alike.
"""

from dataclasses import dataclass

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig
from ownpath.model.build import Builder
from ownpath.plan.plan import Plan
from ownpath.runners import Runner
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.trace import Ledger
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.memory import reserve
from ownpath.weights.operands import Allocate
from ownpath.weights.readers import LoadProgress


@dataclass(frozen=True)
class LoadedPart:
    """The slots of a plan, ready to run. weights: as loaded; runners that repack do so in place."""

    plan: Plan
    weights: LoadedWeights
    builder: Builder

    @property
    def runners(self) -> dict[str, Runner]:
        """Of the plan's products, by slot."""
        return self.builder.runners

    @property
    def ledger(self) -> Ledger:
        return self.builder.ledger


def load_part(
    plan: Plan,
    index: CheckpointIndex,
    engine: EngineConfig,
    progress: LoadProgress | None = None,
    allocate: Allocate = reserve,
) -> LoadedPart:
    """Loads what a plan names and assembles it. Errors: as ``load_weights`` and ``make_runners``."""
    return assemble(plan, engine, load_weights(plan, index, torch.device(engine.device), progress, allocate=allocate))


def assemble(plan: Plan, engine: EngineConfig, weights: LoadedWeights) -> LoadedPart:
    """Puts weights into their kernels' layouts, compiles what the cache lacks. Errors: as ``make_runners``."""
    runners = make_runners(plan, weights.operands)
    compile_kernels(runners.values())
    specs = {companion.spec.slot: companion.choice.kernel for companion in plan.companions}
    return LoadedPart(plan, weights, Builder(plan.config, engine, runners, specs, weights.params, Ledger(plan.slots)))
