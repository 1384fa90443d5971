"""``cute.fp8_experts``: routed experts on FP8 tensor cores, with E4M3 activations and 4-bit weights, in six launches.

    align -> quantise and spread tokens -> gate_up with SwiGLU -> quantise hidden rows -> down -> combine

Weights are E2M1 codes whose block scales are powers of two: MXFP4, or the NVFP4 that was made from it. See ``layout``
for what that takes, ``gemm_sm90`` for the products and ``nvfp4.moe_sm90`` for the kernels around them. Numerics: the
step ``fp8_inputs`` of ``official``: both products' inputs are rounded to E4M3 with a power-of-two scale per 1 x 128.

A call's scratch is one buffer: schedule; tokens' rows in the experts' order, E4M3 [P, D], and their scales; hidden
rows, bfloat16 [P, F]; the same in E4M3, and their scales; the experts' outputs, float32 or bfloat16 [P, D].
"""

import logging
from collections.abc import Callable

import torch

from ownpath.kernels.contract import Config, FusedExpert, Routing, StoredExperts
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.fp8_experts.choose import SHAPES, Fp8MoeChoice, choose, make
from ownpath.kernels.fp8_experts.config import QuantizeRowsConfig
from ownpath.kernels.fp8_experts.launch import Fp8MoeLaunches, Fp8MoeOperand, Scratch
from ownpath.kernels.fp8_experts.pack import check_stack, pack_stack, restore_stack
from ownpath.kernels.fp8_experts.read_back import ReadBackKernel, ReadBackOperand
from ownpath.kernels.nvfp4.calls import call_key, check_out
from ownpath.kernels.nvfp4.choose import WIDE_PAIRS
from ownpath.kernels.nvfp4.config import CombineConfig
from ownpath.kernels.nvfp4.launch import PAIRS_PER_ALIGN_CTA, PAIRS_PER_ALIGN_WARP, MoeCallKey, align_config
from ownpath.kernels.nvfp4.layout import gate_up_rows, plain_rows
from ownpath.kernels.nvfp4.moe import MAX_EXPERTS, nvfp4_moe, nvfp4_moe_invariant

logger = logging.getLogger(__name__)
AnyFp8Operand = Fp8MoeOperand | ReadBackOperand
DIM_MULTIPLE = 256


