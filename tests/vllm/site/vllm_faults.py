"""A vLLM plugin of the tests: makes vLLM wrong on purpose, as ``OWNPATH_TEST_FAULTS`` names it.

hyper: the hyper-connection that takes a sublayer's output in, for few tokens, as TileLang's did on an H200. weight: one
projection a tenth too large. nan: one element of a shared expert that is NaN. rank1: three modules a quarter too large
on rank 1 alone, in our runners or in vLLM's parameters.
"""

import os
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch

FEW = 3
ON_RANK_1 = ("layers.2.attn.wo_b", "layers.1.ffn.experts.5.w2", "layers.3.ffn.shared_experts.w1")
SCALED, NAN = "layers.2.attn.wq_b.weight", "layers.3.ffn.shared_experts.w2.weight"


def install() -> None:
    """Breaks what the variable names; nothing without it."""
    faults = os.environ.get("OWNPATH_TEST_FAULTS", "").split(",")
    if "hyper" in faults:
        _break_hyper()
    if "weight" in faults or "nan" in faults:
        _break_weights("weight" in faults, "nan" in faults)
    if "rank1" in faults:
        _break_rank_1()


def _break_hyper() -> None:
    from vllm.model_executor.layers.mhc import MHCPostOp

    right = MHCPostOp.forward_cpu

    @wraps(right)
    def wrong(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        streams = right(self, *args, **kwargs)
        return streams.roll(1, dims=1) if len(streams) < FEW else streams

    MHCPostOp.forward_cpu = wrong


def _break_weights(is_scaled: bool, has_nan: bool) -> None:
    from vllm.models.deepseek_v4.cpu.model import DeepseekV4ForCausalLM

    right = DeepseekV4ForCausalLM.load_weights

    def load(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return right(self, (_changed(name, weight, is_scaled, has_nan) for name, weight in weights))

    DeepseekV4ForCausalLM.load_weights = load


def _break_rank_1() -> None:
    from vllm.models.deepseek_v4.cpu.model import DeepseekV4ForCausalLM

    from ownpath.integrations.vllm.intake import Intake

    take, load = Intake.take, DeepseekV4ForCausalLM.load_weights

    @wraps(take)
    def take_wrong(self: Any, weights: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> Any:
        return take(self, _larger_on_rank_1(weights), device)

    @wraps(load)
    def load_wrong(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load(self, _larger_on_rank_1(weights))

    Intake.take, DeepseekV4ForCausalLM.load_weights = take_wrong, load_wrong


def _larger_on_rank_1(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    from vllm.distributed import get_tensor_model_parallel_rank

    for name, weight in weights:
        module, _, part = name.rpartition(".")
        is_scaled = part == "weight_scale_2" or (part == "weight" and weight.is_floating_point())
        is_wrong = get_tensor_model_parallel_rank() == 1 and module in ON_RANK_1 and is_scaled
        yield name, weight * 1.25 if is_wrong else weight


def _changed(name: str, weight: torch.Tensor, is_scaled: bool, has_nan: bool) -> tuple[str, torch.Tensor]:
    if is_scaled and name == SCALED:
        return name, weight * 1.1
    if has_nan and name == NAN:
        weight = weight.clone()
        weight[7, 11] = float("nan")
    return name, weight
