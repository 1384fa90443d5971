"""Runners of routed experts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.kernels.checks import require
from ownpath.kernels.contract import Config, ExpertsKernel, Routing, StoredExperts
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import mxfp4_scale_as_nvfp4
from ownpath.ops import OpKind
from ownpath.qtensor import QuantTensor
from ownpath.runners.linear import PACKED, plain_format
from ownpath.runners.ops import HANDLES
from ownpath.runners.runner import KernelOrName, KernelRunner, Runner, chosen_spec, default_spec

SplitExpert = tuple[QuantTensor, QuantTensor, QuantTensor]
"""w1 (gate), w3 (up) and w2 (down) of one expert, as they are stored."""


class MoeRunner(KernelRunner):
    """Top-k mixture of SwiGLU experts. It takes ownership of the stored tensors: the kernel may repack them in place.

    Errors: ValueError naming a tensor that the kernel refuses.
    """

    def __init__(self, kernel: KernelOrName, stored: StoredExperts) -> None:
        self.spec = chosen_spec(kernel)
        self.num_experts, self.hidden_size = stored.num_experts, stored.hidden_size
        self.swiglu_limit, self.device = stored.swiglu_limit, stored.down.qdata.device
        self.kernel: ExpertsKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(stored)
        self.handle = HANDLES.new(self)

    def run(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        num_shared: int = 0,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes ``__call__`` directly, also while torch compiles."""
        routing = Routing(topk_ids, topk_weights, num_shared, expert_map)
        return self.kernel.run(x, routing, self.operand, out=out, workspace=workspace)

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        num_shared: int = 0,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y[t] = sum over k of topk_weights[t, k] * expert topk_ids[t, k] of x[t], plus the shared experts.

        Shapes: x [T, D]; topk_ids int32 or int64 [T, K]; topk_weights float32 [T, K]; y [T, D] in the dtype of x.
        num_shared: number of shared experts at the end of the stacks; every token goes to them with weight 1.
        expert_map: int32 [global experts], local expert or -1, for a runner that holds only some.
        out (like x), workspace: with both, the call allocates nothing.
        """
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.experts(x, topk_ids, topk_weights, expert_map, num_shared, self.handle)
            return y if out is None else out.copy_(y)
        routing = Routing(topk_ids, topk_weights, num_shared, expert_map)
        return self.kernel.run(x, routing, self.operand, out=out, workspace=workspace)

    def workspace(self, num_tokens: int, num_slots: int) -> torch.Tensor | None:
        """Allocates uint8 scratch for calls of up to ``num_tokens`` tokens; ``None`` where none is used.

        num_slots: experts per token, shared ones included.
        """
        return self.kernel.workspace(self.operand, num_tokens, num_slots)

    def stored_expert(self, expert: int) -> SplitExpert:
        """Returns one expert, read back from the operand; w2's global scale may be there twice."""
        gate_up, down = self.kernel.restore(self.operand, expert)
        return *gate_and_up(gate_up), down

    def padding(self) -> None:
        """Returns ``None``: experts' layouts have no padding."""

    def compile_configs(self) -> Sequence[Config]:
        """Returns the configurations of kernels that calls without shared experts or an expert map may launch."""
        return self.kernel.configs(self.operand)

    def variant(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(x, Routing(topk_ids, topk_weights), self.operand)


class HeldExperts(Runner):
    """Routed experts of which this rank has some; others contribute nothing here.

    held: their ids among ``num_experts``, in the order of the runner's.
    """

    def __init__(self, experts: MoeRunner, held: Sequence[int], num_experts: int) -> None:
        self.experts = experts
        self.expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
        self.expert_map[list(held)] = torch.arange(len(held), dtype=torch.int32)
        self.expert_map = self.expert_map.to(experts.device)

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """The experts' runner."""
        return self.experts.leaves

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Computes y [T, D], this rank's part of the sum. topk_ids: of all experts."""
        return self.experts(x, topk_ids, topk_weights, expert_map=self.expert_map)


def gate_and_up(fused: QuantTensor) -> tuple[QuantTensor, QuantTensor]:
    """Splits an expert's fused matrix into gate and up.

    Shapes: qdata [2F, ...]; scale [2F, ...], or a grid for each half [2, R, C]; global_scale [2].
    """

    def half(idx: int) -> QuantTensor:
        scale = fused.scale
        if scale is not None:
            scale = scale[idx] if scale.ndim == 3 else scale.chunk(2)[idx]
        global_scale = None if fused.global_scale is None else fused.global_scale[idx]
        return QuantTensor(fused.qdata.chunk(2)[idx], scale, global_scale, fused.format)

    return half(0), half(1)


class Nvfp4MoE(MoeRunner):
    """Top-k mixture of SwiGLU experts with NVFP4 weights.

    Shapes (E experts, D hidden, F expert width): w13 uint8 [E, 2F, D/2], gate rows first; w13_scale E4M3
        [E, 2F, D/16]; w13_scale_2 float32 [E], or [E, 2] when gate and up have their own; w2 uint8 [E, D, F/2];
        w2_scale E4M3 [E, D, F/16]; w2_scale_2 float32 [E]. Global scales are multipliers (ModelOpt's convention).
    On a Hopper GPU the runner takes ownership of the stacks: they are repacked in place, one expert at a time, so that
    the experts never exist twice. Pass clones of tensors that are needed later.
    Errors: ValueError naming the operand for a wrong dtype, shape or device. Expert ids are not read by the host, which
        would stall a GPU: an id outside the experts contributes nothing.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w13_scale_2: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        w2_scale_2: torch.Tensor,
        swiglu_limit: float,
        *,
        kernel: KernelOrName | None = None,
    ) -> None:
        stored = stored_nvfp4((w13, w13_scale, w13_scale_2), (w2, w2_scale, w2_scale_2), swiglu_limit)
        chosen = default_spec(OpKind.MOE, NVFP4, w13.device) if kernel is None else kernel
        super().__init__(chosen, stored)

    @classmethod
    def from_mxfp4(
        cls,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        swiglu_limit: float,
        *,
        kernel: KernelOrName | None = None,
    ) -> "Nvfp4MoE":
        """Makes a runner from MXFP4 experts, exactly: an E8M0 scale becomes two E4M3 scales and a power of two each.

        Shapes: w13 uint8 [E, 2F, D/2] and w13_scale E8M0 [E, 2F, D/32], gate rows first; w2 uint8 [E, D, F/2] and
            w2_scale E8M0 [E, D, F/32]. Scales take twice their bytes: 0.5625 a weight instead of 0.53125.
        Errors: ValueError naming the operand and expert whose scales span more than E4M3's 18 powers of two.
        """
        gate_up_scale, gate_up_global = mxfp4_scale_as_nvfp4("w13_scale", w13.view(torch.uint8), w13_scale, None)
        down_scale, down_global = mxfp4_scale_as_nvfp4("w2_scale", w2.view(torch.uint8), w2_scale, None)
        return cls(w13, gate_up_scale, gate_up_global, w2, down_scale, down_global, swiglu_limit, kernel=kernel)


def stored_nvfp4(w13: Sequence[torch.Tensor], w2: Sequence[torch.Tensor], swiglu_limit: float) -> StoredExperts:
    """Checks stacks, each (qdata, scale, global scale) as ``Nvfp4MoE`` takes them. Errors: ValueError naming one."""
    gate_up, down = _nvfp4_side("w13", *w13), _nvfp4_side("w2", *w2)
    _require_fit(gate_up, down)
    return StoredExperts(gate_up, down, swiglu_limit)


def _nvfp4_side(name: str, codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> QuantTensor:
    """Checks one stack; repeats a global scale that gate and up share. Errors: ValueError naming the operand."""
    num_experts, num_rows, packed = codes.shape
    require(name, codes, PACKED, (num_experts, num_rows, packed))
    require(f"{name}_scale", scale, (torch.float8_e4m3fn,), (num_experts, num_rows, packed // 8))
    is_pair = name == "w13" and global_scale.ndim == 2
    require(f"{name}_scale_2", global_scale, (torch.float32,), (num_experts, 2) if is_pair else (num_experts,))
    if name == "w13" and not is_pair:
        global_scale = global_scale[:, None].expand(-1, 2)
    return QuantTensor(codes.view(torch.uint8), scale, global_scale, NVFP4)


def _require_fit(gate_up: QuantTensor, down: QuantTensor) -> None:
    """Checks that down has the shape that gate and up require. Errors: ValueError."""
    num_experts, rows, dim = gate_up.shape
    require("w13", gate_up.qdata, (torch.uint8,), (num_experts, rows // 2 * 2, dim // 2))
    require("w2", down.qdata, (torch.uint8,), (num_experts, dim, rows // 4))


class Nvfp4MoEW4A4(MoeRunner):
    """W4A4, for Blackwell: top-k mixture of SwiGLU experts, weights and activations NVFP4.

    Shapes (E experts, D hidden, F expert width, both multiples of 128): w13 and w2 are (qdata, scale, global scale,
        input scale), the first three as ``Nvfp4MoE``; w13's input scale float32 [E], or [E, 2] for gate and up, of
        which the larger is used; w2's float32 [E].
    Errors: ValueError naming the operand for a wrong dtype, shape or device, or a scale that is not finite and
        positive; ProofError when the kernels differ from their twin on this device. Expert ids outside [0, E) are
        skipped: those experts live elsewhere.
    """

    def __init__(
        self,
        w13: Sequence[torch.Tensor],
        w2: Sequence[torch.Tensor],
        swiglu_limit: float,
        *,
        kernel: KernelOrName = "triton.nvfp4_moe_w4a4_sm100",
    ) -> None:
        stored = stored_nvfp4(w13[:3], w2[:3], swiglu_limit)
        num_experts = len(w2[0])
        pairs = w13[3].ndim == 2
        require("w13_input_scale", w13[3], (torch.float32,), (num_experts, 2) if pairs else (num_experts,))
        require("w2_input_scale", w2[3], (torch.float32,), (num_experts,))
        shared = w13[3].amax(dim=1) if pairs else w13[3]
        super().__init__(kernel, replace(stored, gate_up_input_scale=shared, down_input_scale=w2[3]))


class Fp8MoE(MoeRunner):
    """Top-k mixture of SwiGLU experts with E4M3 weights in 128 x 128 blocks, by the torch reference.

    Shapes (E experts, D hidden, F expert width, R = ceil(F/128), C = ceil(D/128)): w13 E4M3 [E, 2F, D], gate rows
        first; w13_scale [E, 2, R, C], the grids of gate and up; w2 E4M3 [E, D, F]; w2_scale [E, C, R]. Scales are E8M0
        or float32.
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        swiglu_limit: float,
        *,
        kernel: KernelOrName = "ref.fp8_moe",
    ) -> None:
        num_experts, rows, dim = w13.shape
        inter = rows // 2
        blocks_F, blocks_D = -(-inter // 128), -(-dim // 128)
        codes, scales = (torch.float8_e4m3fn,), (torch.float8_e8m0fnu, torch.float32)
        require("w13", w13, codes, (num_experts, 2 * inter, dim))
        require("w13_scale", w13_scale, scales, (num_experts, 2, blocks_F, blocks_D))
        require("w2", w2, codes, (num_experts, dim, inter))
        require("w2_scale", w2_scale, scales, (num_experts, blocks_D, blocks_F))
        gate_up, down = QuantTensor(w13, w13_scale, None, FP8_BLOCK), QuantTensor(w2, w2_scale, None, FP8_BLOCK)
        super().__init__(kernel, StoredExperts(gate_up, down, swiglu_limit))


class PlainMoE(MoeRunner):
    """Top-k mixture of SwiGLU experts with unquantised weights, by the torch reference.

    Shapes (E experts, D hidden, F expert width): w13 bfloat16 or float32 [E, 2F, D], gate rows first; w2 [E, D, F].
    Errors: ValueError naming the operand for a wrong dtype, shape or device.
    """

    def __init__(
        self, w13: torch.Tensor, w2: torch.Tensor, swiglu_limit: float, *, kernel: KernelOrName = "ref.plain_moe"
    ) -> None:
        num_experts, rows, dim = w13.shape
        floats = (torch.bfloat16, torch.float32)
        require("w13", w13, floats, (num_experts, rows // 2 * 2, dim))
        require("w2", w2, floats, (num_experts, dim, rows // 2))
        gate_up, down = (QuantTensor(w, None, None, plain_format(w)) for w in (w13, w2))
        super().__init__(kernel, StoredExperts(gate_up, down, swiglu_limit))
