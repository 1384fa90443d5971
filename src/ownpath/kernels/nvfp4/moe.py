"""``cute.nvfp4_moe``: routed experts as one call of at most five launches, each started while its predecessor drains.

    align -> (permute, for long prompts) -> gate_up with SwiGLU -> down -> combine

See ``moe_sm90`` for the schedule they share and ``gemm_sm90`` for the products. A token's bits depend neither on
the other tokens nor on their number, except that up to 4096 (token, slot) pairs the experts' outputs are summed before
they are rounded to BF16; the invariant kernel always does so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ownpath.kernels.nvfp4 import launch
from ownpath.kernels.nvfp4.choose import WIDE_PAIRS, MoeChoice, choose_moe, moe_choice, moe_table
from ownpath.kernels.nvfp4.config import ALIGN_THREADS, AlignConfig, CombineConfig, PermuteConfig
from ownpath.kernels.nvfp4.layout import check_scales, gate_up_rows, pack_weight_, plain_rows, unpack_weight
from ownpath.kernels.nvfp4.linear import require_packable, require_rows

DIM_MULTIPLE = 128
MAX_EXPERTS = ALIGN_THREADS - 1
ALIGN_CTAS = 8
PAIRS_PER_ALIGN_WARP = 32
PAIRS_PER_ALIGN_CTA = 4096
"""Above, a cluster sorts the pairs: one CTA takes 12 us for 6144 of them."""


@dataclass(frozen=True)
class MoeOperand:
    """Packed experts."""

    w13: launch.PackedWeight
    w2: launch.PackedWeight
    num_experts: int

    @property
    def hidden(self) -> int:
        return self.w13.num_cols

    @property
    def inter(self) -> int:
        return self.w2.num_cols


@dataclass(frozen=True)
class MoeWorkspace:
    """Scratch for calls of at most ``len(hidden)`` (token, slot) pairs; not to be shared between streams.

    Shapes (P pairs, D hidden, F width): schedule int32; sorted bfloat16 [P, D] (empty when rows are looked up one by
    one); hidden bfloat16 [P, F]; rows uint8, viewed as float32 or bfloat16 [P, D]; out bfloat16 [tokens, D], the
    result.
    """

    schedule: torch.Tensor
    sorted: torch.Tensor
    hidden: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Where each token goes. Shapes: ids int32 or int64 [T, K]; weights float32 [T, K]; expert_map int32 [global]."""

    ids: torch.Tensor
    weights: torch.Tensor
    num_shared: int
    expert_map: torch.Tensor | None


