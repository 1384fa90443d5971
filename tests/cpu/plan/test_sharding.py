"""Two ranks' parts of every tensor: they tile it, they are what is read from the file, and a bad cut is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYOUTS, SMALL, random_checkpoint

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8, PLAIN_BF16, ModuleSpec, ParamSpec
from ownpath.config import ONE_RANK, ConfigError, EngineConfig, ModelConfig, Parallel
from ownpath.inspect.memory import replicated_bytes, weights_bytes
from ownpath.loading import load_model, plan_model, planned
from ownpath.official import Step
from ownpath.plan.plan import Plan
from ownpath.plan.sharding import Cut, Region, ShardingError, cut_of, param_region, part_region, regions_of
from ownpath.plan.tiling import tiling_faults
from ownpath.splits import AttentionSplit, ExpertSplit
from ownpath.weights.load import LoadedWeights, load_weights
from ownpath.weights.operands import Destination
from ownpath.weights.readers import ReadOptions

WIDE = {"moe_intermediate_size": 256, "o_lora_rank": 128, "hidden_size": 128}
"""Sizes that divide into two ranks of whole blocks of 128."""
CONFIG = ModelConfig.from_dict(SMALL | WIDE)


def plans_of(folder: Path, size: int, *splits: AttentionSplit | ExpertSplit) -> list[Plan]:
    engines = [EngineConfig(parallel=Parallel(rank, size, *splits)) for rank in range(size)]  # type: ignore[arg-type]
    return [planned(folder, engine)[0] for engine in engines]


def slots_of(weights: LoadedWeights, plan: Plan) -> Iterator[Destination]:
    for operand in weights.operands:
        yield from operand.destinations
    for key, target in weights.params.items():
        yield Destination(key, target, region=plan.param_regions.get(key))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize(
    ("layout", "chunk_bytes"),
    [
        pytest.param(layout, chunk_bytes, marks=pytest.mark.slow if (idx + at) % 2 else ())
        for idx, layout in enumerate(LAYOUTS)
        for at, chunk_bytes in enumerate((200, 4096))
    ],
)
def test_two_ranks_tile_every_tensor(layout: str, chunk_bytes: int, tmp_path: Path) -> None:
    """Read from the file in chunks that end inside rows, laid side by side: what one rank reads alone, byte by byte."""
    random_checkpoint(tmp_path, layout, **WIDE)
    plan, index = plan_model(tmp_path, "cpu"), CheckpointIndex.open(tmp_path)
    plans = plans_of(tmp_path, 2)
    assert not tiling_faults(plans)
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


@pytest.mark.parametrize("experts", list(ExpertSplit))
@pytest.mark.parametrize("attention", list(AttentionSplit))
def test_the_plans_of_all_ranks_tile_the_checkpoint(
    attention: AttentionSplit, experts: ExpertSplit, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path, "modelopt-experts-only", **WIDE)
    plans = plans_of(tmp_path, 2, attention, experts)
    assert not tiling_faults(plans)
    keys = [{key for op in plan.ops for key in op.regions_by_key} for plan in plans]
    both = {key for key in keys[0] & keys[1] if ".ffn.experts." in key}
    assert bool(both) == (experts is ExpertSplit.WIDTH)
    assert plans[0].ignored == plans[1].ignored == {}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"region": Region(0, 0, 96)}, "rank 1's rows 128 to 256 are another rank's too"),
        ({"region": Region(0, 0, 64)}, "rows 64 to 128 are no rank's"),
        ({"region": Region(1, 0, 24)}, "ranks cut it along different dimensions"),
        ({"region": None}, "rank 0 has all of it, and ranks 0, 1 have some"),
        ({"rank": 1}, "rank 1 is at place 0"),
        ({"op": "layers.1.attn.wqa_wkv", "region": Region(0, 0, 16)}, "rank 0 has rows 0 to 16 of it, and every rank"),
        ({"without": "layers.1.attn.wq_b"}, "rank 1 alone plans it"),
    ],
)
def test_ranks_that_do_not_tile_are_found(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16")
    plans = plans_of(tmp_path, 2)
    assert not tiling_faults(plans)
    slot = change.get("op", "layers.1.attn.queries")
    if "region" in change:
        region = change["region"]
        if fault.startswith("rank 1's"):
            region = Region(0, 0, 160)
        plans[0] = replace(
            plans[0],
            ops=tuple(
                replace(op, regions=(region, *op.regions[1:])) if op.spec.slot == slot else op for op in plans[0].ops
            ),
        )
    elif "rank" in change:
        plans.reverse()
    else:
        plans[0] = replace(plans[0], ops=tuple(op for op in plans[0].ops if op.spec.slot != slot))
    assert any(fault in found for found in tiling_faults(plans)), tiling_faults(plans)


def test_an_expert_that_two_ranks_have_is_found(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16")
    first = plans_of(tmp_path, 2, AttentionSplit.DATA, ExpertSplit.IDS)[0]
    twice = replace(first, parallel=Parallel(1, 2, AttentionSplit.DATA, ExpertSplit.IDS))
    faults = tiling_faults([first, twice])
    assert any("experts.0.w1" in fault and "ranks 0, 1 have some" in fault for fault in faults)
    assert any("experts.7.w1" in fault and "no rank has it" in fault for fault in faults)


@pytest.mark.parametrize(
    ("changes", "parallel", "words"),
    [
        ({}, Parallel(0, 4), r"layers.0.attn.wo_a: 64 rows do not divide into 4 ranks of whole 32s"),
        ({}, Parallel(0, 3), r"layers.0.attn.wq_b: 256 rows do not divide into 3 ranks of whole 64s"),
        (
            {"n_routed_experts": 9},
            Parallel(0, 2, AttentionSplit.DATA, ExpertSplit.IDS),
            r"layers.0.ffn.experts: 9 experts do not divide into 2 ranks",
        ),
        ({"vocab_size": 97}, Parallel(0, 2), r"head: 97 rows do not divide into 2 ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_by_module_and_size(
    changes: dict[str, int], parallel: Parallel, words: str, tmp_path: Path
) -> None:
    random_checkpoint(tmp_path, "bf16", **changes)
    with pytest.raises(ShardingError, match=words):
        planned(tmp_path, EngineConfig(parallel=parallel))


def test_a_cut_through_a_block_of_an_official_input_is_refused(tmp_path: Path) -> None:
    """Inputs of MXFP4 experts are quantised in blocks of 128; a rank's 32 of 64 columns would have other scales."""
    random_checkpoint(tmp_path, "deepseek-native", **(WIDE | {"moe_intermediate_size": 128}))
    engine = EngineConfig(parallel=Parallel(0, 2, AttentionSplit.DATA), official=frozenset({Step.FP8_INPUTS}))
    with pytest.raises(ShardingError, match=r"experts.0.w2: 128 columns, 64 of them a rank's, .* blocks of 128"):
        planned(tmp_path, engine)


