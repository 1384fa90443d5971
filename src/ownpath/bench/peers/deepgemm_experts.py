"""DeepGEMM's MegaMoE on Hopper: experts by ids over ranks, dispatch, both products and the sums in its own kernels.

FP8 throughout: weights with a float32 scale for each 128 x 128, which are rounded from the NVFP4 ones here, activations
with one for each 128 (behind SwiGLU 64) columns. So times compare and values do not: its error has a limit of its own.
"""

import torch
import torch.distributed as dist

from ownpath.bench.contender import SWIGLU_LIMIT, W4A8_MOE_MAX_REL_L2, Missing
from ownpath.bench.operands import MoeOperands
from ownpath.bench.peers import missing_package
from ownpath.numerics import decode_nvfp4_blocks, quantize_fp8_block

_Fp8Stack = tuple[torch.Tensor, torch.Tensor]
"""E4M3 [E, N, K] and float32 [E, N / 128, K / 128]."""


class DeepGemmMegaMoe:
    """A rank's call of ``fp8_mega_moe``, with the kernel in front of it that rounds this rank's tokens.

    held: this rank's experts of ``operands``. group: of GPUs. max_tokens: of a rank.
    """

    name, max_rel_l2 = "deepgemm mega_moe", W4A8_MOE_MAX_REL_L2

    @staticmethod
    def missing(device: str) -> Missing | None:
        """Requires a deep_gemm with Hopper's MegaMoE: sgl-deep-gemm has it from 0.1.4 on."""
        found = missing_package("deep_gemm", "deep_gemm", device)
        if found is None:
            import deep_gemm

            if not hasattr(deep_gemm, "fp8_mega_moe"):
                return Missing("not installed", "this deep_gemm has no MegaMoE for Hopper")
        return found

    def __init__(
        self, operands: MoeOperands, held: range, group: dist.ProcessGroup, max_tokens: int, top_k: int
    ) -> None:
        import deep_gemm

        mine = slice(held.start, held.stop)
        gate_up = _rounded(operands.w13[mine], operands.w13_scale[mine], operands.w13_scale_2[mine])
        down = _rounded(operands.w2[mine], operands.w2_scale[mine], operands.w2_scale_2[mine])
        self._weights = deep_gemm.transform_weights_for_mega_moe_sm90(gate_up, down)
        num_experts, hidden, inter = len(operands.w2), operands.w2.shape[1], 2 * operands.w2.shape[2]
        self._buffer = deep_gemm.get_symm_buffer_for_mega_moe(group, num_experts, max_tokens, top_k, hidden, inter)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes this rank's rows. Shapes: x bfloat16 [T, D]; ids int32, weights float32 [T, K]."""
        import deep_gemm

        room = self._buffer
        rounded = room.x, room.x_sf, room.topk_idx, room.topk_weights
        deep_gemm.mega_moe_pre_dispatch_sm90(x, ids, weights, *rounded, len(x))
        y = torch.empty_like(x)
        deep_gemm.fp8_mega_moe(y, *self._weights, room, activation_clamp=SWIGLU_LIMIT)
        return y


def _rounded(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> _Fp8Stack:
    """Rounds NVFP4 stacks to FP8, expert by expert."""
    found = []
    for expert in range(len(codes)):
        weight = decode_nvfp4_blocks(codes[expert], scale[expert]) * scale_2[expert]
        rounded = quantize_fp8_block(weight, torch.float32)
        found.append((rounded.qdata, rounded.scale))
    weights, scales = zip(*found, strict=True)
    return torch.stack(weights), torch.stack(scales)
