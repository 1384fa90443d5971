"""compressed-tensors' export: divisors become multipliers once, and mean what ModelOpt's multipliers mean."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import random_checkpoint

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import COMPRESSED_NVFP4, MODELOPT_NVFP4, ModuleSpec
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.config import EngineConfig
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import quantize_nvfp4
from ownpath.official import Step
from ownpath.weights.load import load_weights

Tensors = dict[str, torch.Tensor]
SMALLER = {"num_hidden_layers": 2, "compress_ratios": [0, 4]}
EXPERT = "layers.1.ffn.experts.3.w2"
DIVISORS = ("weight_global_scale", "input_global_scale")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    random_checkpoint(folder, "compressed-tensors", **SMALLER)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "model")
    return tmp_path / "model"


def stored_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    tensors = stored_tensors(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    write_checkpoint(folder, [change(*item) for item in tensors.items()], max_shard_bytes=200_000)


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(max_model_len=64))
    return model.forward(ForwardBatch.of([(list(range(40)), model.new_cache())], "cpu", all_logits=True))


def test_the_stored_tensors_are_the_exports(intact: Path) -> None:
    """Names, dtypes and shapes as in the published checkpoint's table; the written divisor is 2688 / amax."""
    tensors = stored_tensors(intact)
    suffixes = {name.removeprefix(f"{EXPERT}."): t for name, t in tensors.items() if name.startswith(f"{EXPERT}.")}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in suffixes.items()} == {
        "weight_packed": (torch.uint8, (64, 24)),
        "weight_scale": (torch.float8_e4m3fn, (64, 3)),
        "weight_global_scale": (torch.float32, (1,)),
        "input_global_scale": (torch.float32, (1,)),
    }
    attention = tensors["layers.0.attn.wq_b.weight"], tensors["layers.0.attn.wq_b.weight_scale"]
    assert [t.dtype for t in attention] == [torch.float8_e4m3fn, torch.bfloat16]
    weight = torch.tensor([[2.625] + [0.5] * 31])
    written = dict(COMPRESSED_NVFP4.encode("m", quantize_nvfp4(weight), torch.tensor(0.25)))
    assert written["m.weight_global_scale"].tolist() == [1024.0]
    assert written["m.input_global_scale"].tolist() == [4.0]


def test_the_plan_says_how_each_module_is_stored(folder: Path) -> None:
    encodings = {op.label: (op.encoding.name, op.encoding.format) for op in plan_model(folder, "cpu").ops}
    assert encodings["layers.1.ffn.experts"] == ("compressed-tensors-nvfp4", NVFP4)
    assert encodings["layers.1.attn.wqa_wkv"] == ("compressed-tensors-fp8-block", FP8_BLOCK)
    assert encodings["layers.1.attn.wo_a"] == ("compressed-tensors-fp8-block", FP8_BLOCK)
    for plain in ("layers.1.attn.indexer.wq_b", "layers.1.ffn.shared_experts.w13", "head"):
        assert encodings[plain][0] == "bf16"


def test_divisors_are_inverted_once_in_float32(folder: Path) -> None:
    plan = plan_model(folder, "cpu", official=READS_INPUT_SCALES)
    tensors = stored_tensors(folder)
    operands = load_weights(plan, CheckpointIndex.open(folder), torch.device("cpu")).operands
    buffers = next(o.buffers for op, o in zip(plan.ops, operands, strict=True) if op.label == "layers.1.ffn.experts")
    for expert in range(8):
        for name, pick in (("w1", (expert, 0)), ("w3", (expert, 1))):
            stored = [tensors[f"layers.1.ffn.experts.{expert}.{name}.{divisor}"] for divisor in DIVISORS]
            assert buffers["w13_scale_2"][0][pick] == 1 / stored[0]
            assert buffers["w13_input_scale"][0][pick] == 1 / stored[1]
        stored = [tensors[f"layers.1.ffn.experts.{expert}.w2.{divisor}"] for divisor in DIVISORS]
        assert buffers["w2_scale_2"][0][expert] == 1 / stored[0]
        assert buffers["w2_input_scale"][0][expert] == 1 / stored[1]


