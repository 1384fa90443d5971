"""A vLLM plugin of the tests: makes vLLM wrong on purpose, as ``OWNPATH_TEST_FAULTS`` names it.

hyper: the hyper-connection that takes a sublayer's output in, for few tokens, as TileLang's did on an H200. weight: one
projection a tenth too large. nan: one element of a shared expert that is NaN.
"""

import os
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch

FEW = 3
SCALED, NAN = "layers.2.attn.wq_b.weight", "layers.3.ffn.shared_experts.w2.weight"


def install() -> None:
    """Breaks what the variable names; nothing without it."""
    faults = os.environ.get("OWNPATH_TEST_FAULTS", "").split(",")
    if "hyper" in faults:
        _break_hyper()
    if "weight" in faults or "nan" in faults:
        _break_weights("weight" in faults, "nan" in faults)


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


def _changed(name: str, weight: torch.Tensor, is_scaled: bool, has_nan: bool) -> tuple[str, torch.Tensor]:
    if is_scaled and name == SCALED:
        return name, weight * 1.1
    if has_nan and name == NAN:
        weight = weight.clone()
        weight[7, 11] = float("nan")
    return name, weight
