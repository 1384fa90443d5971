"""Humming's W4A16 kernels (humming-kernels): dense, and an MoE made of its indexed product.

Humming computes the two products of an MoE. The operations around them in an engine (alignment, clamped SwiGLU,
weighted sum) are a few fused kernels in ``glue``, so that they do not slow the peer down.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ownpath.bench.contender import SWIGLU_LIMIT, W4A16_MAX_REL_L2, LinearCall, Missing, MoeCall
from ownpath.bench.operands import MoeOperands, Nvfp4Operands
from ownpath.bench.peers import missing_package

_WEIGHT_CONFIG = '{"quant_method": "modelopt", "quant_algo": "nvfp4"}'
_INDEXED = '{"gemm_type": "indexed"}'

Tuning = Mapping[str, Any]


class _Humming:
    name = "humming"
    is_peer = True
    max_rel_l2 = W4A16_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Requires humming-kernels, and CUDA's headers and NVRTC to compile with."""
        return missing_package("humming", "humming-kernels", device)


class HummingNvfp4(_Humming):
    """A dense ``HummingLayer``, configured by its own heuristics for each row count."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        layer = _layer(operands.weight, operands.weight_scale, operands.weight_scale_2.reshape(1), None)
        tunings = _compile(layer, num_rows, "dense", None)

        def call(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = layer(x, tuning_config=tunings[len(x)])
            return y

        return call


class HummingMoe(_Humming):
    """Alignment, indexed product, clamped SwiGLU, indexed product, weighted sum."""

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        num_experts = len(operands.w2)
        gate_up = _layer(operands.w13, operands.w13_scale, operands.w13_scale_2, num_experts)
        down = _layer(operands.w2, operands.w2_scale, operands.w2_scale_2, num_experts)
        slots = [tokens * top_k for tokens in num_tokens]
        gate_up_tunings = _compile(gate_up, slots, "indexed", _INDEXED)
        return _Moe(gate_up, down, gate_up_tunings, _compile(down, slots, "indexed", _INDEXED), num_experts)


@dataclass(frozen=True)
class _Moe:
    gate_up: Any
    down: Any
    gate_up_tunings: Mapping[int, Tuning]
    down_tunings: Mapping[int, Tuning]
    num_experts: int

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        from ownpath.bench.peers.glue import align, combine, swiglu

        num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
        tunings = self.gate_up_tunings[num_slots], self.down_tunings[num_slots]
        blocks = [int(tuning["block_shape"][0]) for tuning in tunings]
        first = align(topk_ids, self.num_experts, blocks[0])
        # The heuristics may choose another block for the second product, which then needs its own alignment.
        second = first if blocks[1] == blocks[0] else align(topk_ids, self.num_experts, blocks[1])
        routed = {"compute_config": _INDEXED, "valid_shape_m": num_slots}
        gate_up = self.gate_up(x, **first.arguments, top_k=top_k, tuning_config=tunings[0], **routed)
        activated = swiglu(gate_up, SWIGLU_LIMIT)
        y = self.down(activated, **second.arguments, top_k=1, tuning_config=tunings[1], **routed)
        return combine(y, topk_weights)


def _layer(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor, num_experts: int | None) -> Any:
    """Returns a transformed HummingLayer with a repacked copy."""
    from humming.layer import HummingLayer

    with torch.device(weight.device):  # its constructor would allocate on the CPU
        layer = HummingLayer(
            shape_n=weight.shape[-2],
            shape_k=2 * weight.shape[-1],
            num_experts=num_experts,
            weight_config=json.loads(_WEIGHT_CONFIG),
            torch_dtype=torch.bfloat16,
        )
    layer.load_from_tensors({"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2})
    layer.transform()
    return layer


def _compile(layer: Any, counts: Sequence[int], gemm_type: str, compute_config: str | None) -> Mapping[int, Tuning]:
    """Compiles Humming's choice for each row count, in parallel on all cores."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    config = layer.humming_config
    tunings = {
        count: get_heuristics_config(layer_config=config, shape_m=count, gemm_type=gemm_type) for count in counts
    }
    intervals = [[0, 1 << 30, tuning] for tuning in tunings.values()]
    HummingKernel.prepare_kernels(config.to_str(), compute_config, json.dumps(intervals))
    return tunings
