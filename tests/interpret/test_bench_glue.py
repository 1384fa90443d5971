"""The kernels that stand around peers in the benchmarks, interpreted."""

import pytest
import torch

from ownpath.bench.peers.glue import align, combine, swiglu
from ownpath.bench.peers.pages import bf16_keys
from ownpath.conformance.attend import make_pool
from ownpath.kernels.attend.ref import take_keys
from ownpath.kernels.mixture import clamped_swiglu as swiglu_reference


@pytest.mark.parametrize(("num_tokens", "num_experts", "block"), [(1, 8, 16), (7, 8, 8), (40, 32, 16), (900, 12, 64)])
def test_alignment_gives_each_block_one_expert_and_each_slot_one_place(num_tokens, num_experts, block) -> None:
    top_k = 6 if num_tokens == 900 else 2  # 5400 slots: the way with several launches
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices.to(torch.int32)
    alignment = align(ids, num_experts, block)
    num_slots, padded = ids.numel(), int(alignment.num_padded[0])
    counts = ids.flatten().bincount(minlength=num_experts)
    assert padded == int(((counts + block - 1) // block * block).sum())
    assert padded <= len(alignment.sorted_ids)
    placed = alignment.sorted_ids[:padded]
    assert torch.equal(placed[placed < num_slots].sort().values, torch.arange(num_slots, dtype=torch.int32))
    assert bool((placed <= num_slots).all())
    for idx, expert in enumerate(alignment.expert_ids[: padded // block].tolist()):
        slots = placed[idx * block : (idx + 1) * block]
        slots = slots[slots < num_slots].long()
        assert len(slots) > 0
        assert bool((ids.flatten()[slots] == expert).all())


def test_swiglu_is_the_clamped_one() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(5, 2 * 48, generator=generator) * 12).to(torch.bfloat16)
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = swiglu_reference(gate, up, 10.0)
    torch.testing.assert_close(swiglu(gate_up, 10.0).float(), expected, rtol=2**-8, atol=0)


def test_combine_is_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(3 * 2, 40, generator=generator).to(torch.bfloat16)
    weights = torch.rand(3, 2, generator=generator)
    expected = (y.double().view(3, 2, 40) * weights.double()[..., None]).sum(dim=1)
    # One rounding to bfloat16 (2^-8) of a float32 sum of two terms, each as large as 4.
    torch.testing.assert_close(combine(y, weights).double(), expected, rtol=2**-8, atol=8 * 2**-22)


def test_keys_of_pages_become_bf16_exactly() -> None:
    rows = torch.randperm(192)[:21].int()
    pages = make_pool(rows, 192, 64, True, torch.Generator().manual_seed(0))
    out = torch.full((21, 512), torch.nan, dtype=torch.bfloat16)
    bf16_keys(pages, rows, 64, out)
    assert torch.equal(out, take_keys(pages, rows.long(), torch.bfloat16))