def test_the_same_weights_in_modelopts_names_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Parts renamed, each divisor replaced by its reciprocal, BF16 scales widened: equal logits, bit for bit."""
    shutil.copytree(folder, tmp_path / "modelopt")

    def as_modelopt(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        module, _, suffix = name.rpartition(".")
        if suffix in DIVISORS:
            return f"{module}.{'weight_scale_2' if suffix == DIVISORS[0] else 'input_scale'}", (1 / tensor).reshape(())
        if suffix == "weight_packed":
            return f"{module}.weight", tensor
        is_fp8_scale = suffix == "weight_scale" and tensor.dtype == torch.bfloat16
        return (f"{module}.scale", tensor.float()) if is_fp8_scale else (name, tensor)

    rewrite(tmp_path / "modelopt", as_modelopt)
    names = {op.encoding.name for op in plan_model(tmp_path / "modelopt", "cpu").ops}
    assert names == {"modelopt-nvfp4", "native-fp8-block", "bf16"}
    assert torch.equal(logits(folder), logits(tmp_path / "modelopt"))


def test_squeezed_divisors_mean_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "squeezed")
    rewrite(tmp_path / "squeezed", lambda name, t: (name, t.reshape(()) if name.endswith(DIVISORS) else t))
    assert CheckpointIndex.open(tmp_path / "squeezed")[f"{EXPERT}.{DIVISORS[0]}"].shape == ()
    assert torch.equal(logits(folder), logits(tmp_path / "squeezed"))


READS_INPUT_SCALES = frozenset({Step.NVFP4_INPUTS})
"""Numerics with which kernels on the CPU read the scales of inputs."""


@pytest.mark.parametrize("suffix", DIVISORS)
def test_a_multiplier_where_the_divisor_belongs_is_named(suffix: str, folder: Path) -> None:
    key = f"{EXPERT}.{suffix}"
    rewrite(folder, lambda name, t: (name, 1 / t if name == key else t))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*a multiplier by its size; this encoding stores the divisor"):
        load_model(folder, EngineConfig(max_model_len=64, official=READS_INPUT_SCALES))


@pytest.mark.parametrize("value", [0.0, -21504.0, float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", DIVISORS)
def test_a_divisor_that_is_none_is_named(suffix: str, value: float, folder: Path) -> None:
    key = f"{EXPERT}.{suffix}"
    rewrite(folder, lambda name, t: (name, torch.tensor([value]) if name == key else t))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*must be finite and positive"):
        load_model(folder, EngineConfig(max_model_len=64, official=READS_INPUT_SCALES))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", DIVISORS[0]])
def test_a_missing_part_is_named(suffix: str, folder: Path) -> None:
    key = f"{EXPERT}.{suffix}"
    rewrite(folder, lambda name, t: ("mtp.0.away", t) if name == key else (name, t))
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
        load_model(folder, EngineConfig(max_model_len=64))


def test_a_pair_is_not_a_global_scale(folder: Path) -> None:
    key = f"{EXPERT}.weight_global_scale"
    rewrite(folder, lambda name, t: (name, t.repeat(2) if name == key else t))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*needs shape \[\]"):
        load_model(folder, EngineConfig(max_model_len=64))


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "NaN"), (-1.0, "negative")])
def test_a_bf16_block_scale_that_is_none_is_named(value: float, problem: str, folder: Path) -> None:
    key = "layers.1.attn.wkv.weight_scale"
    rewrite(folder, lambda name, t: (name, torch.full_like(t, value) if name == key else t))
    with pytest.raises(CheckpointError, match=rf"'{key}' .*block scale \[0, 0\] is NaN or negative"):
        load_model(folder, EngineConfig(max_model_len=64))


@pytest.mark.parametrize("encoding", [MODELOPT_NVFP4, COMPRESSED_NVFP4], ids=lambda encoding: encoding.name)
def test_stored_and_meant_are_inverses_up_to_two_roundings(encoding, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    weight = quantize_nvfp4(torch.randn(32, 64, generator=torch.Generator().manual_seed(2)))
    stored = dict(encoding.encode("m", weight, torch.tensor(3e-3)))
    write_checkpoint(tmp_path, stored.items(), 2**20)
    assert detect(CheckpointIndex.open(tmp_path), ModuleSpec("m", (32, 64))) == encoding
    part = encoding.part("global_scale")
    meant = part.meant(stored[encoding.key("m", "global_scale")])
    assert meant.shape == ()
    torch.testing.assert_close(meant, weight.global_scale, rtol=torch.finfo(torch.float32).eps, atol=0)
    assert set(stored) == set(encoding.keys("m"))
