"""Tensors that vLLM's iterator gives go to our runners, checked and cut as our loader does; the rest goes on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import LAYOUTS, SMALL, random_checkpoint
from support.tiny_exports import logits_of, more_index_heads, tiny_tensors, write_tiny

from ownpath.assembly import load_part
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig, ModelConfig, Parallel
from ownpath.integrations.vllm.intake import Intake
from ownpath.integrations.vllm.names import VARIABLE, VllmPart, chosen_parts, slot_of
from ownpath.loading import default_model_dir, planned
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_fp8_block, quantize_nvfp4
from ownpath.ops import OpKind
from ownpath.plan.opspec import model_ops
from ownpath.plan.part import RankShare

WIDE = {"moe_intermediate_size": 256, "o_lora_rank": 128, "hidden_size": 128, "num_hidden_layers": 2}
SHORT = {"num_hidden_layers": 3}
"""Layers of every kind: a window, CSA, HCA."""
ENDINGS = ("wqa_wkv", "attn.wq_b", "wo_a", "wo_b", "indexer.wq_b", "ffn.experts", "shared_experts.w13",
           "shared_experts.w2")  # fmt: skip
CPU = torch.device("cpu")
WHOLE = Parallel()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: one for shard in sorted(folder.glob("*.safetensors")) for key, one in load_file(shard).items()}


def entered(folder: Path, parallel: Parallel = WHOLE, experts: tuple[int, ...] | None = None) -> Intake:
    """An intake into which every layer of ours has entered, as vLLM's layers of this rank do."""
    intake = Intake(folder, "cpu", torch.float32, frozenset(VllmPart))
    config = intake.whole.config
    for spec in model_ops(config):
        if not spec.slot.endswith(ENDINGS):
            continue
        rows, columns = spec.shape
        is_column = spec.slot.endswith((".attn.wq_b", "wo_a", "shared_experts.w13"))
        is_row = spec.slot.endswith(("wo_b", "shared_experts.w2"))
        if spec.kind is OpKind.MOE:
            width = Parallel() if experts else parallel
            intake.enter(spec.slot, RankShare(width, experts), (rows // width.size, columns))
        elif is_column:
            intake.enter(spec.slot, RankShare(parallel), (rows // parallel.size, columns))
        elif is_row:
            intake.enter(spec.slot, RankShare(parallel), (rows, columns // parallel.size))
        else:
            intake.enter(spec.slot, RankShare(), (rows, columns))
    return intake


def taken(intake: Intake, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(intake.take(iter(weights.items()), CPU))


def whole_runners(folder: Path) -> Mapping[str, object]:
    """The runners that our own loader makes of the folder, without products joined over slots."""
    plan, index = planned(folder, EngineConfig())
    return load_part(plan, index, EngineConfig()).runners


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "bf16"])
def test_every_export_is_taken_as_our_loader_takes_it(layout: str, tmp_path: Path) -> None:
    """Given in an order of its own, tensor by tensor: each product equals the loader's to the last bit."""
    made = random_checkpoint(tmp_path, layout, **SHORT)
    intake, given = entered(tmp_path), tensors_in(tmp_path)
    rest = taken(intake, dict(reversed(given.items())))
    ours = whole_runners(tmp_path)
    for slot, runner in intake.taken.runners.items():
        if slot not in ours or slot.endswith(("experts", "wo_a")):
            continue
        x = torch.randn(3, runner.in_features, generator=torch.Generator().manual_seed(7))  # type: ignore[attr-defined]
        assert torch.equal(runner(x), ours[slot](x)), slot  # type: ignore[operator]
    x, ids = torch.randn(5, made.config.hidden_size), torch.randint(made.config.n_routed_experts, (5, 3))
    for layer in made.config.backbone_layers():
        slot = f"{layer.name}.ffn.experts"
        weights = torch.rand(5, 3)
        assert torch.equal(intake.taken.runners[slot](x, ids, weights), ours[slot](x, ids, weights)), slot  # type: ignore[operator]
    own = {module.name for spec in model_ops(made.config) if spec.slot in intake.entered for module in spec.modules}
    assert set(rest) == {key for key in given if key.rpartition(".")[0] not in own}
    assert all(torch.equal(rest[key].view(torch.uint8), given[key].view(torch.uint8)) for key in rest)


def test_fused_halves_keep_their_own_global_scales(tmp_path: Path) -> None:
    """wq_a and wkv, gate and up: each half's rows are multiplied by its own scale, here a quarter of the other's."""
    random_checkpoint(tmp_path, "full-nvfp4", **SHORT)
    given = tensors_in(tmp_path)
    x = torch.randn(2, SMALL["hidden_size"])
    before, after = entered(tmp_path), entered(tmp_path)
    taken(before, given)
    for half in ("attn.wkv", "ffn.shared_experts.w3"):
        given[f"layers.1.{half}.weight_scale_2"] = given[f"layers.1.{half}.weight_scale_2"] / 4
    taken(after, given)
    for slot, first in (("attn.wqa_wkv", SMALL["q_lora_rank"]), ("ffn.shared_experts.w13", 48)):
        y, z = (intake.taken.runners[f"layers.1.{slot}"](x) for intake in (before, after))
        assert torch.equal(y[:, :first], z[:, :first])
        assert torch.equal(y[:, first:] / 4, z[:, first:])


@pytest.mark.parametrize("layout", ["full-nvfp4", "deepseek-native"])
def test_two_ranks_add_up(layout: str, tmp_path: Path) -> None:
    """Column layers side by side, row layers and experts added: one rank's products but for the order of sums."""
    made = random_checkpoint(tmp_path, layout, **WIDE)
    config, given = made.config, tensors_in(tmp_path)
    alone = entered(tmp_path)
    taken(alone, given)
    by_width = [entered(tmp_path, Parallel(rank, 2)) for rank in range(2)]
    by_expert = [entered(tmp_path, Parallel(rank, 2), tuple(range(4 * rank, 4 * rank + 4))) for rank in range(2)]
    for intake in (*by_width, *by_expert):
        taken(intake, given)
    x, generator = torch.randn(4, config.hidden_size), torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(4)])
    for layer in config.backbone_layers():
        runners = [intake.taken.runners for intake in (alone, *by_width, *by_expert)]
        slot = f"{layer.name}.ffn.experts"
        maps = [torch.full((8,), -1, dtype=torch.int32) for _ in range(2)]
        for rank, local in enumerate(maps):
            local[4 * rank : 4 * rank + 4] = torch.arange(4, dtype=torch.int32)
        weights = torch.rand(4, 3)
        y = runners[0][slot](x, ids, weights)
        assert_sums(y, [one[slot](x, ids, weights) for one in runners[1:3]])
        assert_sums(y, [one[slot](x, ids, weights, held) for one, held in zip(runners[3:], maps, strict=True)])
        slot = f"{layer.name}.attn.wq_b"
        qr = torch.randn(4, config.q_lora_rank)
        assert torch.equal(runners[0][slot](qr), torch.cat([one[slot](qr) for one in runners[1:3]], dim=-1))
        groups = torch.randn(4, config.num_attention_heads, config.head_dim)
        angles = torch.zeros(4, 0), torch.zeros(4, 0)
        slot, out = f"{layer.name}.attn.wo_a", f"{layer.name}.attn.wo_b"
        wide = runners[0][slot](groups, angles)
        parts = [
            one[slot](half.contiguous(), angles) for one, half in zip(runners[1:3], groups.chunk(2, 1), strict=True)
        ]
        torch.testing.assert_close(wide, torch.cat(parts, dim=1), rtol=1e-6, atol=1e-6)
        halves = zip(runners[1:3], wide.flatten(1).chunk(2, dim=-1), strict=True)
        assert_sums(runners[0][out](wide.flatten(1)), [one[out](half.contiguous()) for one, half in halves])


def assert_sums(y: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """float32 sums of a few hundred products in two orders: the difference is some roundings of the largest partial."""
    bound = 256 * torch.finfo(torch.float32).eps * max(float(part.abs().max()) for part in (y, *parts))
    assert float((y - sum(parts)).abs().max()) <= bound


FAULTS = ("missing", "twice", "scale", "nan", "shape", "foreign")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", **SHORT)
    given = tensors_in(tmp_path)
    key = "layers.2.ffn.experts.5.w1.weight_scale_2" if fault == "scale" else "layers.2.attn.wo_b.weight_scale"
    match fault:
        case "missing":
            del given[key]
        case "scale":
            given[key] = torch.tensor(-1.0)
        case "nan":
            key = "layers.2.attn_norm.weight"
            given[key] = given[key].clone().fill_(torch.nan)
        case "shape":
            given[key] = given[key][:-1]
        case "foreign":
            key = "layers.9.nobody"
            given[key] = torch.zeros(1)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from given.items()
        if fault == "twice":
            yield key, given[key]

    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        list(entered(tmp_path).take(weights(), CPU))


def test_a_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", **SHORT)
    intake = Intake(tmp_path, "cpu", torch.float32, frozenset(VllmPart))
    intake.enter("layers.0.attn.wo_b", RankShare(), (64, 65))
    with pytest.raises(
        ValueError, match=r"layers.0.attn.wo_b: vLLM's layer is \[64, 65\] here, the checkpoint's \[64, 64\]"
    ):
        taken(intake, {})


def test_nothing_loaded_is_said(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", **SHORT)
    with pytest.raises(CheckpointError, match="vLLM gave no weights"):
        _ = entered(tmp_path).taken


def test_the_embedded_model_is_taken_whole() -> None:
    """30 slots: 4 layers of seven, and two indexers'. Every tensor is taken, vLLM's, or a scale that nobody reads."""
    intake = entered(default_model_dir())
    given = tiny_tensors()
    rest = taken(intake, given)
    assert len(intake.taken.runners) == 4 * 7 + 2
    counts = intake.taken.counts
    assert counts.total() == len(given)
    assert counts["left"] == len(rest)
    assert counts["unread"] == sum(key.endswith("input_scale") for key in given)


@pytest.mark.parametrize(
    ("prefix", "slot"),
    [
        ("model.layers.3.attn.fused_wqa_wkv", "layers.3.attn.wqa_wkv"),
        ("model.layers.0.attn.indexer.wq_b", "layers.0.attn.indexer.wq_b"),
        ("model.layers.2.ffn.experts", "layers.2.ffn.experts"),
        ("model.layers.2.ffn.shared_experts.gate_up_proj", "layers.2.ffn.shared_experts.w13"),
        ("model.layers.4.attn.wq_b", None),
        ("model.layers.2.attn.compressor.fused_wkv_wgate", None),
        ("lm_head", None),
    ],
)
def test_layers_have_slots(prefix: str, slot: str | None) -> None:
    """Of a model of four layers; a draft's follow."""
    found = slot_of(prefix, 4)
    assert (found and found[0]) == slot


def test_the_parts_can_be_chosen() -> None:
    assert chosen_parts({}) == chosen_parts({VARIABLE: "all"}) == frozenset(VllmPart)
    assert chosen_parts({VARIABLE: "none"}) == frozenset()
    assert chosen_parts({VARIABLE: "linears, wo_a"}) == {VllmPart.LINEARS, VllmPart.WO_A}
    with pytest.raises(ValueError, match=r"OWNPATH_VLLM names 'expert': it can name linears, experts"):
        chosen_parts({VARIABLE: "linears,expert"})


def test_an_index_knows_what_a_rank_leaves(tmp_path: Path) -> None:
    """Another rank's experts are read by nobody here and are no fault."""
    random_checkpoint(tmp_path, "modelopt-experts-only", **WIDE)
    intake = entered(tmp_path, Parallel(1, 2), (4, 5, 6, 7))
    taken(intake, tensors_in(tmp_path))
    config: ModelConfig = intake.whole.config
    in_experts = [key for key in CheckpointIndex.open(tmp_path).tensors if ".ffn.experts." in key]
    assert intake.taken.counts["unread"] >= len(in_experts) // 2
    assert config.n_routed_experts == 8


def test_quantised_matrices_that_vllm_keeps_whole_are_decoded(tmp_path: Path) -> None:
    """vLLM asks nobody how the indexer's weights_proj or a compressor is stored: it gets their values, in BF16."""
    tensors, values = tiny_tensors(), {}
    for module in ("indexer.compressor.wkv", "indexer.compressor.wgate", "indexer.weights_proj"):
        key = f"layers.1.attn.{module}.weight"
        weight = tensors[key].float()
        if "compressor" in module:
            stored = quantize_fp8_block(weight, torch.float8_e8m0fnu)
            scales = {"scale": stored.scale}
        else:
            stored = quantize_nvfp4(weight, nvfp4_global_scale(weight))
            scales = {"weight_scale": stored.scale, "weight_scale_2": stored.global_scale}
        tensors[key], values[key] = stored.qdata, dequantize(stored, torch.float32).bfloat16()
        tensors |= {f"layers.1.attn.{module}.{name}": scale for name, scale in scales.items() if scale is not None}
    rest = taken(entered(write_tiny(tmp_path / "quantised", tensors)), tensors)
    for key, value in values.items():
        torch.testing.assert_close(rest[key], value, rtol=2**-7, atol=0)  # two roundings of one product
    assert not [key for key in rest if "scale" in key and ".indexer." in key]


def test_more_index_heads_change_no_answer(tmp_path: Path) -> None:
    """By which the embedded model runs on Hopper in vLLM; two of three compressed entries are chosen here."""
    few, tensors = {"index_topk": 2}, tiny_tensors()
    padded = write_tiny(tmp_path / "padded", more_index_heads(tensors, 32), config=few | {"index_n_heads": 32})
    assert torch.equal(logits_of(write_tiny(tmp_path / "as it is", tensors, config=few)), logits_of(padded))
