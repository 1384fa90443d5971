"""The draft in the plan: asked for or left out with a reason, planned, filled and counted like the backbone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken import change_tensors
from support.checkpoints import DSPARK, SMALL, Tensors, random_checkpoint
from support.pages import plan_text

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.cli import main
from ownpath.config import ConfigError, EngineConfig, ModelConfig
from ownpath.loading import load_model, lossless_casts, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.plan.show import plan_dict
from ownpath.weights.load import load_weights

DRAFTING = EngineConfig(max_model_len=64, loads_draft=True)
LAYER = (
    {f"attn.{name}" for name in ("wqa_wkv", "wq_b", "wo_a", "wo_b", "q_norm", "kv_norm", "q_head_norm", "core")}
    | {f"ffn.{name}" for name in ("gate", "experts", "router")}
    | {f"ffn.shared_experts.{name}" for name in ("w13", "w2", "swiglu")}
    | {"hc_attn", "hc_ffn"}
)
"""The slots of a layer without compressed entries."""
OF_MTP = LAYER | {"e_proj", "h_proj", "enorm", "hnorm", "hc_head"}
OF_DECODE = {"attn.decode.entries", "attn.decode.attend", "ffn.decode.route"}
NOT_OF_DECODE = {"attn.kv_norm", "attn.q_head_norm", "attn.core", "ffn.gate", "ffn.router"}
"""Kernels of steps that have one row for each sequence, and those whose place they take."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """NVIDIA's export: NVFP4 experts in the backbone, MXFP4 in the draft."""
    random_checkpoint(tmp_path / "model", "modelopt-experts-only", draft="deepseek-native")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def rename(folder: Path, new_key: Callable[[str], str | None]) -> None:
    """Renames tensors; those without a new name are dropped."""

    def change(tensors: Tensors) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({key: value for name, value in old.items() if (key := new_key(name)) is not None})

    change_tensors(folder, change)


def test_the_backbones_plan_is_part_of_the_drafting_one(folder: Path) -> None:
    without, planned = plan_model(folder, "cpu"), plan_model(folder, "cpu", loads_draft=True)
    assert planned.ops[: len(without.ops)] == without.ops
    assert planned.companions[: len(without.companions)] == without.companions
    assert set(planned.slots) - set(without.slots) == {f"mtp.0.{name}" for name in OF_MTP | OF_DECODE}
    keys = {key for key in CheckpointIndex.open(folder).tensors if key.startswith("mtp.")}
    assert set(without.ignored) == keys
    assert not planned.ignored
    (experts,) = planned.ops_of("mtp.0.ffn.experts")
    (projection,) = planned.ops_of("mtp.0.e_proj")
    assert (experts.encoding.name, projection.encoding.name) == ("native-mxfp4", "native-fp8-block")


@pytest.mark.parametrize("draft", ["deepseek-native", "modelopt-experts-only", "full-nvfp4", "fp8-experts", "bf16"])
def test_what_runs_is_what_was_planned(draft: str, tmp_path: Path, device: torch.device) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", draft=draft)
    plan = plan_model(tmp_path, str(device), loads_draft=True)
    model = load_model(
        tmp_path, EngineConfig(str(device), EngineConfig.for_device(str(device)).dtype, 64, loads_draft=True)
    )
    cache = model.new_cache()
    others = {"head"}, {"head", "attn.decode.angles"}
    of_step = OF_MTP, OF_MTP - NOT_OF_DECODE | OF_DECODE
    for token_ids, slots, shared in zip(([5, 6, 7, 8], [9]), of_step, others, strict=True):
        before = dict(model.ledger.calls)
        batch = ForwardBatch.of([(token_ids, cache)], device)
        hidden = model.hidden(batch)
        backbone = dict(model.ledger.calls)
        assert all(backbone[slot] == before.get(slot, 0) for slot in backbone if slot.startswith("mtp."))
        next_ids_T = torch.tensor([token_id + 1 for token_id in token_ids], device=device)
        model.logits(model.drafts[0].hidden(hidden, next_ids_T, batch), batch.logits_ids)
        added = {slot: calls - backbone.get(slot, 0) for slot, calls in model.ledger.calls.items()}
        ran = {slot: calls for slot, calls in added.items() if calls}
        assert ran == dict.fromkeys(shared | {f"mtp.0.{name}" for name in slots}, 1)
    assert {slot: model.ledger.kernels[slot] for slot in model.ledger.calls} == plan.slots


