"""The same weights give the same bits, in whatever form an exporter stores them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.pages import inspection_text
from support.tiny_exports import (
    Tensors,
    compressed_nvfp4,
    e8m0_bytes,
    logits_of,
    modules_with,
    mxfp4_weights,
    mxfp8_of,
    tiny_tensors,
    without_nvfp4,
    write_tiny,
)

from ownpath.checkpoint.errors import CheckpointError
from ownpath.config import EngineConfig
from ownpath.finding import failed
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.numerics import decode_e8m0, dequantize
from ownpath.official import Step
from ownpath.plan.errors import PlanError
from ownpath.qtensor import QuantTensor

W2 = "layers.1.ffn.experts.3.w2"
Change = Callable[[Tensors], Tensors]


def failures(folder: Path) -> list[tuple[str, str]]:
    """The inspection's failures: warnings are not."""
    return [(problem.id, problem.where) for problem in failed(inspect_folder(folder).problems)]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits_of(default_model_dir())


# --- the same tensors in another form: the same bits ------------------------------------------------------------------


def renamed(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def reshaped(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {key: change(t) if key.endswith(ending) else t for key, t in tensors.items()}


def one_linear_per_expert(key: str) -> str:
    """transformers' names, with one Linear for each expert."""
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        if ".experts." in key or ".shared_experts." in key:
            key = key.replace(f".{old}.", f".{new}.")
    key = key.replace(".ffn.", ".mlp.").replace(".attn.", ".self_attn.").replace(".wq_a.", ".q_a_proj.")
    key = key.replace("attn_norm.", "input_layernorm.").replace("embed.", "embed_tokens.")
    return f"model.{key}" if not key.startswith("head.") else "lm_head.weight"


def _above(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.cat((gate.view(torch.uint8), up.view(torch.uint8))).view(gate.dtype)


def gate_above_up(tensors: Tensors) -> Tensors:
    """Gate and up of each expert as one ``gate_up_proj``, which share their scalars."""
    fused = {}
    for key, tensor in tensors.items():
        if ".experts." in key and ".w1." in key:
            up = tensors[key.replace(".w1.", ".w3.")]
            both = tensor if tensor.ndim == 0 else _above(tensor, up)
            fused[key.replace(".w1.", ".gate_up_proj.")] = both
        elif not (".experts." in key and ".w3." in key):
            fused[key] = tensor
    return fused


def chain(*changes: Change) -> Change:
    def change(tensors: Tensors) -> Tensors:
        for one in changes:
            tensors = one(tensors)
        return tensors

    return change


SAME = {
    "prefixed": renamed(lambda key: f"model.{key}"),
    "one-linear-per-expert": chain(
        renamed(one_linear_per_expert),
        reshaped("scale_2", lambda t: t.reshape(1, 1)),
        reshaped(".weight_scale", lambda t: t.view(torch.uint8)),
        reshaped("norm.weight", lambda t: t.reshape(1, -1)),
        reshaped("gate.bias", lambda t: t.reshape(-1, 1)),
    ),
    "scale-inv-as-flat-i8": chain(
        renamed(lambda key: key.replace("indexer.wq_b.scale", "indexer.wq_b.weight_scale_inv")),
        reshaped("weight_scale_inv", lambda t: t.view(torch.int8).flatten()),
        reshaped(".weight_scale", torch.flatten),
        reshaped("tid2eid", lambda t: t.to(torch.int32)),
        reshaped("norm.weight", lambda t: t.float()),
    ),
    "fp8-scales-as-f32": chain(
        reshaped("indexer.wq_b.scale", decode_e8m0),
        reshaped(".weight_scale", lambda t: t.unsqueeze(-1)),
        reshaped("embed.weight", lambda t: t.float()),
    ),
    "fp8-scales-as-f16": chain(
        reshaped("indexer.wq_b.scale", lambda t: decode_e8m0(t).half()),
        reshaped(f"{W2}.weight", lambda t: t.view(torch.int8)),
        reshaped("tid2eid", lambda t: t.to(torch.int16)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_another_form_of_the_same_tensors_gives_the_same_bits(
    name: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path, SAME[name](tiny_tensors()))
    assert torch.equal(logits_of(folder), expected)


def test_gate_and_up_in_one_tensor_give_the_same_bits(expected: torch.Tensor, tmp_path: Path) -> None:
    """The embedded model's w1 and w3 share a global scale; their input scale is not read."""
    tensors = tiny_tensors()
    for key in tensors:
        if key.endswith(".w1.weight_scale_2") and ".experts." in key:
            assert tensors[key] == tensors[key.replace(".w1.", ".w3.")]
    assert torch.equal(logits_of(write_tiny(tmp_path, gate_above_up(tensors))), expected)


def test_one_file_without_an_index_and_stray_copies_beside_it(expected: torch.Tensor, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "single", tiny_tensors(), indexed=False)
    assert torch.equal(logits_of(folder), expected)
    folder = write_tiny(tmp_path / "strays", tiny_tensors())
    (folder / "original").mkdir()
    for stray in (folder / "consolidated.safetensors", folder / "original" / "model.safetensors"):
        stray.write_bytes((folder / "model.safetensors").read_bytes())
    assert torch.equal(logits_of(folder), expected)
    assert failures(folder) == []


# --- small parameters in any float that widens ------------------------------------------------------------------------

SMALL_ENDINGS = ("attn_sink", ".ape", "_fn", "_base", "_scale", "gate.bias", "norm.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_parameters_in_16_bits_widen_without_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same numbers in float32 give the same bits, and the plan counts what is on disk."""
    tensors = tiny_tensors()
    small = [key for key in tensors if key.endswith(SMALL_ENDINGS) and "t_scale" not in key]
    narrow = tensors | {key: tensors[key].to(dtype) for key in small}
    wide = tensors | {key: narrow[key].float() for key in small}
    folder = write_tiny(tmp_path / "narrow", narrow)
    assert torch.equal(logits_of(folder), logits_of(write_tiny(tmp_path / "wide", wide)))
    plan = plan_model(folder, "cpu")
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert {plan.stored_dtypes[key] for key in small} == {name}
    assert failures(folder) == []


def test_unquantised_matrices_in_16_bits_of_the_other_kind(tmp_path: Path) -> None:
    """F16 does not fit BF16: it is held in float32, where it is exact."""
    tensors = tiny_tensors()
    plain = [key for key in tensors if key.endswith((".wo_a.weight", "wgate.weight", "wkv.weight", "gate.weight"))]
    plain = ["head.weight", "embed.weight", *(key for key in plain if tensors[key].dtype is torch.bfloat16)]
    half = tensors | {key: tensors[key].half() for key in plain}
    wide = tensors | {key: half[key].float() for key in plain}
    folder = write_tiny(tmp_path / "half", half)
    assert torch.equal(logits_of(folder), logits_of(write_tiny(tmp_path / "wide", wide)))
    assert {op.encoding.name for op in plan_model(folder, "cpu").ops_of("head")} == {"fp16"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32], ids=str)
def test_a_parameter_that_float32_does_not_hold_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    key = "layers.1.attn.attn_sink"
    tensors = tiny_tensors()
    folder = write_tiny(tmp_path, tensors | {key: tensors[key].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"'{key}'.*expected F32 or BF16 or F16"):
        plan_model(folder, "cpu")
    assert failures(folder) == [("wrong-dtype", key)]


# --- input scales: nothing is demanded that no planned kernel reads ---------------------------------------------------


def test_weight_only_exports_need_no_input_scales(tmp_path: Path) -> None:
    """And the answer does not depend on them: a divisor that is infinite or no scalar changes no bit."""
    whole = compressed_nvfp4(tiny_tensors())
    weight_only = write_tiny(tmp_path / "weight-only", compressed_nvfp4(tiny_tensors(), has_input_scales=False))
    expected = logits_of(write_tiny(tmp_path / "whole", whole))
    assert torch.equal(logits_of(weight_only), expected)
    assert failures(weight_only) == []
    key = f"{W2}.input_global_scale"
    for number, value in enumerate((torch.tensor([torch.inf]), torch.ones(3))):
        folder = write_tiny(tmp_path / str(number), whole | {key: value})
        assert torch.equal(logits_of(folder), expected)
        assert failures(folder) == []


def test_modelopt_exports_without_input_scales(expected: torch.Tensor, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in tiny_tensors().items() if not key.endswith("input_scale")}
    assert torch.equal(logits_of(write_tiny(tmp_path, tensors)), expected)


def test_kernels_that_quantise_activations_name_the_scale_that_is_missing(tmp_path: Path) -> None:
    key = f"{W2}.input_scale"
    folder = write_tiny(tmp_path, {k: t for k, t in tiny_tensors().items() if k != key})
    (op,) = plan_model(folder, "sm_100").ops_of("layers.1.ffn.experts")
    assert op.choice.kernel.name == "ref.nvfp4_moe"
    assert any(lack.startswith("triton.nvfp4_moe_w4a4_sm100 ") and f"'{key}' is missing" in lack
               for lack in op.choice.passed_over)  # fmt: skip
    (other,) = plan_model(folder, "sm_100").ops_of("layers.2.ffn.experts")
    assert other.choice.kernel.name == "triton.nvfp4_moe_w4a4_sm100"
    with pytest.raises(PlanError, match=rf"layers\.1\.ffn\.experts: .*'{key}' is missing"):
        plan_model(folder, "cpu", official=frozenset({Step.NVFP4_INPUTS}))


def test_kernels_that_quantise_activations_judge_their_scales(tmp_path: Path) -> None:
    key = f"{W2}.input_scale"
    folder = write_tiny(tmp_path, tiny_tensors() | {key: torch.tensor(torch.inf)})
    with pytest.raises(CheckpointError, match=rf"'{key}'.*must be finite and positive"):
        load_model(folder, EngineConfig(max_model_len=64, official=frozenset({Step.NVFP4_INPUTS})))


def test_inspect_says_which_kernels_would_need_the_missing_scales(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, compressed_nvfp4(tiny_tensors(), has_input_scales=False))
    text = inspection_text(inspect_folder(folder))
    (line,) = (line for line in text.splitlines() if line.startswith("no input scale"))
    assert "124 NVFP4 modules" in line
    assert "triton.nvfp4_moe_w4a4_sm100" in line


# --- further encodings ------------------------------------------------------------------------------------------------


MXFP4_FORMS: dict[str, Callable[[str, QuantTensor], Tensors]] = {
    "native-mxfp4": lambda m, w: {f"{m}.weight": w.qdata.view(torch.int8), f"{m}.scale": e8m0_bytes(w)},
    "compressed-tensors-mxfp4": lambda m, w: {f"{m}.weight_packed": w.qdata, f"{m}.weight_scale": e8m0_bytes(w)},
    "modelopt-mxfp4": lambda m, w: {f"{m}.weight": w.qdata, f"{m}.weight_scale": e8m0_bytes(w)},
}


@pytest.fixture(scope="module")
def mxfp4_experts(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The logits of the model with MXFP4 experts, written as float32."""
    tensors = tiny_tensors()
    modules = modules_with(tensors, "weight_scale_2", ".experts.")
    decoded = {f"{name}.weight": dequantize(w) for name, w in mxfp4_weights(tensors, modules).items()}
    return logits_of(write_tiny(tmp_path_factory.mktemp("plain"), without_nvfp4(tensors, modules) | decoded))


@pytest.mark.parametrize("form", MXFP4_FORMS)
def test_mxfp4_experts_of_every_exporter(form: str, mxfp4_experts: torch.Tensor, tmp_path: Path) -> None:
    """As NVFP4 the sums have other factors outside, powers of two: the same bits as float32 weights."""
    tensors = tiny_tensors()
    modules = modules_with(tensors, "weight_scale_2", ".experts.")
    changed = without_nvfp4(tensors, modules)
    for name, weight in mxfp4_weights(tensors, modules).items():
        changed |= MXFP4_FORMS[form](name, weight)
    folder = write_tiny(tmp_path, changed)
    assert torch.equal(logits_of(folder), mxfp4_experts)
    assert failures(folder) == []
    for device, kernel in (("cpu", "ref.nvfp4_moe"), ("sm_90", "cute.nvfp4_moe"), ("sm_100", "ref.nvfp4_moe")):
        (op,) = plan_model(folder, device).ops_of("layers.2.ffn.experts")
        assert (op.encoding.name, op.choice.kernel.name) == (form, kernel)


@pytest.mark.parametrize("form", ["modelopt-mxfp4", "compressed-tensors-mxfp4"])
def test_dense_mxfp4(form: str, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    dense = (".wq_b", "shared_experts.w2")
    modules = [name for name in modules_with(tensors, "weight_scale_2") if name.endswith(dense)]
    weights = mxfp4_weights(tensors, modules)
    rest = without_nvfp4(tensors, modules)
    stored = {key: t for name, weight in weights.items() for key, t in MXFP4_FORMS[form](name, weight).items()}
    decoded = {f"{name}.weight": dequantize(weight) for name, weight in weights.items()}
    folder = write_tiny(tmp_path / "mxfp4", rest | stored)
    assert torch.equal(logits_of(folder), logits_of(write_tiny(tmp_path / "plain", rest | decoded)))
    assert failures(folder) == []
    (op,) = plan_model(folder, "sm_90").ops_of("layers.0.attn.wq_b")
    assert op.choice.kernel.name == "cute.nvfp4_linear"


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale"])
def test_mxfp8_experts_and_projections(scale_name: str, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    quantized = modules_with(tensors, "weight_scale_2")
    modules = [name for name in quantized if ".experts." in name or name.endswith((".wq_b", "shared_experts.w2"))]
    modules += modules_with(tensors, "weight", "wo_a")
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name in modules:
        rows, columns = tensors[f"{name}.weight"].shape
        columns *= 2 if name in quantized else 1
        weights[name] = mxfp8_of(0.02 * torch.randn(rows, columns, generator=generator))
    rest = without_nvfp4(tensors, modules)
    stored = {f"{name}.weight": weight.qdata for name, weight in weights.items()}
    stored |= {f"{name}.{scale_name}": e8m0_bytes(weight) for name, weight in weights.items()}
    decoded = {f"{name}.weight": dequantize(weight) for name, weight in weights.items()}
    folder = write_tiny(tmp_path / "mxfp8", rest | stored)
    assert torch.equal(logits_of(folder), logits_of(write_tiny(tmp_path / "plain", rest | decoded)))
    assert failures(folder) == []
    for slot, kernel in (("layers.0.ffn.experts", "ref.mxfp8_moe"), ("layers.0.attn.wq_b", "ref.mxfp8_linear")):
        (op,) = plan_model(folder, "sm_90").ops_of(slot)
        assert op.choice.kernel.name == kernel
        assert "no faster kernel reads a scale per 1 x 32" in op.choice.why
