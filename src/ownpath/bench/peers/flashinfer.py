"""FlashInfer's NVFP4 MegaMoE for Hopper (flashinfer-python 0.7.4) as one rank: FP8 activations, rounded weights.

Its kernel rounds each weight ``code * block scale / 8`` to E4M3, and each row of activations to E4M3 with one scale, in
front of both products: faster arithmetic than W4A16, and four roundings more. Quantising rows is a part of its call,
in torch operations, as its users have it. The CUDA form of the same library (``flashinfer.megamoe``) takes four or
eight ranks only and cannot take part on one GPU.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ownpath.bench.contender import SWIGLU_LIMIT, W4A8_MOE_MAX_REL_L2, Missing, MoeCall
from ownpath.bench.operands import MoeOperands
from ownpath.bench.peers import missing_package

_ALONE = "MEGA_NO_DIST"
"""The library's own switch for one rank: plain memory instead of NVSHMEM's."""


class FlashinferMoe:
    """``MoEEpLayer`` with the pull-style CuTe DSL kernel and the tactics it chooses for exactly these token counts."""

    name = "flashinfer"
    is_peer = True
    max_rel_l2 = W4A8_MOE_MAX_REL_L2

    def missing(self, device: str) -> Missing | None:
        """Requires flashinfer-python and the CuTe DSL below it."""
        return missing_package("flashinfer", "flashinfer-python", device) or missing_package(
            "cutlass", "nvidia-cutlass-dsl", device
        )

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        os.environ[_ALONE] = "1"
        from flashinfer.moe_ep import (
            BootstrapConfig,
            FleetParams,
            MegaConfig,
            MoEEpLayer,
            Nvfp4WeightPack,
            Sm90_Fp8_Nvfp4_Bf16_PullCutedsl_MegaMoeConfig,
        )

        num_experts, hidden, packed_inter = operands.w2.shape
        weights = Nvfp4WeightPack(
            operands.w13,
            operands.w2,
            operands.w13_scale,
            operands.w2_scale,
            w13_global_scale=operands.w13_scale_2,
            w2_global_scale=operands.w2_scale_2,
        )
        kernel = Sm90_Fp8_Nvfp4_Bf16_PullCutedsl_MegaMoeConfig(
            intermediate_size=2 * packed_inter, top_k=top_k, gate_up_clamp=SWIGLU_LIMIT
        )
        with _interleaved_by_torch():
            layer = MoEEpLayer(
                BootstrapConfig(world_size=1, rank=0),
                FleetParams(num_experts, max(num_tokens), hidden),
                weights,
                backend=MegaConfig(megakernel=kernel),
            )
        workspaces = {count: layer.create_workspace(count) for count in sorted(set(num_tokens))}
        for workspace in workspaces.values():
            layer.warmup(workspace=workspace)
        return _OneRank(layer, workspaces)


@dataclass(frozen=True)
class _OneRank:
    layer: Any
    workspaces: Mapping[int, Any]

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        from flashinfer.moe_ep import MoEEpTensors

        tensors = MoEEpTensors(x, topk_ids.to(torch.int64), topk_weights)
        y: torch.Tensor = self.layer.forward(tensors, workspace=self.workspaces[len(x)])
        return y


@contextmanager
def _interleaved_by_torch() -> Iterator[None]:
    """Lets the library's repacking use ``interleave``: its own form is in a module of CUTLASS kernels that compiles for
    many minutes and is used for nothing else here. Repacking is not timed."""
    from flashinfer.fused_moe import prepare

    name = "interleave_moe_weights_for_sm90_mixed_gemm"
    own = getattr(prepare, name)
    setattr(prepare, name, lambda weight, _: interleave(weight))
    try:
        yield
    finally:
        setattr(prepare, name, own)


def interleave(weight: torch.Tensor) -> torch.Tensor:
    """Puts packed codes in the order of the FP8 product's operand registers. weight: uint8 [E, N, K/2], even K first.

    Rows r and r + 8 of every 16 become neighbours, four codes (16 bits) at a time, and the eight signs of two such
    words go to the top of the eight bytes that the codes become: row r's to the odd places, row r + 8's to the even.
    """
    num_experts, num_rows, num_bytes = weight.shape
    words = weight.contiguous().view(torch.int16).reshape(num_experts, num_rows // 16, 2, 8, num_bytes // 32, 2, 2, 4)
    # [E, 16 rows, half, row, 64 columns, m, quarter, word] -> [E, 16 rows, quarter, row, 64 columns, m, word, half]
    pairs = words.permute(0, 1, 6, 3, 4, 5, 7, 2).contiguous().view(torch.int32)
    magnitudes = pairs & 0x77777777
    signs = torch.zeros_like(pairs)
    for code in range(8):
        place = 2 * code + 1 if code < 4 else 2 * (code - 4)
        signs |= ((pairs >> (4 * code + 3)) & 1) << (4 * place + 3)
    return (magnitudes | signs).view(torch.uint8).reshape(weight.shape)
