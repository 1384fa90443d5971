"""vLLM's methods of layers, as thin adapters of our runners. A layer of ours has no parameters.

So nothing else can multiply its weights: a path around us is an AttributeError, never a wrong number.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase

from ownpath.config import Parallel
from ownpath.integrations.vllm.intake import Intake
from ownpath.integrations.vllm.ops import CALLS, EXPERTS, GROUPED, LINEAR, angles
from ownpath.plan.part import RankShare
from ownpath.trace.observers import Watched


class SlotWeights:
    """The slot of one layer: entered while vLLM builds the layer, callable once its weights are there."""

    def __init__(self, slot: str, intake: Intake) -> None:
        self.slot, self.intake = slot, intake
        self.key = ""
        self._call: Watched | None = None

    def enter(self, share: RankShare, shape: tuple[int, int]) -> None:
        """Enters the layer's share of the slot. shape: of the layer's weight, on this rank."""
        self.intake.enter(self.slot, share, shape)

    def begin(self) -> None:
        """Makes the slot callable. Errors: CheckpointError where vLLM has loaded nothing."""
        taken = self.intake.taken
        self._call = taken.ledger.watch(self.slot, taken.runners[self.slot])
        self.key = CALLS.new(self._call)


class OwnpathLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A dense product by our runner."""

    def __init__(self, slot: str, intake: Intake) -> None:
        self.weights = SlotWeights(slot, intake)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,
        **attributes: Any,
    ) -> None:
        """Enters the layer; it gets no parameters."""
        share = RankShare(Parallel(layer.tp_rank, layer.tp_size))  # type: ignore[arg-type]
        self.weights.enter(share, (sum(output_partition_sizes), input_size_per_partition))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Makes the layer callable. Errors: CheckpointError where nothing was loaded."""
        self.weights.begin()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Computes y [..., N], this rank's rows, or its part of the sums."""
        y = LINEAR(x, self.weights.key)
        return y if bias is None else y + bias


class OwnpathGroupMethod(OwnpathLinearMethod):
    """``wo_a``: its product is ``o_proj``'s, behind the inverse rotation; the layer itself is never called."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Raises: a grouped product has no meaning for rows."""
        raise RuntimeError(f"{self.weights.slot} is a product in groups of heads; vLLM called it as one of rows")

    def o_proj(self, attention: Any, o: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undoes the rotation of attention's output [T, N, H], multiplies by ``wo_a`` and by ``wo_b``: [T, D].

        attention: vLLM's layer, of which the angles and ``wo_b`` are taken.
        """
        if not isinstance(o, torch.Tensor):
            raise TypeError(f"{self.weights.slot}: vLLM's attention has quantised its output; it must be BF16 here")
        cos, sin = angles(attention.rotary_emb.cos_sin_cache, positions)
        out: torch.Tensor = attention.wo_b(GROUPED(o.contiguous(), cos, sin, self.weights.key).flatten(1))
        return out


class OwnpathExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Routed experts by our runner. vLLM routes, dispatches, adds the shared expert and reduces over ranks."""

    def __init__(self, slot: str, intake: Intake, moe_config: Any) -> None:
        super().__init__(moe_config)
        self.weights = SlotWeights(slot, intake)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Enters the layer: the experts that this rank has, and its part of their width."""
        ranks = layer.moe_config.moe_parallel_config
        local = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(layer.moe_config.num_experts)]
        held = sorted((e for e, place in enumerate(local) if place >= 0), key=local.__getitem__)
        experts = None if held == list(range(len(local))) else tuple(held)
        share = RankShare(Parallel(ranks.tp_rank, ranks.tp_size), experts)
        self.weights.enter(share, (2 * intermediate_size_per_partition, hidden_size))

    def maybe_make_prepare_finalize(self, *_: Any, **__: Any) -> None:
        """Returns ``None``: vLLM's runner dispatches and combines itself (up to 0.32 it asks)."""

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Returns ``None``: no kernel of vLLM's runs here."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the layer callable. Errors: CheckpointError where nothing was loaded."""
        self.weights.begin()

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Computes y [T, D], the sum over this rank's experts and its part of their width."""
        return EXPERTS(x, topk_ids, topk_weights.float(), layer.expert_map, self.weights.key)


def intake_of(model: torch.nn.Module) -> Intake | None:
    """Returns the intake of a model's layers; ``None`` where none of them is ours."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, OwnpathLinearMethod | OwnpathExpertsMethod):
            return method.weights.intake
    return None