Restored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes uint8 [N, K/2], scale E4M3 [N, K/16], global_scale float32 [2]."""


def _restored(weight: launch.PackedWeight, rows: torch.Tensor, num_experts: int, expert: int) -> Restored:
    codes, scales = (part.view(num_experts, -1)[expert] for part in (weight.codes, weight.scales))
    unpacked = unpack_weight(codes, scales, rows.to(codes.device), weight.num_cols)
    return (*unpacked, weight.global_scale[expert])


def align_config(wide_ids: bool, mapped: bool, num_shared: int, pairs: int) -> AlignConfig:
    """One warp, one CTA or a cluster, by the number of (token, slot) pairs."""
    ctas = ALIGN_CTAS if pairs > PAIRS_PER_ALIGN_CTA else 1
    return AlignConfig(wide_ids, mapped, num_shared, ctas, few=pairs <= PAIRS_PER_ALIGN_WARP)


class Nvfp4MoeKernel:
    """Packs experts in place and runs them."""

    def __init__(self, is_batch_invariant: bool, choose: Callable[..., MoeChoice] = choose_moe) -> None:
        self.is_batch_invariant = is_batch_invariant
        self._choose = choose

    def prepare(
        self,
        w13: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        w2: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> MoeOperand:
        """Repacks the stacks in place, one expert at a time, so that two copies of the experts never exist.

        Shapes: as ``kernels.nvfp4.ref``; codes and scales contiguous, on one CUDA device.
        Errors: ValueError naming the operand for sizes that are not multiples of 128, too many experts, or a bad
        block scale; nothing is repacked then.
        """
        num_experts, rows, packed = w13[0].shape
        hidden, inter = 2 * packed, rows // 2
        if hidden % DIM_MULTIPLE or inter % DIM_MULTIPLE:
            raise ValueError(f"experts are {hidden} -> {inter}: both must be multiples of {DIM_MULTIPLE}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"w13 holds {num_experts} experts, at most {MAX_EXPERTS} are supported")
        for name, (codes, scale, _) in (("w13", w13), ("w2", w2)):
            require_packable(name, codes)
            require_packable(f"{name}_scale", scale)
            check_scales(f"{name}_scale", scale)
        for (codes, scale, _), order in ((w13, gate_up_rows(2 * inter)), (w2, plain_rows(hidden))):
            placed = order.to(codes.device)
            for expert in range(num_experts):
                pack_weight_(codes[expert], scale[expert], placed)
        both = w2[2][:, None].expand(-1, 2).contiguous()
        gate_up_scale = w13[2].contiguous()
        # Kernels read weights before they wait for their predecessor: what wrote them must be over by then.
        torch.cuda.synchronize(both.device)
        return MoeOperand(
            launch.PackedWeight(w13[0], w13[1], gate_up_scale, 2 * inter, hidden),
            launch.PackedWeight(w2[0], w2[1], both, hidden, inter),
            num_experts,
        )

    def restore(self, operand: MoeOperand, expert: int) -> tuple[Restored, Restored]:
        """One expert's w13 and w2 as ``prepare`` took them; the kernel holds the global scale of w2 twice: [2]."""
        sides = (operand.w13, gate_up_rows), (operand.w2, plain_rows)
        w13, w2 = (_restored(weight, rows(weight.num_rows), operand.num_experts, expert) for weight, rows in sides)
        return w13, w2

    def choose(self, pairs: int, operand: MoeOperand) -> MoeChoice:
        """The kernels of a call with ``pairs`` (token, slot) pairs."""
        return self._choose(pairs, operand.num_experts, operand.hidden, operand.inter, self.is_batch_invariant)

    def variant(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        operand: MoeOperand,
        swiglu_limit: float,
    ) -> str:
        """Names of the products that a call with these arguments launches."""
        choice = self.choose(topk_ids.numel(), operand)
        return f"{choice.gate_up.name} {choice.down.name}"

    def configs(self, operand: MoeOperand) -> list[object]:
        """Every kernel that a call without shared experts or an expert map may launch."""
        counts = (1, PAIRS_PER_ALIGN_CTA, PAIRS_PER_ALIGN_CTA + 1)
        found: list[object] = [align_config(wide, False, 0, pairs) for wide in (False, True) for pairs in counts]
        found += [PermuteConfig(), CombineConfig(0, True)]
        if not self.is_batch_invariant:
            found.append(CombineConfig(0, False))
        for _, knobs in moe_table(operand.hidden, operand.inter):
            for wide in (True,) if self.is_batch_invariant else (False, True):
                choice = moe_choice(knobs, operand.hidden, operand.inter, wide)
                found += [choice.gate_up, choice.down]
        return list(dict.fromkeys(found))

    def workspace(self, operand: MoeOperand, num_tokens: int, num_slots: int) -> MoeWorkspace:
        """Scratch for calls of up to ``num_tokens`` tokens with this many slots, shared experts included."""
        device = operand.w13.codes.device
        pairs = num_tokens * num_slots
        # The narrowest tile of any smaller call makes the longest schedule, and a smaller call may keep float32.
        tiles = min(operand.num_experts, pairs) + pairs // 8 + 1
        schedule = torch.empty(4 + 4 * tiles + 2 * pairs + 4, dtype=torch.int32, device=device)
        hidden = torch.empty(pairs, operand.inter, dtype=torch.bfloat16, device=device)
        row_bytes = 4 * pairs if self.is_batch_invariant else max(4 * min(pairs, WIDE_PAIRS), 2 * pairs)
        rows = torch.empty(row_bytes * operand.hidden, dtype=torch.uint8, device=device)
        sorted_rows = torch.empty(pairs, operand.hidden, dtype=torch.bfloat16, device=device)
        out = torch.empty(num_tokens, operand.hidden, dtype=torch.bfloat16, device=device)
        return MoeWorkspace(schedule, sorted_rows, hidden, rows, out)

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        operand: MoeOperand,
        swiglu_limit: float,
        *,
        num_shared: int = 0,
        expert_map: torch.Tensor | None = None,
        workspace: MoeWorkspace | None = None,
    ) -> torch.Tensor:
        """y[t] = sum over slots of weight * expert(x[t]), and over the last num_shared experts of expert(x[t]).

        Shapes: x bfloat16 [T, D]; topk_ids int32 or int64 [T, K]; topk_weights float32 [T, K]; expert_map int32
            [global experts], the local expert or -1; y bfloat16 [T, D]: with a workspace, a view of its
            ``out`` that the next call overwrites.
        Errors: ValueError naming a tensor the kernels cannot take. Ids outside the experts contribute nothing.
        """
        num_tokens, slots = topk_ids.shape[0], topk_ids.shape[1] + num_shared
        if not 0 <= num_shared < operand.num_experts:
            raise ValueError(f"num_shared is {num_shared}, there are {operand.num_experts} experts")
        _check(x, topk_ids, topk_weights, operand, expert_map)
        pairs = num_tokens * slots
        choice = self.choose(pairs, operand)
        if workspace is None:
            workspace = self.workspace(operand, num_tokens, slots)
        elif len(workspace.hidden) < pairs or len(workspace.out) < num_tokens:
            held = f"{len(workspace.out)} tokens and {len(workspace.hidden)} (token, slot) pairs"
            raise ValueError(f"workspace holds {held}, this call has {num_tokens} and {pairs}")
        if not num_tokens:
            return workspace.out[:0]
        routing = Routing(topk_ids, topk_weights, num_shared, expert_map)
        _run(choice, x, routing, operand, swiglu_limit, workspace)
        return workspace.out[:num_tokens]


