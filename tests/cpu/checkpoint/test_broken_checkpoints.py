"""Every broken checkpoint ends in one error that names the tensor or file; nothing half-loaded is handed out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import random_checkpoint
from support.pages import plan_text

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.schema import MODELOPT_NVFP4
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.config import ConfigError, EngineConfig
from ownpath.loading import load_model, plan_model
from ownpath.numerics import quantize_nvfp4

Tensors = dict[str, torch.Tensor]
EXPERT = "layers.1.ffn.experts.3.w2"
SMALLER = {"num_hidden_layers": 2, "compress_ratios": [0, 4]}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    random_checkpoint(folder, "full-nvfp4", **SMALLER)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "model")
    return tmp_path / "model"


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrites the checkpoint with changed tensors and a matching index."""
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    change(tensors)
    write_checkpoint(folder, tensors.items(), max_shard_bytes=200_000)


def load(folder: Path) -> None:
    load_model(folder, EngineConfig(max_model_len=64))


def test_the_intact_checkpoint_loads(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) >= 2
    load(folder)


@pytest.mark.parametrize(
    "key",
    [
        f"{EXPERT}.weight",
        f"{EXPERT}.weight_scale",
        f"{EXPERT}.weight_scale_2",
        "layers.0.attn.wkv.weight_scale_2",
        "layers.1.attn.indexer.wq_b.scale",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.ffn.gate.bias",
        "layers.1.attn.attn_sink",
        "layers.1.attn.indexer.compressor.ape",
        "hc_head_fn",
        "embed.weight",
        "head.weight",
        "norm.weight",
    ],
)
def test_a_missing_tensor_is_named(key: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__(key))
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
        load(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"layers.9.attn.wq_a.weight": torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=r"'layers.9.attn.wq_a.weight' .*nothing in this model reads it"):
        load(folder)


MTP: Tensors = {
    "mtp.0.enorm.weight": torch.zeros(2),
    "mtp.0.ffn.experts.0.w1.weight": torch.zeros(4, 16, dtype=torch.int8),
    "mtp.0.ffn.experts.0.w1.scale": torch.zeros(4, 1, dtype=torch.float8_e8m0fnu),
    "mtp.1.ffn.experts.0.w1.weight_scale_2": torch.tensor(0.5),
}
DSPARK: Tensors = MTP | {
    "mtp.2.main_proj.weight": torch.zeros(2, 2, dtype=torch.bfloat16),
    "mtp.2.markov_head.weight": torch.zeros(3),
}


@pytest.mark.parametrize(
    ("drafts", "line"),
    [
        (MTP, "not read: 4 tensors (MTP draft: drafting was not asked for)"),
        (DSPARK, "not read: 6 tensors (DSpark draft: drafting was not asked for)"),
    ],
    ids=["MTP", "DSpark"],
)
def test_draft_modules_stay_unread_for_a_stated_reason(drafts: Tensors, line: str, folder: Path) -> None:
    """Drafts in any format, as MTP and DSpark releases have them; DSpark's ratios go three entries past the layers."""
    fields = json.loads((folder / "config.json").read_text())
    dspark = {"compress_ratios": [0, 4, 0, 0, 0], "num_nextn_predict_layers": 1, "dspark_block_size": 5}
    (folder / "config.json").write_text(json.dumps(fields | dspark))
    change_tensors(folder, lambda tensors: tensors.update(drafts))
    load(folder)
    plan = plan_model(folder, "cpu")
    assert plan.config.compress_ratios == (0, 4)
    assert set(plan.ignored) == set(drafts)
    assert line in plan_text(plan)


def test_a_draft_outside_its_place_is_no_draft(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"mtp.enorm.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"'mtp.enorm.weight' .*nothing in this model reads it"):
        load(folder)


def scaled(key: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: torch.tensor(value)})


@pytest.mark.parametrize("value", [0.0, -1e-4, float("nan"), float("inf")])
@pytest.mark.parametrize("key", [f"{EXPERT}.weight_scale_2", "layers.0.attn.wq_b.weight_scale_2"])
def test_a_scalar_that_is_no_scale_is_named(key: str, value: float, folder: Path) -> None:
    change_tensors(folder, scaled(key, value))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*must be finite and positive"):
        load(folder)


def test_a_divisor_where_the_multiplier_belongs_is_named(folder: Path) -> None:
    """compressed-tensors stores 2688 / amax; read as a multiplier it would blow every value up."""
    key = f"{EXPERT}.weight_scale_2"
    change_tensors(folder, lambda tensors: tensors.update({key: 1 / tensors[key]}))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*a divisor by its size"):
        load(folder)