def test_every_byte_of_the_draft_is_read_as_it_is_stored(folder: Path, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "again", "modelopt-experts-only", draft="deepseek-native")
    plan = plan_model(folder, "cpu", loads_draft=True)
    loaded = load_weights(plan, CheckpointIndex.open(folder), torch.device("cpu"))
    params = {key: value for key, value in loaded.params.items() if key.startswith("mtp.")}
    assert len(params) == 18
    assert all(torch.equal(value, checkpoint.decoded[key]) for key, value in params.items())
    written = {slot.key for operand in loaded.operands for slot in operand.destinations} | set(loaded.params)
    assert written | set(plan.unread_inputs) == set(CheckpointIndex.open(folder).tensors)


def test_the_plan_says_what_became_of_the_draft(folder: Path, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "none", "bf16")
    assert "draft: none in the checkpoint\n" in plan_text(plan_model(tmp_path / "none", "cpu")) + "\n"
    text = plan_text(plan_model(folder, "cpu"))
    assert "draft: MTP, not planned\nnot read: 87 tensors (MTP draft: drafting was not asked for)" in text
    planned = plan_model(folder, "cpu", loads_draft=True)
    lines = plan_text(planned).splitlines()
    assert "draft: MTP, planned: mtp.0" in lines
    (experts,) = (line for line in lines if line.startswith("mtp.0.ffn.experts "))
    assert experts.split() == [
        "mtp.0.ffn.experts",
        "native-mxfp4",
        "MXFP4",
        "Nvfp4MoE",
        "ref.nvfp4_moe",
        "nvfp4_scales",
    ]
    assert any(line.split() == ["mtp.0.hc_head", "HyperBoundary", "ref.hyper_boundary"] for line in lines)
    assert plan_dict(planned)["draft"] == {"kind": "MTP", "num_modules": 1}


def test_the_command_plans_the_draft_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--draft", "--device", "sm_90", "--json"]) == 0
    entries = {entry["slot"]: entry for entry in json.loads(capsys.readouterr().out)["ops"]}
    assert entries["mtp.0.h_proj"]["modules"] == ["mtp.0.h_proj"]
    assert entries["mtp.0.h_proj"]["shape"] == [64, 64]
    assert main(["plan", str(folder), "--device", "sm_90"]) == 0
    assert "mtp.0." not in capsys.readouterr().out


def test_config_says_nothing_of_the_drafts_experts(folder: Path) -> None:
    """NVIDIA's config.json calls the experts NVFP4 and means the backbone's."""
    quantization = {
        "quant_method": "fp8",
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "ignore": ["mtp.*"],
    }
    change_config(folder, quantization_config=quantization)
    assert plan_model(folder, "cpu", loads_draft=True).contradictions == ()


def test_copies_of_embedding_and_head_are_not_read(folder: Path) -> None:
    copies = {"mtp.0.emb.tok_emb.weight": torch.zeros(96, 64), "mtp.0.head.weight": torch.zeros(96, 64)}
    change_tensors(folder, lambda tensors: tensors.update(copies))
    reason = "copy of the backbone's embedding or head, which MTP shares"
    assert plan_model(folder, "cpu", loads_draft=True).ignored == dict.fromkeys(copies, reason)


def test_modules_past_the_configured_number_are_not_read(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", draft="bf16", num_nextn_predict_layers=2)
    change_config(tmp_path, num_nextn_predict_layers=1)
    plan = plan_model(tmp_path, "cpu", loads_draft=True)
    assert {key.split(".")[1] for key in plan.ignored} == {"1"}
    assert set(plan.ignored.values()) == {"MTP draft: num_nextn_predict_layers is 1"}
    assert len(load_model(tmp_path, DRAFTING).drafts) == 1


def test_a_draft_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", num_nextn_predict_layers=1)
    assert load_model(tmp_path, EngineConfig(max_model_len=64)).drafts == ()
    with pytest.raises(CheckpointError, match=r"tensor 'mtp\.0\.e_proj\.weight' is missing: a draft was asked for"):
        load_model(tmp_path, DRAFTING)


def test_a_draft_that_config_does_not_count_is_an_error(folder: Path) -> None:
    change_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"config\.json has no num_nextn_predict_layers above 0"):
        load_model(folder, DRAFTING)


