"""The operations around a grouped product in an engine, as fused Triton kernels: alignment, SwiGLU, weighted sum.

Alignment sorts the routed slots (token * K + k) by expert and pads each expert's list to whole blocks, so that a block
of rows belongs to one expert. Up to 4096 slots one thread block does all of it in one launch; beyond, counting and
scattering are spread over the GPU with one small launch between them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_MOST_SLOTS_IN_ONE_BLOCK = 4096


@dataclass(frozen=True)
class Alignment:
    """sorted_ids int32: slots by expert, padding = number of slots; expert_ids int32, one a block; num_padded [1]."""

    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_padded: torch.Tensor

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The arguments of an indexed product."""
        return {
            "sorted_ids": self.sorted_ids,
            "expert_ids": self.expert_ids,
            "num_tokens_padded": self.num_padded,
        }


def align(topk_ids: torch.Tensor, num_experts: int, block: int) -> Alignment:
    """Sorts routed slots by expert in whole blocks. Shapes: topk_ids int32 [T, K]."""
    num_slots = topk_ids.numel()
    most_blocks = min(num_slots, min(num_slots, num_experts) + num_slots // block)
    padded_experts = triton.next_power_of_2(num_experts)
    new = topk_ids.new_empty
    sorted_ids, expert_ids = new(most_blocks * block), new(most_blocks)
    scratch = new(padded_experts + 1)  # counts, then offsets, of the experts; last the padded total
    if num_slots <= _MOST_SLOTS_IN_ONE_BLOCK:
        slots = max(triton.next_power_of_2(num_slots), 32)
        warps = 16 if slots > 256 else 8
        _align_in_one_block[(1,)](
            topk_ids, scratch, sorted_ids, expert_ids, num_slots, padded_experts, block, slots, num_warps=warps
        )
    else:
        rank = new(num_slots)
        grid = (triton.cdiv(num_slots, 1024),)
        scratch.zero_()
        _count[grid](topk_ids, scratch, rank, num_slots, 1024)
        _lay_out[(1,)](scratch, sorted_ids, expert_ids, num_slots, padded_experts, block, num_warps=8)
        _scatter[grid](topk_ids, scratch, rank, sorted_ids, num_slots, 1024)
    return Alignment(sorted_ids, expert_ids, scratch[padded_experts:])


def swiglu(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    """Computes silu(min(gate, limit)) * clamp(up, -limit, limit). Shapes: bfloat16 [S, 2F], gate first -> [S, F]."""
    num_slots, width = gate_up.shape
    out = gate_up.new_empty(num_slots, width // 2)
    block = min(triton.next_power_of_2(width // 2), 1024)
    _swiglu[(num_slots, triton.cdiv(width // 2, block))](gate_up, out, width // 2, limit, block)
    return out


def combine(y: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Sums each token's weighted slots in float32. Shapes: y bfloat16 [T*K, D], weights [T, K] -> [T, D]."""
    num_tokens, top_k = topk_weights.shape
    out = y.new_empty(num_tokens, y.shape[1])
    block = 512 if num_tokens <= 64 else 1024
    grid = (num_tokens, triton.cdiv(y.shape[1], block))
    _combine[grid](y, topk_weights, out, y.shape[1], top_k, block)
    return out


def _jit(kernel: Any) -> Any:
    return triton.jit(kernel)


@_jit
def _lay_out(scratch, sorted_ids, expert_ids, num_slots, experts: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    expert = tl.arange(0, experts)
    # .cg: counts were written by atomics, which the L1 cache does not see.
    counts = tl.load(scratch + expert, cache_modifier=".cg")
    num_blocks = (counts + block - 1) // block
    end = tl.cumsum(num_blocks, 0)
    begin = end - num_blocks
    for idx in range(tl.max(num_blocks, 0)):
        tl.store(expert_ids + begin + idx, expert, mask=idx < num_blocks)
    for idx in range(block):
        position = counts + idx
        tl.store(sorted_ids + begin * block + position, num_slots, mask=position < num_blocks * block)
    tl.debug_barrier()
    tl.store(scratch + expert, begin * block)
    tl.store(scratch + experts, tl.max(end, 0) * block)


@_jit
def _align_in_one_block(  # type: ignore[no-untyped-def]
    topk_ids,
    scratch,
    sorted_ids,
    expert_ids,
    num_slots,
    experts: tl.constexpr,
    block: tl.constexpr,
    slots: tl.constexpr,
):
    slot = tl.arange(0, slots)
    live = slot < num_slots
    expert = tl.load(topk_ids + slot, mask=live, other=0)
    tl.store(scratch + tl.arange(0, experts), tl.zeros([experts], tl.int32))
    tl.debug_barrier()
    rank = tl.atomic_add(scratch + expert, 1, mask=live)
    tl.debug_barrier()
    _lay_out(scratch, sorted_ids, expert_ids, num_slots, experts, block)
    tl.debug_barrier()
    start = tl.load(scratch + expert, mask=live, other=0, cache_modifier=".cg")
    tl.store(sorted_ids + start + rank, slot, mask=live)


@_jit
def _count(topk_ids, counts, rank, num_slots, width: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0) * width + tl.arange(0, width)
    live = slot < num_slots
    expert = tl.load(topk_ids + slot, mask=live, other=0)
    tl.store(rank + slot, tl.atomic_add(counts + expert, 1, mask=live), mask=live)


@_jit
def _scatter(topk_ids, offsets, rank, sorted_ids, num_slots, width: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0) * width + tl.arange(0, width)
    live = slot < num_slots
    expert = tl.load(topk_ids + slot, mask=live, other=0)
    position = tl.load(offsets + expert, mask=live, other=0) + tl.load(rank + slot, mask=live, other=0)
    tl.store(sorted_ids + position, slot, mask=live)


@_jit
def _swiglu(gate_up, out, width, limit, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=live)


@_jit
def _combine(y, weights, out, width, top_k: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < width
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(top_k):
        weight = tl.load(weights + token * top_k + k)
        total += weight * tl.load(y + (token * top_k + k) * width + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(tl.bfloat16), mask=live)
