"""A vLLM plugin of the tests: two faults of vLLM's CPU model, which a 4-layer model of 8 experts meets.

- Its metadata builder leaves out kinds of layers that are not there, and then looks for them (0.31 to 0.33).
- Its routers' kernels know no 8 experts; the same is computed here in torch, ties to the lower id.
"""

from typing import Any

import torch


def install() -> None:
    """Replaces one method and one function of vLLM's CPU model; vLLM calls it in every process."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder

    def build_tile_scheduler(self: Any, num_decode_tokens: int) -> dict[str, None]:
        return dict.fromkeys(("swaonly", "c1a", "c2a", "c4a", "c128a"))

    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = build_tile_scheduler
    cpu_router._sqrtsoftplus_bias_topk = route


def route(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    input_ids: torch.Tensor | None,
    hash_indices_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts by sqrt(softplus(logit)) + bias, or by token id; weights [T, K] sum to the scaling factor."""
    scores = torch.nn.functional.softplus(router_logits.float()).sqrt()
    if hash_indices_table is not None:
        assert input_ids is not None
        ids = hash_indices_table[input_ids].long()
    else:
        ids = torch.sort(scores + e_score_correction_bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True) * routed_scaling_factor, ids.int()
