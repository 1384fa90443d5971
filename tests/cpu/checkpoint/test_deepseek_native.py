"""DeepSeek's own release: MXFP4 experts run on the NVFP4 kernels, exactly, and the plan says so."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import random_checkpoint
from support.hopper_layouts import subject_on
from support.pages import plan_text

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ModuleSpec
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.config import EngineConfig
from ownpath.formats import FP8_BLOCK, MXFP4
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor
from ownpath.runners.make import make_runners
from ownpath.verify.launch_configs import configs_of
from ownpath.weights.load import load_weights

Tensors = dict[str, torch.Tensor]
SMALLER = {"num_hidden_layers": 2, "compress_ratios": [0, 4]}
EXPERT = "layers.1.ffn.experts.3"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    random_checkpoint(folder, "deepseek-native", **SMALLER)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    write_checkpoint(folder, change(tensors).items(), max_shard_bytes=200_000)


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(max_model_len=64))
    return model.forward(ForwardBatch.of([(list(range(40)), model.new_cache())], "cpu", all_logits=True))


def test_the_stored_tensors_are_the_releases(intact: Path) -> None:
    tensors: Tensors = {}
    for shard in intact.glob("*.safetensors"):
        tensors.update(load_file(shard))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name.startswith(f"{EXPERT}.w2.")}
    assert found == {
        f"{EXPERT}.w2.weight": (torch.int8, (64, 32)),
        f"{EXPERT}.w2.scale": (torch.float8_e8m0fnu, (64, 2)),
    }
    assert tensors["layers.0.attn.wo_a.weight"].dtype == torch.float8_e4m3fn
    assert tensors["layers.0.attn.wo_a.scale"].dtype == torch.float8_e8m0fnu


def test_the_plan_says_what_is_stored_and_what_runs_it(folder: Path) -> None:
    plan = plan_model(folder, "cpu")
    ops = {op.label: op for op in plan.ops}
    experts = ops["layers.1.ffn.experts"]
    assert (experts.encoding.name, experts.encoding.format) == ("native-mxfp4", MXFP4)
    kernel = experts.choice.kernel
    assert (kernel.runner, kernel.name, kernel.layout) == ("Nvfp4MoE", "ref.nvfp4_moe", "nvfp4_scales")
    assert ops["layers.1.attn.wo_a"].encoding.format == FP8_BLOCK
    assert "ref.nvfp4_moe on MXFP4: MXFP4 on disk, its scales written as NVFP4's at load" in plan_text(plan)


def test_hopper_runs_it_on_the_nvfp4_kernel(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    random_checkpoint(tmp_path, "deepseek-native", **SMALLER, **sizes)
    (choice,) = {op.choice for op in plan_model(tmp_path, "sm_90").ops if op.label == "layers.1.ffn.experts"}
    assert (choice.kernel.name, choice.kernel.layout) == ("cute.nvfp4_moe", "packed_64x128")
    (choice,) = {op.choice for op in plan_model(tmp_path, "sm_100").ops if op.label == "layers.1.ffn.experts"}
    assert choice.kernel.name == "ref.nvfp4_moe", "W4A4 would need an input_scale, and the release has none"


WO_A = "layers.1.attn.wo_a"
WIDER = {"hidden_size": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("layout", "sizes", "demands", "kernel"),
    [
        ("deepseek-native", {}, {}, "cute.grouped_linear_fp8_sm90"),
        ("deepseek-native", WIDER, {"is_batch_invariant": True}, "cute.grouped_linear_fp8_sm90_invariant"),
        ("deepseek-native", {"o_lora_rank": 64}, {}, "triton.grouped_linear"),
        ("deepseek-native", {"head_dim": 192}, {}, "triton.grouped_linear"),
        ("full-nvfp4", {}, {}, "triton.grouped_linear"),
    ],
    ids=["fp8", "invariant", "few rows", "short heads", "bf16"],
)
def test_hopper_multiplies_wo_a_as_it_is_stored(
    layout: str,
    sizes: dict[str, int],
    demands: dict[str, bool],
    kernel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In FP8 where the file has FP8 and 128 divides its sizes; otherwise decoded to BF16, or BF16 as it is."""
    monkeypatch.setattr("ownpath.kernels.fp8.linear.num_sms", lambda _: 132)
    random_checkpoint(tmp_path, layout, **SMALLER, **{"head_dim": 128, "o_lora_rank": 128, **sizes})
    subject = subject_on(tmp_path, "sm_90", **demands)
    (choice,) = {op.choice for op in subject.plan.ops if op.label == WO_A}
    assert choice.kernel.name == kernel
    assert (choice.kernel.layout == "dequantized") == (layout == "deepseek-native" and kernel.startswith("triton"))
    named = configs_of(subject.plan, subject.index)
    assert (kernel in named) == kernel.startswith("cute"), "compiled ahead"
    decodes = any(".decode." in slot for slot in subject.plan.slots)
    assert decodes == (not demands), "torch's twins are not invariant: then every step stays on the reference"


