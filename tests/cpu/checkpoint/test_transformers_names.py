"""Checkpoints under transformers' names: as its ``save_pretrained`` writes them, and as its modules are called."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import Checkpoint, random_checkpoint
from support.transformers_v4 import reference_model

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import stream
from ownpath.checkpoint.transformers_names import native_name, native_tensors
from ownpath.checkpoint.writer import write_checkpoint
from ownpath.config import ConfigError, EngineConfig, ModelConfig
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.quantize.run import Options, quantize_checkpoint
from ownpath.quantize.steps import QuantizeScope

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # transformers writes this number, as releases do, and drops the draft that it counts.
    return random_checkpoint(tmp_path_factory.mktemp("native"), "bf16", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def oracle(native: Checkpoint) -> Any:
    """transformers' model, filled with the checkpoint's values: it says its names itself."""
    return reference_model(native, CPU)


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(max_model_len=256))
    return model.forward(ForwardBatch.of([([i % 96 for i in range(200)], model.new_cache())], "cpu", all_logits=True))


def module_state(oracle: Any, dtype: torch.dtype) -> Tensors:
    """The model's state as it is in memory, experts stacked; the matrices that the release has in BF16 in ``dtype``."""
    kept = re.compile(r"(_hc\.|hc_head|position_bias|tid2eid|norm|sinks|bias)")
    return {key: value if kept.search(key) else value.to(dtype) for key, value in oracle.state_dict().items()}