@pytest.mark.parametrize(
    "part", ["main_proj.weight", "main_norm.weight", "markov_head.w.weight", "confidence_head.proj.weight"]
)
def test_dspark_is_told_by_its_tensors(part: str, folder: Path) -> None:
    """Under the same prefix, with the same num_nextn_predict_layers. Its fields are not in this config.json."""
    change_tensors(folder, lambda tensors: tensors.update({f"mtp.2.{part}": torch.zeros(2)}))
    plan = plan_model(folder, "cpu")
    assert set(plan.ignored.values()) == {"DSpark draft: drafting was not asked for"}
    assert "draft: DSpark, not planned\nnot read: 88 tensors" in plan_text(plan)
    with pytest.raises(CheckpointError, match=r"DSpark's, but config\.json's dspark_target_layer_ids is no list"):
        load_model(folder, DRAFTING)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dspark_target_layer_ids": [3, 5]}, "dspark_target_layer_ids is no list of the backbone's layers"),
        ({"dspark_target_layer_ids": [4, 3]}, "dspark_target_layer_ids is not in ascending order"),
        ({"dspark_block_size": 0}, "dspark_block_size is no positive integer"),
        ({"dspark_markov_rank": "24"}, "dspark_markov_rank is no positive integer"),
        ({"dspark_noise_token_id": None}, "dspark_noise_token_id is no positive integer"),
        ({"dspark_noise_token_id": 96}, "dspark_noise_token_id is 96, and there are 96 tokens"),
        ({"compress_ratios": SMALL["compress_ratios"][:5]}, "compress_ratios has no entry behind the backbone's"),
    ],
    ids=str,
)
def test_fields_of_dspark_that_fit_no_drafter_are_named(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    """The backbone loads all the same."""
    random_checkpoint(tmp_path, "bf16", draft="bf16", **DSPARK)
    change_config(tmp_path, **change)
    load_model(tmp_path, EngineConfig(max_model_len=64))
    with pytest.raises(CheckpointError, match=f"a draft was asked for, DSpark's, but config.json's {found}"):
        load_model(tmp_path, DRAFTING)


def test_dspark_is_planned_and_read_as_it_is_stored(tmp_path: Path) -> None:
    """As published: three stages, in MXFP4 and FP8, behind NVFP4 experts."""
    checkpoint = random_checkpoint(tmp_path, "modelopt-experts-only", draft="deepseek-native", **DSPARK)
    index = CheckpointIndex.open(tmp_path)
    without, plan = plan_model(tmp_path, "cpu"), plan_model(tmp_path, "cpu", loads_draft=True)
    assert plan.ops[: len(without.ops)] == without.ops
    own = {"mtp.0.main_proj", "mtp.0.main_norm", "mtp.2.markov_head.markov_w2", "mtp.2.hc_head"}
    assert set(plan.slots) - set(without.slots) == own | {f"mtp.{i}.{name}" for i in range(3) for name in LAYER}
    assert set(without.ignored) == {key for key in index.tensors if key.startswith("mtp.")}
    assert not plan.ignored
    assert "draft: DSpark, planned: mtp.0-2" in plan_text(plan).replace("–", "-").replace("{", "").replace("}", "")
    loaded = load_weights(plan, index, torch.device("cpu"))
    params = {key: value for key, value in loaded.params.items() if key.startswith("mtp.")}
    assert all(torch.equal(value, checkpoint.decoded[key]) for key, value in params.items())
    written = {slot.key for operand in loaded.operands for slot in operand.destinations} | set(loaded.params)
    assert written | set(plan.unread_inputs) == set(index.tensors)


def test_what_runs_of_dspark_is_what_was_planned(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", draft="bf16", **DSPARK)
    plan, model = plan_model(tmp_path, "cpu", loads_draft=True), load_model(tmp_path, DRAFTING)
    assert model.dspark is not None
    assert model.drafts == ()
    cache = model.new_cache()
    batch = ForwardBatch.of([([5, 6, 7], cache)], "cpu")
    _, targets = model.hidden_and_targets(batch)
    before = dict(model.ledger.calls)
    model.dspark.remember(targets, batch)
    model.dspark.guess(torch.tensor([8]), [cache])
    ran = {slot for slot, calls in model.ledger.calls.items() if calls > before.get(slot, 0)}
    assert ran == {slot for slot in plan.slots if slot.startswith("mtp.")} | {"head"}


def test_mtp_where_config_describes_dspark_is_an_error(folder: Path) -> None:
    change_config(folder, **DSPARK)
    load_model(folder, EngineConfig(max_model_len=64))
    with pytest.raises(CheckpointError, match="its tensors are MTP's"):
        load_model(folder, DRAFTING)


def test_a_missing_stage_of_dspark_is_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", draft="bf16", **DSPARK)
    rename(tmp_path, lambda name: None if name.startswith("mtp.1.") else name)
    with pytest.raises(CheckpointError, match=r"tensor 'mtp\.1\..*' is missing"):
        load_model(tmp_path, DRAFTING)
    rename(tmp_path, lambda name: name.replace("mtp.2.", "mtp.3."))
    assert set(plan_model(tmp_path, "cpu").ignored.values()) == {"DSpark draft: drafting was not asked for"}


@pytest.mark.parametrize(
    "key",
    [
        "mtp.0.e_proj.weight",
        "mtp.0.h_proj.scale",
        "mtp.0.enorm.weight",
        "mtp.0.norm.weight",
        "mtp.0.hc_head_fn",
        "mtp.0.hc_attn_base",
        "mtp.0.attn.attn_sink",
        "mtp.0.attn.wo_a.weight",
        "mtp.0.ffn.gate.bias",
        "mtp.0.ffn.experts.7.w3.scale",
        "mtp.0.ffn.shared_experts.w2.weight",
    ],
)
def test_a_missing_tensor_of_the_draft_is_named(key: str, folder: Path) -> None:
    rename(folder, lambda name: None if name == key else name)
    load_model(folder, EngineConfig(max_model_len=64))
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
        load_model(folder, DRAFTING)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mtp.0.e_proj.weight", torch.zeros(64, 128).to(torch.float8_e4m3fn), r"needs shape \[64, 64\]"),
        ("mtp.0.hnorm.weight", torch.zeros(128, dtype=torch.bfloat16), r"expected shape \[64\]"),
        ("mtp.0.hc_head_scale", torch.zeros(3), r"expected shape \[1\]"),
        ("mtp.0.hc_head_base", torch.zeros(4, dtype=torch.float64), "expected F32"),
        ("mtp.0.ffn.experts.3.w2.scale", torch.zeros(64, 4).to(torch.float8_e8m0fnu), r"needs shape \[64, 2\]"),
        ("mtp.0.ffn.gate.bias", torch.full((8,), torch.nan), "holds NaN or infinity"),
        ("mtp.0.attn.compressor.ape", torch.zeros(4, 128), "nothing in this model reads it"),
        ("mtp.0.ffn.gate.tid2eid", torch.zeros(96, 3, dtype=torch.int64), "nothing in this model reads it"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_of_the_draft_is_named(key: str, value: torch.Tensor, message: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({key: value}))
    load_model(folder, EngineConfig(max_model_len=64))
    with pytest.raises(CheckpointError, match=rf"tensor '{key}' .*{message}"):
        load_model(folder, DRAFTING)


def test_lossless_casts_of_the_draft_are_seen(tmp_path: Path) -> None:
    from ownpath.numerics import mxfp4_as_nvfp4, quantize_mxfp4

    checkpoint = random_checkpoint(tmp_path, "bf16", draft="modelopt-experts-only", moe_intermediate_size=64)

    def cast(tensors: Tensors) -> None:
        for name in [name for name in checkpoint.decoded if name.startswith("mtp.0.ffn.experts.")]:
            (weight,), _ = mxfp4_as_nvfp4([quantize_mxfp4(checkpoint.decoded[name])])
            parts = {"weight": weight.qdata, "weight_scale": weight.scale, "weight_scale_2": weight.global_scale}
            tensors.update({f"{name}.{part}": value for part, value in parts.items() if value is not None})

    assert lossless_casts(plan_model(tmp_path, "cpu", loads_draft=True), tmp_path) == ()
    change_tensors(tmp_path, cast)
    assert load_model(tmp_path, DRAFTING).lossless_casts == ("mtp.0.ffn.experts",)
    assert lossless_casts(plan_model(tmp_path, "cpu", loads_draft=True), tmp_path) == ("mtp.0.ffn.experts",)
    assert lossless_casts(plan_model(tmp_path, "cpu"), tmp_path) == ()


@pytest.mark.parametrize(("value", "count"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_configured_number_of_modules(value: int | None, count: int) -> None:
    config = ModelConfig.from_dict(SMALL | {"num_nextn_predict_layers": value})
    assert config.num_nextn_predict_layers == count
    assert [layer.name for layer in config.draft_layers()] == [f"mtp.{draft_idx}" for draft_idx in range(count)]
    assert not any(layer.ratio or layer.is_hash for layer in config.draft_layers())


@pytest.mark.parametrize("value", [-1, True, 1.0, "1"])
def test_a_number_of_modules_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers must be an integer"):
        ModelConfig.from_dict(SMALL | {"num_nextn_predict_layers": value})
