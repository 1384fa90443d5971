"""The subject of a verification: a checkpoint as planned for a device, with the layers and experts to look at."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import CSA_RATIO, HCA_RATIO, EngineConfig, ModelConfig
from ownpath.loading import WindowOpener, planned, planned_window
from ownpath.model.build import ALONE
from ownpath.plan.plan import Plan
from ownpath.ranks.peers import Peers

if TYPE_CHECKING:
    from ownpath.kernels.exchange.window import Window

_EDGE = 6
"""Tokens after the last window of 128, so that a step near the end completes one and others follow it."""
_CPU_WINDOWS, _CUDA_WINDOWS = (3, 6), (8, 18)
"""The fewest and the most windows of 128 tokens: seconds on two cores; more than a thousand positions on a GPU."""


def text_length(config: ModelConfig, engine: EngineConfig) -> int:
    """Returns the tokens that layers are compared on, the most that a step of theirs has."""
    fewest, most = _CPU_WINDOWS if torch.device(engine.device).type == "cpu" else _CUDA_WINDOWS
    choosing = CSA_RATIO * (config.index_topk + HCA_RATIO // CSA_RATIO) if CSA_RATIO in config.compress_ratios else 0
    wanted = -(-choosing // HCA_RATIO)
    windows = max(fewest, wanted) if wanted <= most else fewest
    return min(HCA_RATIO * windows + _EDGE, engine.max_model_len, config.max_position_embeddings)


@dataclass(frozen=True)
class Selection:
    """layer_ids: ``None``: all. num_experts: how many of each layer's, drawn with ``seed``; ``None``: all."""

    layer_ids: frozenset[int] | None = None
    num_experts: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """One checkpoint with its plan for one device. peers: the ranks that run it together; window: this one's."""

    folder: Path
    index: CheckpointIndex
    plan: Plan
    engine: EngineConfig
    selection: Selection = Selection()
    peers: Peers = ALONE
    window: "Window | None" = None

    @classmethod
    def of(
        cls,
        folder: Path,
        engine: EngineConfig,
        selection: Selection | None = None,
        peers: Peers = ALONE,
        open_window: WindowOpener | None = None,
    ) -> "Subject":
        """Reads headers and makes the plan; reads no weight.

        Errors: ConfigError, CheckpointError, PlanError as ``load_model``; ValueError naming a layer that does not
        exist.
        """
        plan, index = planned(folder, engine)
        selection = selection or Selection()
        num_layers = plan.config.num_hidden_layers + plan.draft.num_modules
        for layer_idx in sorted(selection.layer_ids or ()):
            if not 0 <= layer_idx < num_layers:
                raise ValueError(f"layer {layer_idx}: the model has layers 0 to {num_layers - 1}")
        rows = replace(engine, max_prefill_tokens=max(engine.max_prefill_tokens, text_length(plan.config, engine)))
        return cls(folder, index, plan, engine, selection, peers, planned_window(plan, rows, open_window))

    @property
    def config(self) -> ModelConfig:
        return self.plan.config

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The chosen layers, in order."""
        chosen = self.selection.layer_ids
        return tuple(idx for idx in range(self.config.num_hidden_layers) if chosen is None or idx in chosen)

    @property
    def module_ids(self) -> tuple[int, ...]:
        """The chosen MTP modules of the plan, as layers: they come after the backbone's."""
        chosen, first = self.selection.layer_ids, self.config.num_hidden_layers
        modules = 0 if self.config.dspark else self.plan.draft.num_modules
        return tuple(idx for idx in range(first, first + modules) if chosen is None or idx in chosen)

    def name_of(self, layer_idx: int) -> str:
        """Returns a layer's name, a module's among them."""
        return (*self.config.backbone_layers(), *self.config.draft_layers())[layer_idx].name

    def expert_ids(self, layer_idx: int) -> tuple[int, ...]:
        """Returns the chosen experts of a layer, in order: the same for the same seed, others in other layers."""
        return sample_experts(self.selection, layer_idx, self.config.n_routed_experts)


def sample_experts(selection: Selection, layer_idx: int, num_experts: int) -> tuple[int, ...]:
    """Draws experts of a layer; returns their ids in order."""
    wanted = selection.num_experts
    if wanted is None or wanted >= num_experts:
        return tuple(range(num_experts))
    drawn = random.Random(f"{selection.seed} {layer_idx}").sample(range(num_experts), wanted)
    return tuple(sorted(drawn))
