"""DeepSeek's base model: experts in FP8 blocks, whose last blocks may be partial, run as they are stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.broken import change_tensors
from support.checkpoints import Tensors, random_checkpoint
from support.pages import plan_text

from ownpath.checkpoint.errors import CheckpointError
from ownpath.config import EngineConfig
from ownpath.formats import FP8_BLOCK
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_fp8_block, quantize_nvfp4
from ownpath.ops import OpKind
from ownpath.plan.select import Caps, Demands, Refusal, select
from ownpath.qtensor import QuantTensor
from ownpath.quantize.run import Options, quantize_checkpoint

SMALLER = {"num_hidden_layers": 2, "compress_ratios": [0, 4], "hidden_size": 160}
"""With the layout's expert width of 144: 2 x 2 blocks a matrix, the last ones partial both ways."""
EXPERT = "layers.1.ffn.experts.3"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    folders = {dtype: tmp_path_factory.mktemp("intact") for dtype in (torch.float32, torch.float8_e8m0fnu)}
    for dtype, folder in folders.items():
        random_checkpoint(folder, "fp8-experts", fp8_scale=dtype, **SMALLER)
    return folders


@pytest.fixture
def folder(intact: dict[torch.dtype, Path], tmp_path: Path) -> Path:
    shutil.copytree(intact[torch.float32], tmp_path / "model")
    return tmp_path / "model"


def stored_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(max_model_len=64))
    return model.forward(ForwardBatch.of([(list(range(40)), model.new_cache())], "cpu", all_logits=True))


def decode_experts(tensors: Tensors, dtype: torch.dtype) -> None:
    """Every expert's values instead of its codes and scales; ``dtype`` holds them exactly."""
    for key in [key for key in tensors if ".ffn.experts." in key and key.endswith(".weight")]:
        scale = tensors.pop(key.replace(".weight", ".scale"))
        value = dequantize(QuantTensor(tensors[key], scale, None, FP8_BLOCK))
        tensors[key] = value.to(dtype)
        assert torch.equal(tensors[key].float(), value)


def test_the_stored_tensors_are_the_base_models(folder: Path) -> None:
    tensors = stored_tensors(folder)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name.startswith(f"{EXPERT}.w2.")}
    assert found == {
        f"{EXPERT}.w2.weight": (torch.float8_e4m3fn, (160, 144)),
        f"{EXPERT}.w2.scale": (torch.float32, (2, 2)),
    }


@pytest.mark.parametrize("device", ["cpu", "sm_90", "sm_100"])
def test_the_plan_says_what_is_stored_and_what_runs_it(device: str, folder: Path) -> None:
    plan = plan_model(folder, device)
    experts = next(op for op in plan.ops if op.label == "layers.1.ffn.experts")
    assert (experts.encoding.name, experts.encoding.format) == ("native-fp8-block", FP8_BLOCK)
    kernel = experts.choice.kernel
    assert (kernel.runner, kernel.name, kernel.layout) == ("Fp8MoE", "ref.fp8_moe", "row_major")
    assert "ref.fp8_moe on FP8_BLOCK: W8A16 per expert" in plan_text(plan)


def test_no_kernel_for_them_promises_batch_invariance() -> None:
    hopper = Caps("cuda", "sm_90", 90, frozenset({"triton"}))
    refusal = select(OpKind.MOE, FP8_BLOCK, hopper, demands=Demands("bfloat16", is_batch_invariant=True))
    assert isinstance(refusal, Refusal)
    assert "ref.fp8_moe is not batch-invariant" in refusal.reason


@pytest.mark.parametrize(
    ("scale", "values"), [(torch.float8_e8m0fnu, torch.bfloat16), (torch.float32, torch.float32)], ids=str
)
def test_the_same_values_unquantised_give_the_same_bits(
    scale: torch.dtype, values: torch.dtype, intact: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """E4M3 times a power of two fits BF16; times a float32 scale it is what float32 rounds it to."""
    shutil.copytree(intact[scale], tmp_path / "plain")
    change_tensors(tmp_path / "plain", lambda tensors: decode_experts(tensors, values))
    experts = next(op for op in plan_model(tmp_path / "plain", "cpu").ops if op.label == "layers.1.ffn.experts")
    assert experts.choice.kernel.runner == "PlainMoE"
    assert torch.equal(logits(intact[scale]), logits(tmp_path / "plain"))


def test_power_of_two_scales_mean_the_same_in_float32(intact: dict[torch.dtype, Path], tmp_path: Path) -> None:
    shutil.copytree(intact[torch.float8_e8m0fnu], tmp_path / "wide")

    def widen(tensors: Tensors) -> None:
        tensors.update({key: t.float() for key, t in tensors.items() if key.endswith(".scale") and ".experts." in key})

    change_tensors(tmp_path / "wide", widen)
    assert torch.equal(logits(intact[torch.float8_e8m0fnu]), logits(tmp_path / "wide"))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_tensors_names_mean_the_same(scale: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Experts' scales called ``weight_scale``; BF16 ones are widened."""

    def round_scales(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".experts." in key and key.endswith(".scale")]:
            tensors[key] = tensors[key].to(scale).float()

    def rename(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".experts." in key and key.endswith(".scale")]:
            tensors[key.replace(".scale", ".weight_scale")] = tensors.pop(key).to(scale)

    change_tensors(folder, round_scales)
    shutil.copytree(folder, tmp_path / "renamed")
    change_tensors(tmp_path / "renamed", rename)
    experts = next(op for op in plan_model(tmp_path / "renamed", "cpu").ops if op.label == "layers.1.ffn.experts")
    assert (experts.encoding.name, experts.choice.kernel.runner) == ("compressed-tensors-fp8-block", "Fp8MoE")
    assert torch.equal(logits(folder), logits(tmp_path / "renamed"))


def test_config_is_confirmed_or_contradicted(folder: Path) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"expert_dtype": "fp8", "quantization_config": {"quant_method": "fp8"}}))
    assert plan_model(folder, "cpu").contradictions == ()
    path.write_text(json.dumps(fields | {"expert_dtype": "fp4"}))
    where = "'layers.0.ffn.experts.0.w1' is stored as FP8_BLOCK (native-fp8-block)"
    assert plan_model(folder, "cpu").contradictions == (f"config.json: expert_dtype is 'fp4', but {where}",)


