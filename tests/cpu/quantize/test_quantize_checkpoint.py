"""``ownpath quantize``: what is cast loses nothing, the rest is carried over, and a stopped run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.quantize.sources import read_tensors, store_bf16, store_mxfp4, write_source
from support.checkpoints import random_checkpoint

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.writer import Fingerprint
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.formats import MXFP4, NVFP4
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_nvfp4
from ownpath.qtensor import QuantTensor
from ownpath.quantize import staging
from ownpath.quantize.run import Options, quantize_checkpoint
from ownpath.quantize.steps import QuantizeScope

SHARD_BYTES = 200_000


def nvfp4_value(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    parts = (tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_scale_2"])
    return dequantize(QuantTensor(*parts, NVFP4))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def experts_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted(key.removesuffix(".weight") for key in tensors if ".ffn.experts." in key and key.endswith(".weight"))


@pytest.fixture
def native(tmp_path: Path) -> dict[str, torch.Tensor]:
    return write_source(tmp_path, store_mxfp4)


def test_a_cast_keeps_every_value_and_every_code(native: dict[str, torch.Tensor], tmp_path: Path) -> None:
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    written = read_tensors(tmp_path / "out")
    names = experts_of(native)
    assert report.num_converted == len(names) == 5 * 8 * 3
    assert report.counts.num_rounded == 0
    for name in names:
        stored = QuantTensor(native[f"{name}.weight"].view(torch.uint8), native[f"{name}.scale"], None, MXFP4)
        assert torch.equal(nvfp4_value(written, name), dequantize(stored))
        assert torch.equal(written[f"{name}.weight"], native[f"{name}.weight"].view(torch.uint8))
        if name.endswith(".w1"):
            assert torch.equal(written[f"{name}.weight_scale_2"], written[f"{name[:-2]}w3.weight_scale_2"])


def test_everything_else_is_carried_over_byte_for_byte(native: dict[str, torch.Tensor], tmp_path: Path) -> None:
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    written = read_tensors(tmp_path / "out")
    others = {key for key in native if ".ffn.experts." not in key}
    assert others <= written.keys()
    assert all(same_bytes(written[key], native[key]) for key in others)
    tokenizer = (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.parametrize("scope", QuantizeScope)
def test_the_draft_is_carried_over_and_drafts(scope: QuantizeScope, tmp_path: Path) -> None:
    """MTP's experts stay MXFP4 beside a backbone of NVFP4, as NVIDIA publishes it."""
    random_checkpoint(tmp_path / "source", "deepseek-native", draft="deepseek-native")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(scope, SHARD_BYTES))
    source, written = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "out")
    keys = {key for key in source if key.startswith("mtp.")}
    assert keys == {key for key in written if key.startswith("mtp.")}
    assert all(same_bytes(written[key], source[key]) for key in keys)
    model = load_model(tmp_path / "out", EngineConfig(max_model_len=64, loads_draft=True))
    batch = ForwardBatch.of([([5, 6, 7], model.new_cache())], "cpu")
    draft = model.drafts[0].hidden(model.hidden(batch), torch.tensor([6, 7, 8]), batch)
    assert torch.isfinite(model.logits(draft, batch.logits_ids)).all()
    formats = {op.spec.slot: op.encoding.format for op in plan_model(tmp_path / "out", "cpu", loads_draft=True).ops}
    assert (formats["layers.4.ffn.experts"], formats["mtp.0.ffn.experts"]) == (NVFP4, MXFP4)


def test_the_result_loads_and_its_experts_are_lossless_casts(native: dict[str, torch.Tensor], tmp_path: Path) -> None:
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    model = load_model(tmp_path / "out", EngineConfig(max_model_len=64))
    assert model.lossless_casts == tuple(f"layers.{layer}.ffn.experts" for layer in range(5))
    assert native


