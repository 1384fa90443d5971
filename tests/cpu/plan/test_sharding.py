"""Two ranks' parts of every tensor: they tile it, they are what is read from the file, and a bad cut is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import LAYOUTS, SMALL, random_checkpoint

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8, PLAIN_BF16, ModuleSpec, ParamSpec
from ownpath.config import ONE_RANK, ConfigError, EngineConfig, ModelConfig, Parallel
from ownpath.loading import load_model, plan_model
from ownpath.plan.plan import Plan
from ownpath.plan.sharding import Cut, Region, ShardingError, cut_of, param_region, part_region, regions_of
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.operands import Destination
from ownpath.weights.readers import ReadOptions

WIDE = {"moe_intermediate_size": 256, "o_lora_rank": 128, "hidden_size": 128}
"""Sizes that divide into two ranks of whole blocks of 128."""
CONFIG = ModelConfig.from_dict(SMALL | WIDE)


def sharded(plan: Plan, parallel: Parallel) -> Plan:
    """The plan of one of several ranks, as ``make_plan`` will make it once there is a kernel that exchanges sums."""
    ops = tuple(replace(op, regions=regions_of(plan.config, op.spec.modules, op.encoding, parallel)) for op in plan.ops)
    regions = {param.key: param_region(param, parallel) for param in plan.params}
    return replace(plan, ops=ops, param_regions={key: region for key, region in regions.items() if region is not None})


def slots_of(weights: LoadedWeights, plan: Plan) -> Iterator[Destination]:
    for operand in weights.operands:
        yield from operand.destinations
    for key, target in weights.params.items():
        yield Destination(key, target, region=plan.param_regions.get(key))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("chunk_bytes", [200, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_tile_every_tensor(layout: str, chunk_bytes: int, tmp_path: Path) -> None:
    """Read from the file in chunks that end inside rows, laid side by side: what one rank reads alone, byte by byte."""
    random_checkpoint(tmp_path, layout, **WIDE)
    plan, index = plan_model(tmp_path, "cpu"), CheckpointIndex.open(tmp_path)
    plans = [sharded(plan, Parallel(rank, 2)) for rank in range(2)]
    cpu, read_options = torch.device("cpu"), ReadOptions(2, chunk_bytes)
    whole = {slot.key: slot for slot in slots_of(load_weights(plan, index, cpu), plan)}
    halves = [
        {slot.key: slot for slot in slots_of(load_weights(one, index, cpu, read_options=read_options), one)}
        for one in plans
    ]
    num_cut = 0
    for key, slot in whole.items():
        regions = [half[key].region for half in halves]
        targets = [half[key].target for half in halves]
        if regions[0] is None or regions[1] is None:
            assert regions == [None, None], key
            assert all(torch.equal(as_bytes(target), as_bytes(targets[0])) for target in targets)
            if slot.role not in ("global_scale", "input_scale"):
                assert torch.equal(as_bytes(slot.target), as_bytes(targets[0])), key
            continue
        num_cut += 1
        dim = regions[0].dim
        assert (regions[0].start, regions[0].stop) == (0, regions[1].start), key
        assert regions[1].stop == slot.target.shape[dim], key
        both = torch.cat([target.view(torch.uint8).view(*target.shape, -1) for target in targets], dim=dim)
        assert torch.equal(both.flatten(-2), slot.target.view(torch.uint8).view(*slot.target.shape, -1).flatten(-2))
    assert num_cut >= 5 * (2 + 3 * CONFIG.n_routed_experts)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("layers.3.attn.wq_b", Cut.ROWS),
        ("layers.3.attn.attn_sink", Cut.ROWS),
        ("layers.3.attn.wo_a", Cut.ROWS),
        ("layers.3.attn.wo_b", Cut.COLUMNS),
        ("layers.3.ffn.experts.17.w1", Cut.ROWS),
        ("layers.3.ffn.experts.17.w2", Cut.COLUMNS),
        ("mtp.0.ffn.shared_experts.w3", Cut.ROWS),
        ("mtp.0.ffn.shared_experts.w2", Cut.COLUMNS),
        ("head", Cut.ROWS),
        ("layers.3.attn.indexer.wq_b", None),
        ("layers.3.attn.wkv", None),
        ("layers.3.ffn.gate", None),
        ("embed.weight", None),
    ],
)
def test_rules(name: str, cut: Cut | None) -> None:
    assert cut_of(name) is cut


def test_one_rank_has_everything() -> None:
    module = ModuleSpec("layers.0.attn.wq_b", (256, 48))
    assert regions_of(CONFIG, [module], PLAIN_BF16, ONE_RANK) == ()
    assert param_region(ParamSpec("layers.0.attn.attn_sink", (4,), ("F32",)), ONE_RANK) is None


def test_scales_follow_their_matrix() -> None:
    module = ModuleSpec("layers.0.attn.wo_b", (384, 1024))
    (region,) = regions_of(CONFIG, [module], NATIVE_FP8, Parallel(1, 4))
    assert region == Region(1, 256, 512)
    assert part_region(NATIVE_FP8.part("scale"), module, region) == Region(1, 2, 4)
    (region,) = regions_of(CONFIG, [module], MODELOPT_NVFP4, Parallel(1, 4))
    parts = {role: part_region(MODELOPT_NVFP4.part(role), module, region) for role in ("qdata", "scale")}
    assert parts == {"qdata": Region(1, 128, 256), "scale": Region(1, 16, 32)}
    assert part_region(MODELOPT_NVFP4.part("global_scale"), module, region) is None


@pytest.mark.parametrize(
    ("module", "ranks", "words"),
    [
        (ModuleSpec("layers.0.attn.wq_b", (3 * 64, 48)), 2, "192 rows do not divide into 2 ranks of whole 64s"),
        (ModuleSpec("layers.0.ffn.experts.0.w2", (64, 48)), 2, "48 columns do not divide into 2 ranks of whole 16s"),
        (ModuleSpec("head", (97, 64)), 2, "97 rows do not divide into 2 ranks of whole 1s"),
    ],
)
def test_a_cut_through_a_head_or_a_block_is_refused(module: ModuleSpec, ranks: int, words: str) -> None:
    with pytest.raises(ShardingError, match=f"{module.name}: {words}"):
        regions_of(CONFIG, [module], MODELOPT_NVFP4, Parallel(0, ranks))


def test_more_than_one_rank_is_refused_by_name(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    with pytest.raises(ShardingError, match=r"2 ranks: attn.wo_b and ffn.w2 are cut by columns"):
        load_model(tmp_path, EngineConfig(max_model_len=64, parallel=Parallel(1, 2)))


@pytest.mark.parametrize("parallel", [(2, 2), (-1, 1), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(parallel: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="ranks count from 0 to size - 1"):
        Parallel(*parallel)