def test_the_smallest_divisor_above_one_is_named(folder: Path) -> None:
    key = f"{EXPERT}.weight_scale_2"
    change_tensors(folder, lambda tensors: tensors.update({key: torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))}))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*a divisor by its size"):
        load(folder)


@pytest.mark.parametrize("bits", [0x7F, 0xFF, 0xB8])
def test_a_block_scale_that_is_nan_or_negative_is_named(bits: int, folder: Path) -> None:
    key = "layers.1.ffn.shared_experts.w2.weight_scale"

    def change(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8)[5, 1] = bits

    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=rf"'{key}' .*block scale \[5, 1\] is NaN or negative"):
        load(folder)


def test_an_e8m0_nan_is_named(folder: Path) -> None:
    key = "layers.1.attn.indexer.wq_b.scale"

    def change(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8).fill_(0xFF)

    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=rf"'{key}' .*block scale \[0, 0\] is NaN"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers.0.attn.wq_b.weight", torch.zeros(256, 23, dtype=torch.uint8), "needs shape"),
        ("layers.0.attn.wq_b.weight", torch.zeros(256, 24, dtype=torch.int32), "no known encoding"),
        ("layers.0.attn.wq_b.weight_scale", torch.zeros(256, 3, dtype=torch.int16), "stores F8_E4M3"),
        ("layers.0.attn.wq_b.weight_scale_2", torch.full((2,), 1e-4), "needs shape"),
        ("layers.0.attn.attn_sink", torch.zeros(4, dtype=torch.float64), "expected F32"),
        ("embed.weight", torch.zeros(95, 64, dtype=torch.bfloat16), "expected shape"),
        ("norm.weight", torch.full((64,), torch.nan, dtype=torch.bfloat16), "NaN or infinity"),
        ("head.weight", torch.full((96, 64), torch.inf, dtype=torch.bfloat16), "NaN or infinity"),
        ("layers.0.ffn.gate.tid2eid", torch.full((96, 3), 8), "experts outside 0..7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_shape_dtype_or_value_is_named(key: str, value: torch.Tensor, message: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"'{key}'.*{message}"):
        load(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{shard.name}: not a complete safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"'{shard.name}' does not exist"):
        load(folder)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "a\\b"])
def test_an_index_that_leaves_the_folder_is_refused(target: str, folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["embed.weight"] = target
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name inside the checkpoint folder"):
        load(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=f"'{shard.name}' is a link out of the checkpoint folder"):
        load(folder)


def test_index_and_shards_must_agree(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    moved = dict(index["weight_map"])
    files = sorted(set(moved.values()))
    moved["norm.weight"] = next(file for file in files if file != moved["norm.weight"])
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"'norm.weight' .* is listed in"):
        load(folder)


def test_the_same_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file(tensors | {name: value}, second)
    with pytest.raises(CheckpointError, match=f"'{name}'.*also lies in"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_unreadable_index_is_named(text: str, folder: Path) -> None:
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        load(folder)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "runs DeepseekV4ForCausalLM only"),
        ({"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}, "a different model"),
        ({"architectures": ["DeepseekV41ForCausalLM"], "model_type": None}, r"DeepSeek-V4\.1 shares KV across layers"),
        ({"architectures": None, "model_type": "deepseek_v3"}, r"DeepSeek-V3 and R1 have latent attention"),
        ({"architectures": ["DeepseekV32ForCausalLM"], "model_type": None}, r"V3\.2 is V3 with a sparse indexer"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "Llama is a dense model"),
        ({"architectures": [3, {}], "model_type": ["x"]}, "no DeepSeek model that ownpath knows"),
        ({"compress_ratios": [0, 5]}, r"compress_ratios\[1\] is 5"),
        ({"compress_ratios": [0]}, "at least 2 entries"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive finite number"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling must be null or of type 'yarn'"),
        ({"o_groups": 3}, "o_groups = 3 must divide"),
        ({"eos_token_id": 96}, "eos_token_id = 96 is outside the vocabulary"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_honoured_is_named(change: dict[str, object], message: str, folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"max_model_len 4097 exceeds .*max_position_embeddings 4096"):
        load_model(folder, EngineConfig(max_model_len=4097))


def test_a_zero_matrix_as_our_own_quantiser_writes_it_loads(folder: Path) -> None:
    """amax 0 has no 2688th part: its global scale is 1.0, a multiplier of zeros, and not a misplaced divisor."""
    zero = quantize_nvfp4(torch.zeros(64, 48))
    written = dict(MODELOPT_NVFP4.encode(EXPERT, zero, torch.tensor(1e-3)))
    assert written[f"{EXPERT}.weight_scale_2"] == 1
    change_tensors(folder, lambda tensors: tensors.update(written))
    load(folder)