class Fp8ExpertsKernel:
    """Packs experts and runs them."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., Fp8MoeChoice] = choose) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose
        self._read_back = ReadBackKernel(nvfp4_moe_invariant if is_batch_invariant else nvfp4_moe)

    def prepare(self, stored: StoredExperts) -> AnyFp8Operand:
        """Repacks the codes in place, one expert at a time, so that two copies of the experts never exist.

        Where some row's scales do not fit E4M3, all of this layer's experts stay with the BF16 kernels, and a warning
        says so; their inputs are rounded to E4M3 all the same.

        Shapes: as ``StoredExperts``; codes and scales contiguous, on one CUDA device.
        Errors: ValueError naming the operand for sizes that are not multiples of 256, too many experts, a bad block
        scale, or NVFP4 that was not made from MXFP4; nothing is repacked then.
        """
        num_experts, hidden = stored.num_experts, stored.hidden_size
        inter = stored.down.shape[2]
        if hidden % DIM_MULTIPLE or inter % DIM_MULTIPLE:
            raise ValueError(f"experts are {hidden} -> {inter}: both must be multiples of {DIM_MULTIPLE}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"w13 holds {num_experts} experts, at most {MAX_EXPERTS} are supported")
        found = [check_stack(name, side) for name, side in (("w13", stored.gate_up), ("w2", stored.down))]
        if reason := "; ".join(filter(None, found)):
            logger.warning("experts stay on BF16 tensor cores, with inputs rounded to E4M3: %s", reason)
            return self._read_back.prepare(stored, reason)
        w13 = pack_stack(stored.gate_up, gate_up_rows(2 * inter))
        w2 = pack_stack(stored.down, plain_rows(hidden))
        # Kernels read weights before they wait for their predecessor: what wrote them must be over by then.
        torch.cuda.synchronize(w2.codes.device)
        return Fp8MoeOperand(w13, w2, num_experts, stored.swiglu_limit)

    def restore(self, operand: AnyFp8Operand, expert: int) -> FusedExpert:
        """Reads one expert back."""
        if isinstance(operand, ReadBackOperand):
            return self._read_back.restore(operand, expert)
        w13 = restore_stack(operand.w13, gate_up_rows(operand.w13.num_rows), expert)
        return w13, restore_stack(operand.w2, plain_rows(operand.w2.num_rows), expert)

    def choose(self, pairs: int, operand: Fp8MoeOperand, num_ids: int = 0) -> Fp8MoeChoice:
        """Chooses the kernels of a call with ``pairs`` (token, slot) pairs. num_ids: of an expert map."""
        num_experts = max(operand.num_experts, num_ids)
        return self._choose(pairs, num_experts, operand.hidden, operand.inter, self.is_batch_invariant)

    def variant(self, x: torch.Tensor, routing: Routing, operand: AnyFp8Operand) -> str:
        """Returns the names of the products that a call with these arguments launches."""
        if isinstance(operand, ReadBackOperand):
            return self._read_back.variant(x, routing, operand)
        pairs = routing.ids.numel() + len(x) * routing.num_shared
        choice = self.choose(pairs, operand, 0 if routing.expert_map is None else len(routing.expert_map))
        return f"{choice.gate_up.name} {choice.down.name}"

    def configs(self, operand: AnyFp8Operand) -> list[Config]:
        """Returns the configurations of every kernel that a call without shared experts or a map may launch."""
        if isinstance(operand, ReadBackOperand):
            return self._read_back.configs(operand)
        return self._configs(operand.hidden, operand.inter)

    def planned_configs(self, stored: StoredExperts) -> list[Config]:
        """Returns ``configs`` from the shapes."""
        return self._configs(stored.hidden_size, stored.down.shape[2])

    def _configs(self, hidden: int, inter: int) -> list[Config]:
        counts = (1, PAIRS_PER_ALIGN_WARP, PAIRS_PER_ALIGN_CTA, PAIRS_PER_ALIGN_CTA + 1)
        found: list[Config] = [align_config(wide, False, 0, pairs) for wide in (False, True) for pairs in counts]
        found += [QuantizeRowsConfig(True), QuantizeRowsConfig(False)]
        for wide in (True,) if self.is_batch_invariant else (False, True):
            found.append(CombineConfig(0, wide))
            for _, shape in SHAPES:
                choice = make(shape, hidden, inter, wide)
                found += [choice.gate_up, choice.down]
        return list(dict.fromkeys(found))

    def workspace(self, operand: AnyFp8Operand, num_tokens: int, num_slots: int) -> torch.Tensor:
        """Allocates scratch for up to ``num_tokens`` tokens. num_slots: experts per token, shared ones included."""
        if isinstance(operand, ReadBackOperand):
            return self._read_back.workspace(operand, num_tokens, num_slots)
        pairs = num_tokens * num_slots
        # A smaller call may have narrower tiles, hence a longer schedule, and may use float32 outputs.
        tiles = min(operand.num_experts, pairs) + pairs // 8 + 1
        widths = operand.hidden, operand.inter
        wide = Scratch.of(pairs if self.is_batch_invariant else min(pairs, WIDE_PAIRS), tiles, widths, True)
        num_bytes = max(wide.num_bytes, Scratch.of(pairs, tiles, widths, False).num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=operand.w13.codes.device)

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: AnyFp8Operand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y[t] = sum over slots of weight * expert(x[t]), plus the last num_shared experts of x[t].

        Shapes: x bfloat16 [T, D]; routing as ``Routing``; y bfloat16 [T, D], ``out`` if given.
        Errors: ValueError naming a tensor the kernels cannot take. Ids outside the experts contribute nothing.
        """
        if isinstance(operand, ReadBackOperand):
            return self._read_back.run(x, routing, operand, out, workspace)
        key = call_key(x, routing, operand)
        num_tokens = key[0]
        if out is not None:
            check_out(out, num_tokens, operand)
        if not num_tokens:
            return torch.empty_like(x) if out is None else out
        with operand.lock:
            call = operand.launches.get(key) or operand.launches.add(key, self._new_call(key, operand))
            if out is None:
                out = call.out.new()
            if workspace is None:
                workspace = call.scratch.new()
            elif workspace.numel() < call.places.num_bytes:
                needed = f"this call of {num_tokens} tokens needs {call.places.num_bytes}"
                raise ValueError(f"workspace holds {workspace.numel()} bytes, {needed}")
            stream = current_stream(operand.w13.device_index)
            call.start(x.data_ptr(), routing, workspace.data_ptr(), out.data_ptr(), stream)
        return out

    def _new_call(self, key: MoeCallKey, operand: Fp8MoeOperand) -> Fp8MoeLaunches:
        num_tokens, num_choices, num_shared, map_length = key[:4]
        if not 0 <= num_shared < operand.num_experts:
            raise ValueError(f"num_shared is {num_shared}, there are {operand.num_experts} experts")
        choice = self.choose(num_tokens * (num_choices + num_shared), operand, map_length)
        return Fp8MoeLaunches(choice, key, operand)


fp8_experts = Fp8ExpertsKernel(is_batch_invariant=False)
fp8_experts_invariant = Fp8ExpertsKernel(is_batch_invariant=True)
