"""Assembles a plan: loads weights into the planned layouts, makes their runners and the builder of the model's modules.

The plan may cover a whole model or some of its slots. Serving and verifying both assemble through this module.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig
from ownpath.model.build import ALONE, Builder
from ownpath.plan.plan import Plan
from ownpath.ranks.peers import Peers
from ownpath.runners import Runner
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.trace import Ledger
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.operands import Allocate, reserve
from ownpath.weights.readers import LoadProgress, ReadOptions

if TYPE_CHECKING:
    from ownpath.kernels.exchange.window import Window


@dataclass(frozen=True)
class LoadedPart:
    """A plan's slots, ready to run. weights: as loaded; a runner that repacks does so in these buffers."""

    plan: Plan
    weights: LoadedWeights
    builder: Builder

    @property
    def runners(self) -> dict[str, Runner]:
        """The products' runners, by slot."""
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
    peers: Peers = ALONE,
    window: "Window | None" = None,
) -> LoadedPart:
    """Loads what a plan names and assembles it. peers: the ranks that run the plan together; window: this one's.
    Errors: as ``load_weights`` and ``make_runners``."""
    device = torch.device(engine.device)
    read_options = ReadOptions.for_device(device, engine.parallel.size)
    return assemble(plan, engine, load_weights(plan, index, device, progress, read_options, allocate), peers, window)


def assemble(
    plan: Plan, engine: EngineConfig, weights: LoadedWeights, peers: Peers = ALONE, window: "Window | None" = None
) -> LoadedPart:
    """Repacks weights into their kernels' layouts and compiles what the cache lacks. Errors: as ``make_runners``."""
    runners = make_runners(plan, weights.operands)
    compile_kernels(runners.values())
    specs = {companion.spec.slot: companion.choice.kernel for companion in plan.companions}
    builder = Builder(plan.config, engine, runners, specs, weights.params, Ledger(plan.slots), peers, window)
    return LoadedPart(plan, weights, builder)