def write(folder: Path, state: Tensors, native: Checkpoint) -> None:
    write_checkpoint(folder, state.items(), max_shard_bytes=200_000)
    shutil.copy(native.folder / "config.json", folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_module_names_give_the_same_bits(oracle: Any, native: Checkpoint, dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, module_state(oracle, dtype), native)
    index = CheckpointIndex.open(tmp_path)
    assert set(index.tensors) == set(CheckpointIndex.open(native.folder).tensors)
    assert torch.equal(logits(tmp_path), logits(native.folder))


def test_save_pretrained_gives_the_same_bits(oracle: Any, native: Checkpoint, tmp_path: Path) -> None:
    """A folder that transformers wrote alone, config.json included."""
    oracle.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "compress_ratios" not in fields
    assert ModelConfig.from_file(tmp_path / "config.json") == native.config
    assert set(CheckpointIndex.open(tmp_path).tensors) == set(CheckpointIndex.open(native.folder).tensors)
    assert torch.equal(logits(tmp_path), logits(native.folder))
    with pytest.raises(CheckpointError, match=r"'mtp\.0\.e_proj\.weight' is missing: a draft was asked for"):
        load_model(tmp_path, EngineConfig(max_model_len=256, loads_draft=True))


@pytest.mark.parametrize("limit", [1, 1000, 2**20])
def test_stacked_experts_stream_in_slices(oracle: Any, native: Checkpoint, limit: int, tmp_path: Path) -> None:
    write(tmp_path, module_state(oracle, torch.float32), native)
    names = [f"layers.2.ffn.experts.5.{projection}.weight" for projection in ("w1", "w2", "w3")]
    rebuilt: dict[str, list[torch.Tensor]] = {}
    for part in stream(CheckpointIndex.open(tmp_path), names, max_slice_bytes=limit):
        rebuilt.setdefault(part.info.name, []).append(part.data.clone())
    for name in names:
        assert torch.equal(torch.cat(rebuilt[name]), native.decoded[name.removesuffix(".weight")].float())


def test_either_spelling_is_quantised_to_the_same_values(oracle: Any, native: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path / "renamed", module_state(oracle, torch.bfloat16), native)
    options = Options(QuantizeScope.FULL, max_shard_bytes=10**9)
    quantize_checkpoint(tmp_path / "renamed", tmp_path / "from_renamed", options)
    quantize_checkpoint(native.folder, tmp_path / "from_native", options)
    written = [load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("from_renamed", "from_native")]
    assert written[0].keys() == written[1].keys()
    for key, tensor in written[0].items():
        # Codes and scales are the same bytes; transformers keeps norms, which are carried over, in float32.
        assert torch.equal(tensor.float(), written[1][key].float()), key
        assert tensor.dtype == written[1][key].dtype or "norm" in key


def test_scales_called_inverse_are_multipliers(oracle: Any, native: Checkpoint, tmp_path: Path) -> None:
    """An FP8 projection under transformers' names: ``weight_scale_inv`` is what DeepSeek calls ``scale``."""
    state = module_state(oracle, torch.float32)
    key = "model.layers.0.self_attn.o_b_proj.weight"
    codes = state[key].to(torch.float8_e4m3fn)
    write(tmp_path / "fp8", state | {key: codes, f"{key}_scale_inv": torch.full((1, 1), 0.25)}, native)
    write(tmp_path / "plain", state | {key: codes.float() * 0.25}, native)
    formats = {op.label: str(op.encoding.format) for op in plan_model(tmp_path / "fp8", "cpu").ops}
    assert formats["layers.0.attn.wo_b"] == "FP8_BLOCK"
    assert torch.equal(logits(tmp_path / "fp8"), logits(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("model.layers.0.attn.wq_b.weight", (256, 48), "'layers.0.attn.wq_b.weight' .* also stored as 'model"),
        ("model.layers.0.mlp.experts.3.w1.weight", (48, 64), r"'layers.0.ffn.experts.3.w1.weight' .* also stored as"),
        ("model.layers.9.mlp.gate.weight", (8, 64), r"there 'model.layers.9.mlp.gate.weight'.*nothing in this model"),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 95, 64), r"'layers.0.ffn.experts.0.w1.weight' is missing"),
        ("model.layers.0.mlp.experts.gate_up_proj", (7, 96, 64), r"'layers.0.ffn.experts.7.w1.weight' is missing"),
        ("model.layers.0.mlp.experts.down_proj", (8, 64, 47), r"there 'model.*down_proj'.*needs shape \[64, 48\]"),
    ],
)
def test_errors_name_the_tensor(
    key: str, shape: tuple[int, ...], message: str, oracle: Any, native: Checkpoint, tmp_path: Path
) -> None:
    write(tmp_path, module_state(oracle, torch.float32) | {key: torch.zeros(shape)}, native)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, EngineConfig(max_model_len=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3]}, "'full_attention'"),
        ({"layer_types": "sliding_attention"}, "layer_types must be a list of names"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe"]}, "mlp_layer_types has a hash_moe layer after"),
        ({"rope_parameters": {"main": {}}}, "rope_parameters must have an object 'compress'"),
        ({"rope_parameters": {"compress": {"rope_type": "linear"}}}, "of type 'yarn'"),
    ],
)
def test_a_config_in_transformers_spelling_is_checked(change: dict[str, Any], message: str, oracle: Any) -> None:
    fields = json.loads(oracle.config.to_json_string(use_diff=False))
    assert ModelConfig.from_dict(fields).compress_ratios == (0, 4, 128, 4, 128)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(fields | change)


@pytest.mark.parametrize(
    ("stored", "native"),
    [
        ("layers.0.ffn.experts.3.w1.weight_scale_2", "layers.0.ffn.experts.3.w1.weight_scale_2"),
        ("mtp.0.ffn.experts.3.w2.weight", "mtp.0.ffn.experts.3.w2.weight"),
        ("layers.0.ffn.experts.3.w1.weight_scale_inv", "layers.0.ffn.experts.3.w1.scale"),
        ("layers.0.mlp.experts.3.w1.weight", "layers.0.ffn.experts.3.w1.weight"),
        ("model.layers.0.ffn.experts.3.w1.weight", "layers.0.ffn.experts.3.w1.weight"),
        ("layers.0.mlp.experts.3.down_proj.weight_scale", "layers.0.ffn.experts.3.w2.weight_scale"),
    ],
)
def test_names_of_experts(stored: str, native: str) -> None:
    """Those that are DeepSeek's already are told by a look of their own: they are nearly all that a model has."""
    assert [name for name, _, _ in native_tensors(stored, (4, 8))] == [native]
    assert native_name(stored) == native