def test_quantised_by_value_it_is_no_longer_called_fp8(folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expert_dtype": "fp8"}))
    before = stored_tensors(folder)
    report = quantize_checkpoint(folder, tmp_path / "out", Options())
    after = stored_tensors(tmp_path / "out")
    assert report.counts.num_quantized == report.num_converted == 2 * 8 * 3
    values = {
        name: dequantize(
            QuantTensor(before[f"{EXPERT}.{name}.weight"], before[f"{EXPERT}.{name}.scale"], None, FP8_BLOCK)
        )
        for name in ("w1", "w3", "w2")
    }
    shared, own = nvfp4_global_scale(torch.cat([values["w1"], values["w3"]])), nvfp4_global_scale(values["w2"])
    for name, value in values.items():
        wanted = quantize_nvfp4(value, own if name == "w2" else shared)
        assert torch.equal(after[f"{EXPERT}.{name}.weight"], wanted.qdata)
        assert torch.equal(after[f"{EXPERT}.{name}.weight_scale"].float(), wanted.scale.float())
        assert torch.equal(after[f"{EXPERT}.{name}.weight_scale_2"], wanted.global_scale)
    assert f"{EXPERT}.w1.scale" not in after
    assert plan_model(tmp_path / "out", "cpu").contradictions == ()
    assert torch.isfinite(logits(tmp_path / "out")).all()


BROKEN = {
    "missing-scale": (lambda t: t.pop(f"{EXPERT}.w1.scale"), rf"'{EXPERT}\.w1\.scale' is missing"),
    "missing-weight": (lambda t: t.pop(f"{EXPERT}.w2.weight"), rf"'{EXPERT}\.w2\.weight' is missing"),
    "grid-of-whole-blocks-only": (
        lambda t: t.update({f"{EXPERT}.w2.scale": t[f"{EXPERT}.w2.scale"][:1]}),
        rf"'{EXPERT}\.w2\.scale' .*needs shape \[2, 2\]",
    ),
    "scales-of-another-dtype": (
        lambda t: t.update({f"{EXPERT}.w2.scale": t[f"{EXPERT}.w2.scale"].double()}),
        rf"'{EXPERT}\.w2\.scale' .*native-fp8-block stores F8_E8M0 or F32",
    ),
    "codes-of-another-format": (
        lambda t: t.update({f"{EXPERT}.w2.weight": t[f"{EXPERT}.w2.weight"].float().to(torch.float8_e5m2)}),
        rf"'{EXPERT}\.w2\.weight' .*no known encoding has this dtype",
    ),
    "one-expert-in-bf16": (
        lambda t: (
            t.update({f"{EXPERT}.w2.weight": t[f"{EXPERT}.w2.weight"].to(torch.bfloat16)})
            or t.pop(f"{EXPERT}.w2.scale")
        ),
        rf"'{EXPERT}\.w2' is bf16; experts of one layer must agree",
    ),
    "one-expert-with-e8m0-scales": (
        lambda t: t.update(
            {f"{EXPERT}.w3.scale": quantize_fp8_block(torch.ones(144, 160), torch.float8_e8m0fnu).scale}
        ),
        rf"'layers\.1\.ffn\.experts\.0\.w1\.scale' is F32 but '{EXPERT}\.w3\.scale' is F8_E8M0; experts of one layer",
    ),
    "nan-code": (
        lambda t: t[f"{EXPERT}.w1.weight"].view(torch.uint8)[3, 4:5].fill_(0x7F),
        rf"'{EXPERT}\.w1\.weight' .*holds NaN",
    ),
    "negative-scale": (
        lambda t: t[f"{EXPERT}.w1.scale"][1, 1:].fill_(-1.0),
        rf"'{EXPERT}\.w1\.scale' .*block scale \[1, 1\] is NaN or negative",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_inspect_finds_it(case: str, folder: Path) -> None:
    change, message = BROKEN[case]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, EngineConfig(max_model_len=64))
    if case != "nan-code":  # inspect reads scales, not codes
        found = [problem.message for problem in inspect_folder(folder).problems if problem.id != "tokenizer"]
        assert any(f"{EXPERT}." in line for line in found), found
