"""Weights that are drawn: of sensible size, valid, and the same tensor for whoever takes a part of it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ownpath.bench.published import FLASH, SMALL
from ownpath.bench.synthetic import layer_config
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.config import ModelConfig, Parallel
from ownpath.formats import NVFP4
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps
from ownpath.runners.make import make_runners
from ownpath.splits import ExpertSplit
from ownpath.weights.load import load_weights

CPU = torch.device("cpu")
CAPS = Caps("cpu", "CPU")
FIELDS = SMALL | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1}
FIELDS |= {"num_nextn_predict_layers": 0, "vocab_size": 256}


@pytest.fixture(scope="module", params=["nvidia", "full"])
def index(request: pytest.FixtureRequest) -> CheckpointIndex:
    return drawn_checkpoint(ModelConfig.from_dict(FIELDS), request.param)


def plan_of(index: CheckpointIndex, parallel: Parallel = Parallel()) -> Plan:  # noqa: B008 (frozen)
    return make_plan(ModelConfig.from_dict(FIELDS), index, CAPS, parallel=parallel)


def test_every_tensor_is_finite_valid_and_of_its_own(index: CheckpointIndex) -> None:
    read, seen = TensorReader(index), set()
    for name, info in index.tensors.items():
        tensor = read(name)
        assert tuple(tensor.shape) == info.shape, name
        if tensor.is_floating_point():
            values = tensor.float()
            assert values.isfinite().all(), name
            assert not name.endswith("weight_scale") or bool(((values >= 0.5) & (values < 2)).all()), name
        if tensor.nbytes >= 64:  # few bits may be the same by chance
            digest = hash(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            assert digest not in seen, f"{name} is another tensor too"
            seen.add(digest)


def test_rows_are_rows_of_the_whole(index: CheckpointIndex) -> None:
    read = TensorReader(index)
    for name in ("embed.weight", "layers.0.ffn.gate.tid2eid", "layers.1.attn.wq_b.scale", "layers.2.hc_ffn_fn"):
        if name in index:
            whole = read(name)
            assert torch.equal(read.rows_of(index[name], 2, 5).view(torch.uint8), whole[2:5].view(torch.uint8))
    ids = torch.tensor([9, 3, 9])
    assert torch.equal(read.rows("embed.weight", ids), read("embed.weight")[ids])


@pytest.mark.parametrize("experts", list(ExpertSplit))
def test_ranks_have_parts_of_the_same_tensors(index: CheckpointIndex, experts: ExpertSplit) -> None:
    """Each destination of each rank holds the region that is planned of what a reader reads whole."""
    read, num_cut = TensorReader(index), 0
    for rank in range(2):
        plan = plan_of(index, Parallel(rank, 2, experts=experts))
        weights = load_weights(plan, index, CPU)
        found = [one for operand in weights.operands for one in operand.destinations]
        assert len({one.key for one in found}) == len(found)
        for one in found:
            wanted = read(one.key)
            if one.region is not None:
                num_cut += one.region.dim == 1
                wanted = wanted.narrow(one.region.dim, one.region.start, one.region.stop - one.region.start)
            if one.role in ("global_scale", "input_scale"):
                assert (one.target == wanted.float()).all(), one.key
            else:
                assert torch.equal(one.target.view(torch.uint8), wanted.contiguous().view(torch.uint8)), one.key
        for key, target in weights.params.items():
            region, wanted = plan.param_regions.get(key), read(key)
            wanted = wanted if region is None else wanted[region.start : region.stop]
            assert torch.equal(target, wanted.to(target.dtype)), key
    assert num_cut > 0


def test_another_seed_draws_other_values(index: CheckpointIndex) -> None:
    assert index.drawn is not None
    other, name = replace(index.drawn, seed=1, _seeds={}), "layers.0.ffn.experts.0.w1.weight"
    same = (other.whole(index[name], CPU) == index.drawn.whole(index[name], CPU)).float().mean()
    assert same < 0.02, "of bytes, one of 256 is the same by chance"


def test_codes_are_uniform_and_neighbours_do_not_depend_on_each_other() -> None:
    """Over 2^20 bytes: each value within six standard deviations of a 256th, each step between neighbours too."""
    index = drawn_checkpoint(ModelConfig.from_dict(FLASH | {"num_nextn_predict_layers": 0}))
    assert index.drawn is not None
    codes = index.drawn.rows(index["layers.7.ffn.experts.200.w1.weight"], 0, 512, CPU).int()
    count, sigma = codes.numel(), math.sqrt(codes.numel() / 256)
    for values in (codes, *((one - other) % 256 for one, other in pairwise((codes, codes.roll(1), codes.roll(1, 0))))):
        counts = values.flatten().bincount(minlength=256)
        assert (counts - count / 256).abs().max() < 6 * sigma


def test_products_keep_the_size_of_their_input() -> None:
    """Standard deviations near 1/sqrt(in), different global scales for fused shards, the same values twice."""
    config = layer_config("small", "csa", "hash")
    index = drawn_checkpoint(config, "full")
    plan = make_plan(config, index, CAPS)
    weights, again = (load_weights(plan, index, CPU) for _ in range(2))
    for op, operand, same in zip(plan.ops, weights.operands, again.operands, strict=True):
        for name, buffers in operand.buffers.items():
            for buffer, other in zip(buffers, same.buffers[name], strict=True):
                assert torch.equal(buffer.view(torch.uint8), other.view(torch.uint8))
        if op.encoding.format is NVFP4 and "weight_scale_2" in operand.buffers and len(op.spec.modules) > 1:
            assert len(operand.buffers["weight_scale_2"][0].unique()) == len(op.spec.modules)
    runners = make_runners(plan, weights.operands)
    x = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for slot in ("layers.0.attn.wqa_wkv", "layers.0.ffn.gate", "layers.0.ffn.shared_experts.w13"):
        assert 0.5 < runners[slot](x).std() < 2, slot