def _check(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    operand: MoeOperand,
    expert_map: torch.Tensor | None,
) -> None:
    require_rows("x", x, operand.hidden)
    routed = (len(x), topk_ids.shape[1])
    for name, tensor, dtypes in (
        ("topk_ids", topk_ids, (torch.int32, torch.int64)),
        ("topk_weights", topk_weights, (torch.float32,)),
    ):
        if tensor.dtype not in dtypes or tuple(tensor.shape) != routed or not tensor.is_contiguous():
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{name} must be contiguous {wanted} {list(routed)}, found {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if expert_map is not None and (expert_map.dtype is not torch.int32 or expert_map.device != x.device):
        raise ValueError(
            f"expert_map must be torch.int32 on {x.device}, found {expert_map.dtype} on {expert_map.device}"
        )


def _run(
    choice: MoeChoice,
    x: torch.Tensor,
    routing: Routing,
    operand: MoeOperand,
    swiglu_limit: float,
    workspace: MoeWorkspace,
) -> None:
    ids, num_shared = routing.ids, routing.num_shared
    pairs = ids.shape[0] * (ids.shape[1] + num_shared)
    rows = _rows(workspace, pairs, operand.hidden, choice.is_wide)
    tiles = min(operand.num_experts, pairs) + pairs // choice.tile_rows + 1
    launch.align(
        align_config(ids.dtype == torch.int64, routing.expert_map is not None, num_shared, pairs),
        ids,
        ids if routing.expert_map is None else routing.expert_map,
        workspace.schedule,
        operand.num_experts,
        choice.tile_rows,
        4 + 4 * tiles,
    )
    source = x
    if not choice.gate_up.gather:
        source = workspace.sorted[:pairs]
        launch.permute(x, workspace.schedule, source)
    hidden = workspace.hidden[:pairs]
    num_sms = launch.num_sms(x.device.index)
    for config, given, weight, result in (
        (choice.gate_up, source, operand.w13, hidden),
        (choice.down, hidden, operand.w2, rows),
    ):
        most = tiles * (weight.num_rows // (64 * config.m64_per_tile)) // config.cluster
        grid = min(config.per_sm * num_sms // config.cluster, most) * config.cluster
        launch.gemm(config, given, weight, result, workspace.schedule, 0, grid, swiglu_limit)
    launch.combine(
        CombineConfig(num_shared, choice.is_wide), rows, workspace.schedule, routing.weights, workspace.out[: len(ids)]
    )


def _rows(workspace: MoeWorkspace, pairs: int, hidden: int, wide: bool) -> torch.Tensor:
    dtype = torch.float32 if wide else torch.bfloat16
    return workspace.rows[: pairs * hidden * dtype.itemsize].view(dtype).view(pairs, hidden)


nvfp4_moe = Nvfp4MoeKernel(is_batch_invariant=False)
nvfp4_moe_invariant = Nvfp4MoeKernel(is_batch_invariant=True)
