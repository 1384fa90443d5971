"""``triton.nvfp4_moe_w4a4_sm100``: routed W4A4 experts."""

import torch

from ownpath.formats import NVFP4
from ownpath.kernels.checks import require_input
from ownpath.kernels.contract import FusedExpert, Routing, StoredExperts
from ownpath.kernels.nvfp4_sm100.launch import NARROW, ROW_TILE, columns_per_tile, run_experts
from ownpath.kernels.nvfp4_sm100.layout import W4A4MoeOperand, moe_operand, unboxed
from ownpath.kernels.nvfp4_sm100.linear import TritonKernel
from ownpath.kernels.nvfp4_sm100.prove import prove_moe
from ownpath.kernels.nvfp4_sm100.route_sm100 import num_tiles_bound
from ownpath.kernels.variants import variant_name
from ownpath.qtensor import QuantTensor


class Nvfp4MoeW4A4Kernel(TritonKernel):
    """y[t] = sum over chosen experts of weight * w2 swiglu(w13 x[t]), every operand NVFP4.

    is_batch_invariant: the same tiles for every number of tokens.
    """

    def prepare(self, stored: StoredExperts) -> W4A4MoeOperand:
        """Swizzles the scales; codes are used as they are. The first call on a device compares kernels with their twin.

        Errors: OperandError as ``moe_operand``; ProofError when they differ from their twin.
        """
        gate_up = _side(stored.gate_up, stored.gate_up_input_scale)
        operand = moe_operand(gate_up, _side(stored.down, stored.down_input_scale), stored.swiglu_limit)
        if operand.w2.is_cuda:
            prove_moe(self, operand.w2.device)
        return operand

    def restore(self, operand: W4A4MoeOperand, expert: int) -> FusedExpert:
        """Reads one expert back in the stored order. The global scales include the input's."""
        gate_up = _restore_stack(operand, operand.w13, operand.w13_scale, operand.w13_alpha, expert)
        return gate_up, _restore_stack(operand, operand.w2, operand.w2_scale, operand.w2_alpha, expert)

    def _columns(self, routing: Routing, operand: W4A4MoeOperand) -> int:
        num_rows = ROW_TILE * num_tiles_bound(routing.ids.numel(), operand.num_experts, ROW_TILE)
        return NARROW if self.is_batch_invariant else columns_per_tile(num_rows, operand.hidden_size)

    def variant(self, x: torch.Tensor, routing: Routing, operand: W4A4MoeOperand) -> str:
        """Returns the variant's name. It depends on the most rows a routing may need, unless batch-invariant."""
        return variant_name("w4a4_moe", rows=ROW_TILE, columns=self._columns(routing, operand))

    def workspace(self, operand: W4A4MoeOperand, num_tokens: int, num_slots: int) -> None:
        """Returns ``None``: scratch comes from torch's allocator."""

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: W4A4MoeOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y. Shapes: x and y bfloat16 [T, D]; ids int32 or int64 [T, K], those outside [0, E) are skipped.

        Errors: ValueError for a wrong dtype, shape, stride or device, shared experts, a map or no tcgen05.
        """
        if routing.num_shared or routing.expert_map is not None:
            raise ValueError("W4A4 experts take neither shared experts nor an expert map")
        require_input(x, operand.hidden_size, operand.w13)
        y = run_experts(x, routing.ids, routing.weights, operand, self._columns(routing, operand))
        return y if out is None else out.copy_(y)


def _side(
    side: QuantTensor, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert side.scale is not None
    assert side.global_scale is not None
    assert input_scale is not None, "W4A4 experts without a calibrated input_scale have no meaning"
    return side.qdata, side.scale, side.global_scale, input_scale


def _restore_stack(
    operand: W4A4MoeOperand, codes: torch.Tensor, scale: torch.Tensor, alpha: torch.Tensor, expert: int
) -> QuantTensor:
    own = codes.unflatten(0, (operand.num_experts, -1))[expert]
    pieces = scale.unflatten(1, (operand.num_experts, -1))[:, expert]
    return QuantTensor(own, unboxed(pieces, len(own), own.shape[1] // 8), alpha[expert], NVFP4)


nvfp4_moe_w4a4 = Nvfp4MoeW4A4Kernel(is_batch_invariant=False)
nvfp4_moe_w4a4_invariant = Nvfp4MoeW4A4Kernel(is_batch_invariant=True)
