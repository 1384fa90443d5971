"""The kernels of experts of which a rank has only some: with an expert map they are others, compiled at start too."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from ownpath.config import ModelConfig
from ownpath.kernels.contract import Config
from ownpath.plan.part import RankShare
from ownpath.runners import Runner
from ownpath.runners.moe import MoeRunner

TOKEN_COUNTS = (*range(1, 65), *range(72, 1025, 8), *range(1536, 8193, 512))
"""Rows of calls that together launch every kernel that a call of up to 8,192 rows may; a test holds that."""


@runtime_checkable
class MapsExperts(Protocol):
    """A kernel of experts that has forms of its own for calls through a map."""

    def mapped_configs(self, pairs: int, operand: object, num_ids: int) -> Iterable[Config]:
        """Returns the configurations of a call with int32 ids, as the engine's router gives, through a map."""


def mapped_configs(
    runners: Mapping[str, Runner], shares: Mapping[str, RankShare], config: ModelConfig
) -> Iterator[Config]:
    """Yields the configurations that experts with a map may launch: of those slots whose share names experts."""
    for slot, runner in runners.items():
        if not isinstance(runner, MoeRunner) or shares[slot].experts is None:
            continue
        if isinstance(runner.kernel, MapsExperts):
            for count in TOKEN_COUNTS:
                pairs = count * config.num_experts_per_tok
                yield from runner.kernel.mapped_configs(pairs, runner.operand, config.n_routed_experts)