def lossless_cast(tensors: Tensors) -> Tensors:
    """ModelOpt's cast, from its description: codes verbatim, 2^(k - k_max + 8) twice, 2^(k_max - 8) for the matrix."""

    def parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        module, _, suffix = name.rpartition(".")
        if ".ffn.experts." not in name or suffix == "weight":
            yield name, tensor
            return
        k = tensor.view(torch.uint8).int() - 127
        top = k.max()
        yield f"{module}.weight_scale", (2.0 ** (k - (top - 8))).repeat_interleave(2, 1).to(torch.float8_e4m3fn)
        yield f"{module}.weight_scale_2", 2.0 ** (top - 8).float()
        yield f"{module}.input_scale", torch.tensor(1e-3)

    return dict(part for item in tensors.items() for part in parts(*item))


def test_the_lossless_cast_of_the_same_weights_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cast")
    rewrite(tmp_path / "cast", lossless_cast)
    model = load_model(tmp_path / "cast", EngineConfig(max_model_len=64))
    assert model.lossless_casts == ("layers.0.ffn.experts", "layers.1.ffn.experts")
    names = {op.encoding.name for op in plan_model(tmp_path / "cast", "cpu").ops}
    assert names == {"modelopt-nvfp4", "native-fp8-block", "bf16"}
    assert torch.equal(logits(folder), logits(tmp_path / "cast"))


def test_the_experts_as_bf16_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """E2M1 x 2^k has two significant bits: BF16 holds it, and sums of it keep their order on the plain runner."""
    shutil.copytree(folder, tmp_path / "bf16")

    def decode(tensors: Tensors) -> Tensors:
        decoded = dict(tensors)
        for name in tensors:
            module = name.removesuffix(".weight")
            if ".ffn.experts." in name and name != module:
                weight = QuantTensor(tensors[name].view(torch.uint8), decoded.pop(f"{module}.scale"), None, MXFP4)
                decoded[name] = dequantize(weight).to(torch.bfloat16)
                assert torch.equal(decoded[name].float(), dequantize(weight))
        return decoded

    rewrite(tmp_path / "bf16", decode)
    experts = next(op for op in plan_model(tmp_path / "bf16", "cpu").ops if op.label == "layers.1.ffn.experts")
    assert (experts.encoding.name, experts.choice.kernel.runner) == ("bf16", "PlainMoE")
    assert torch.equal(logits(folder), logits(tmp_path / "bf16"))


def test_scales_become_nvfp4s_in_the_memory_they_were_read_into(folder: Path) -> None:
    plan = plan_model(folder, "cpu")
    loaded = load_weights(plan, CheckpointIndex.open(folder), torch.device("cpu"))
    operands = dict(zip((op.label for op in plan.ops), loaded.operands, strict=True))
    experts = operands["layers.1.ffn.experts"]
    assert experts.num_bytes == 8 * 3 * 64 * 64 * (1 / 2 + 1 / 16), "codes, and an E4M3 scale for each 16 of them"
    room = experts.scale_memory["w2_scale"]
    assert room.untyped_storage().data_ptr() == experts.buffers["w2_scale"][0].untyped_storage().data_ptr()
    read = experts.buffers["w2_scale"][0].view(torch.uint8).int() - 127
    make_runners(plan, loaded.operands)
    grown = room.float()
    for expert in range(8):
        assert torch.equal(grown[expert], (2.0 ** (read[expert] - (read[expert].max() - 8))).repeat_interleave(2, 1))


@pytest.mark.parametrize(("projection", "operand"), [("w1", "w13_scale"), ("w3", "w13_scale"), ("w2", "w2_scale")])
def test_scales_that_span_too_much_are_named(projection: str, operand: str, folder: Path) -> None:
    """E4M3 holds powers of two from 2^-9 to 2^8; a non-zero block 18 powers under the largest has none."""
    key = f"{EXPERT}.{projection}"

    def change(tensors: Tensors, distance: int) -> Tensors:
        scale = tensors[f"{key}.scale"].view(torch.uint8)
        scale[:] = 120
        for partner in ("w1", "w3"):
            tensors[f"{EXPERT}.{partner}.scale"].view(torch.uint8).clamp_(max=120)
        tensors[f"{key}.weight"][5] = 0x22
        scale[5, 1] = 120 - distance
        return tensors

    rewrite(folder, lambda tensors: change(tensors, 17))
    load_model(folder, EngineConfig(max_model_len=64))
    rewrite(folder, lambda tensors: change(tensors, 18))
    named = rf"layers\.1\.ffn\.experts\.3\.{projection}\b.*: {operand} of expert 3 spans more than"
    with pytest.raises(CheckpointError, match=named):
        load_model(folder, EngineConfig(max_model_len=64))


@pytest.mark.parametrize("suffix", ["weight", "scale"])
def test_a_missing_part_is_named(suffix: str, folder: Path) -> None:
    key = f"{EXPERT}.w1.{suffix}"
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != key})
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
        load_model(folder, EngineConfig(max_model_len=64))


def test_a_nan_scale_is_named(folder: Path) -> None:
    key = f"{EXPERT}.w1.scale"

    def change(tensors: Tensors) -> Tensors:
        tensors[key].view(torch.uint8)[7, 1] = 0xFF
        return tensors

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"'{key}' .*block scale \[7, 1\] is NaN"):
        load_model(folder, EngineConfig(max_model_len=64))


def test_a_block_is_whole_or_an_error(folder: Path) -> None:
    index = CheckpointIndex.open(folder)
    with pytest.raises(CheckpointError, match=r"w2.weight'.*MXFP4 cannot hold a width of 48: its blocks are 32 wide"):
        detect(index, ModuleSpec(f"{EXPERT}.w2", (64, 48)))
