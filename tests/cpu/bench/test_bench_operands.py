"""Routing and operands: what every contender is given."""

import pytest
import torch

from ownpath.bench.operands import random_activations, random_fp8, random_moe, random_nvfp4
from ownpath.bench.rotation import COLD_BYTES, num_calls
from ownpath.bench.routing import TopkRouting, uniform_routing
from ownpath.bench.shapes import LinearShape, MoeShape, linear_shape, moe_shape
from ownpath.numerics import decode_fp8_block, decode_nvfp4_blocks

TINY = moe_shape("tiny")


def test_each_token_goes_to_top_k_different_experts() -> None:
    shape = MoeShape("", num_experts=16, hidden=128, inter=128, top_k=6)
    routing = uniform_routing(shape, 200, seed=3, device="cpu")
    assert routing.topk_ids.shape == routing.topk_weights.shape == (200, 6)
    assert routing.topk_ids.dtype == torch.int32
    assert all(len(set(row)) == 6 for row in routing.topk_ids.tolist())
    torch.testing.assert_close(routing.topk_weights.sum(dim=1), torch.ones(200))
    # 1200 choices over 16 experts: 75 each, with a standard deviation of sqrt(200 x 6/16 x 10/16) = 6.9.
    counts = routing.topk_ids.flatten().bincount(minlength=16)
    assert int((counts - 75).abs().max()) < 6 * 7


def test_distinct_experts_counts_those_with_a_token() -> None:
    ids = torch.tensor([[0, 3], [3, 5], [5, 0]], dtype=torch.int32)
    assert TopkRouting(ids, torch.ones(3, 2)).distinct_experts == 3


def test_seeds_reproduce_and_differ() -> None:
    first, again, other = (uniform_routing(TINY, 9, seed, "cpu").topk_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    made = [random_nvfp4(linear_shape("tiny"), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0].weight, made[1].weight)
    assert not torch.equal(made[0].weight, made[2].weight)


def test_moe_operands_are_valid_and_of_unit_scale() -> None:
    operands = random_moe(TINY, torch.Generator().manual_seed(0))
    assert operands.w13.shape == (8, 256, 128)
    assert operands.w2_scale.shape == (8, 256, 8)
    for scale in (operands.w13_scale, operands.w2_scale):
        assert float(scale.float().min()) >= 32
        assert float(scale.float().max()) <= 448
    assert len(operands.w13.unique()) == 256
    for weight, scale, scale_2 in (
        (operands.w13, operands.w13_scale, operands.w13_scale_2),
        (operands.w2, operands.w2_scale, operands.w2_scale_2),
    ):
        values = decode_nvfp4_blocks(weight, scale) * scale_2[:, None, None]
        gain = values.square().mean(dim=(1, 2)).sqrt() * values.shape[-1] ** 0.5
        # 2^-1 to 2^1 by the global scale's factor, and a few percent by chance.
        assert float(gain.min()) > 0.45
        assert float(gain.max()) < 2.2
        assert float(gain.std()) > 0.05, "experts must differ in scale"


def test_fp8_operands_are_finite_and_cover_the_codes() -> None:
    operands = random_fp8(LinearShape("", 384, 256), torch.Generator().manual_seed(0))
    codes = operands.weight.view(torch.uint8).unique().tolist()
    assert len(codes) == 254  # all but the two NaN
    assert operands.scale.shape == (3, 2)
    values = decode_fp8_block(operands.weight, operands.scale)
    assert bool(values.isfinite().all())
    assert 0.2 < float(values.std()) * 256**0.5 < 5


def test_activations_have_unit_variance() -> None:
    x = random_activations(64, 512, torch.Generator().manual_seed(0))
    assert x.dtype == torch.bfloat16
    assert float(x.float().std()) == pytest.approx(1, abs=0.03)


def test_a_round_leaves_nothing_of_its_first_call_in_cache() -> None:
    assert num_calls(COLD_BYTES / 10) == 10
    assert num_calls(COLD_BYTES / 10.5) == 11
    assert num_calls(1e12) == 4
    assert num_calls(1e12, least=8) == 8


def test_a_clone_shares_no_memory() -> None:
    operands = random_nvfp4(linear_shape("tiny"), torch.Generator().manual_seed(0))
    before = operands.weight.clone()
    operands.clone().weight.zero_()
    assert torch.equal(operands.weight, before)