def test_a_bad_scale_is_found_by_the_rank_that_has_it(tmp_path: Path) -> None:
    """Of w2's scales [128, 16] rank 1 has columns 8 to 16; the place is told as in the file."""
    random_checkpoint(tmp_path, "full-nvfp4", **WIDE)
    index = CheckpointIndex.open(tmp_path)
    info = index["layers.1.ffn.experts.3.w2.weight_scale"]
    assert info.shape == (128, 16)
    with info.file.open("r+b") as shard:
        shard.seek(info.start + 5 * 16 + 9)
        shard.write(b"\x7f")  # NaN in E4M3
    first, second = plans_of(tmp_path, 2)
    load_weights(first, index, torch.device("cpu"))
    for chunk_bytes in (64, 4096):
        read_options = ReadOptions(1, chunk_bytes)
        with pytest.raises(CheckpointError, match=r"experts.3.w2.weight_scale.*block scale \[5, 9\] is NaN"):
            load_weights(second, index, torch.device("cpu"), read_options=read_options)


def test_ranks_hold_nothing_twice(tmp_path: Path) -> None:
    """All ranks' buffers together: the checkpoint's once, and once more on each further rank what every rank has."""
    random_checkpoint(tmp_path, "modelopt-experts-only", **WIDE)
    index, cpu = CheckpointIndex.open(tmp_path), torch.device("cpu")
    whole = planned(tmp_path, EngineConfig())[0]

    def held(plan: Plan) -> int:
        weights = load_weights(plan, index, cpu)
        buffers = (buffer for operand in weights.operands for parts in operand.buffers.values() for buffer in parts)
        return sum(buffer.nbytes for buffer in (*buffers, *weights.params.values()))

    first, second = plans_of(tmp_path, 2)
    assert held(first) == held(second) == weights_bytes(first, index)
    assert held(first) + held(second) - held(whole) == replicated_bytes(first, index)


def test_a_rank_needs_its_peers(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    with pytest.raises(ValueError, match=r"the settings are those of rank 1 of 2, and this is rank 0 of 1"):
        load_model(tmp_path, EngineConfig(max_model_len=64, parallel=Parallel(1, 2)))


@pytest.mark.parametrize("parallel", [(2, 2), (-1, 1), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(parallel: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="ranks count from 0 to size - 1"):
        Parallel(*parallel)


def test_divisions_go_by_their_names() -> None:
    assert Parallel(0, 2, "data", "ids") == Parallel(0, 2, AttentionSplit.DATA, ExpertSplit.IDS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention is 'rows', which is none of heads, data"):
        Parallel(0, 2, "rows")  # type: ignore[arg-type]