def test_a_block_too_far_below_the_largest_is_rounded_and_counted(tmp_path: Path) -> None:
    tensors = write_source(tmp_path, store_mxfp4)
    name = "layers.0.ffn.experts.0.w2"
    scale = tensors[f"{name}.scale"].view(torch.uint8).clone()
    scale[0, 0] = int(scale.max()) - 20
    tensors[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    rewrite(tmp_path / "source", tensors)
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    assert report.counts.num_rounded == 1
    stored = QuantTensor(tensors[f"{name}.weight"].view(torch.uint8), scale.view(torch.float8_e8m0fnu), None, MXFP4)
    written = read_tensors(tmp_path / "out")
    difference = (nvfp4_value(written, name) - dequantize(stored)).abs()
    # The smallest block scale is 2**-9; half of its smallest code step, a quarter, is what rounding may lose.
    assert difference[0, :32].max() <= 0.25 * 2**-9 * float(written[f"{name}.weight_scale_2"])
    assert not difference[0, 32:].any()
    assert not difference[1:].any()


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint

    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    write_checkpoint(folder, tensors.items(), max_shard_bytes=300_000)


def test_values_are_quantised_with_gate_and_up_on_one_scale(tmp_path: Path) -> None:
    tensors = write_source(tmp_path, store_bf16)
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    assert report.counts.num_quantized == 5 * 8 * 3
    written = read_tensors(tmp_path / "out")
    gate, up = (tensors[f"layers.1.ffn.experts.3.{w}.weight"].float() for w in ("w1", "w3"))
    shared = nvfp4_global_scale(torch.cat([gate, up]))
    for name, value in (("w1", gate), ("w3", up)):
        wanted = quantize_nvfp4(value, shared)
        prefix = f"layers.1.ffn.experts.3.{name}"
        assert torch.equal(written[f"{prefix}.weight"], wanted.qdata)
        assert wanted.scale is not None
        assert same_bytes(written[f"{prefix}.weight_scale"], wanted.scale)
        assert torch.equal(written[f"{prefix}.weight_scale_2"], shared)


def test_full_scope_takes_attention_and_shared_experts_and_leaves_wo_a(tmp_path: Path) -> None:
    tensors = write_source(tmp_path, store_mxfp4)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.FULL, SHARD_BYTES))
    written = read_tensors(tmp_path / "out")
    for leaf in ("attn.wq_a", "attn.wkv", "attn.wq_b", "attn.wo_b", "ffn.shared_experts.w2"):
        assert written[f"layers.2.{leaf}.weight"].dtype == torch.uint8
        assert f"layers.2.{leaf}.scale" not in written
    assert same_bytes(written["layers.2.attn.wo_a.weight"], tensors["layers.2.attn.wo_a.weight"])
    assert same_bytes(written["layers.1.attn.indexer.wq_b.weight"], tensors["layers.1.attn.indexer.wq_b.weight"])
    load_model(tmp_path / "out", EngineConfig(max_model_len=64))


def test_config_says_what_is_quantised(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["moe_quant_algo"] == "NVFP4"
    assert stored["quant_method"] == "modelopt", "the source named none"
    assert set(stored["quantized_layers"]) == {f"layers.{layer}.ffn.experts" for layer in range(5)}
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert described["quantized_layers"] == stored["quantized_layers"]
    assert described["exclude_modules"] == stored["ignore"]


def test_config_keeps_what_it_says_of_the_rest(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    path = tmp_path / "source" / "config.json"
    release = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": release, "expert_dtype": "fp4"}))
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["quantization_config"].items() >= release.items()
    assert fields["expert_dtype"] == "fp4"


class Stopped(Exception):
    """Stands for the signal that kills a run."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = staging.write_shard

    def write(path: Path, tensors: Any) -> Fingerprint:
        if path.stem == str(number):
            path.with_suffix(".tmp").write_bytes(b"half")
            raise Stopped
        return real(path, tensors)

    monkeypatch.setattr(staging, "write_shard", write)


def test_a_stopped_run_looks_unfinished_and_goes_on(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    quantize_checkpoint(tmp_path / "source", tmp_path / "whole", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    with pytest.raises(CheckpointError, match="found neither"):
        CheckpointIndex.open(tmp_path / "out")
    first = tmp_path / "out" / ".quantizing" / "0.safetensors"
    made_at = first.stat().st_mtime_ns
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert shards[0].stat().st_mtime_ns == made_at, "a finished shard is not made again"


def test_an_unfinished_run_of_other_options_is_not_continued(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stopped):
            quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    with pytest.raises(CheckpointError, match="other options"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.FULL, SHARD_BYTES))


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    before = (tmp_path / "source" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="never overwritten"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "source", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    assert (tmp_path / "source" / "config.json").read_bytes() == before


def test_what_is_nvfp4_already_is_refused_by_name(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.0\.w1 is NVFP4 already"):
        quantize_checkpoint(tmp_path / "made", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))


def test_a_missing_scale_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = write_source(tmp_path, store_mxfp4)
    del tensors["layers.3.ffn.experts.5.w3.scale"]
    rewrite(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.3\.ffn\.experts\.5\.w3\.scale"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_became_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, store_mxfp4)
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "120 weights are NVFP4" in printed
    assert "100.0000 % of them without loss" in printed
    assert main(["quantize", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "never overwritten" in capsys.readouterr().err
