"""MXFP4 scales that NVFP4 cannot hold: inspect finds them, loading names the option, and its answer is exact."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_exports import (
    Tensors,
    logits_of,
    modules_with,
    mxfp4_weights,
    tiny_tensors,
    without_nvfp4,
    write_tiny,
)

from ownpath.checkpoint.errors import CheckpointError
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.finding import failed
from ownpath.formats import MXFP4
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import load_model, plan_model
from ownpath.numerics import dequantize
from ownpath.plan.errors import PlanError
from ownpath.qtensor import QuantTensor

SLOT = "layers.1.ffn.experts"
WIDE = f"{SLOT}.3.w2"
BLOCK = (7, 3)
EXPONENT = 90
"""2^-37, where the others have about 2^-6."""


def wide_experts() -> tuple[Tensors, Tensors]:
    """The embedded model with MXFP4 experts, one of which has a tiny, non-zero block; and the same as float32."""
    tensors = tiny_tensors()
    modules = modules_with(tensors, "weight_scale_2", ".experts.")
    weights = mxfp4_weights(tensors, modules)
    scale = weights[WIDE].scale
    assert scale is not None
    scale.view(torch.uint8)[BLOCK] = EXPONENT
    rest = without_nvfp4(tensors, modules)
    stored = {f"{name}.weight": weight.qdata for name, weight in weights.items()}
    stored |= {f"{name}.scale": weight.scale for name, weight in weights.items() if weight.scale is not None}
    return rest | stored, rest | {f"{name}.weight": dequantize(weight) for name, weight in weights.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("wide"), wide_experts()[0])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The logits of the same weights, decoded by torch and stored in float32."""
    return logits_of(write_tiny(tmp_path_factory.mktemp("exact"), wide_experts()[1]))


def test_loading_names_the_expert_and_the_option(folder: Path) -> None:
    message = rf"^layers\.1\.ffn\.experts\.3\.w2: .*18 powers of two.*`--reference {SLOT}`"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, EngineConfig(max_model_len=64))


def test_the_plan_states_what_it_assumes(folder: Path) -> None:
    plan = plan_model(folder, "cpu")
    assert any(line.startswith("assumed of 4 MXFP4 operands") for line in plan.notes)
    every = plan_model(folder, "cpu", reference=frozenset({"layers.*.ffn.experts"}))
    assert every.notes == ()


@pytest.mark.parametrize("name", [SLOT, WIDE, "layers.1.ffn", "layers.1.*.experts"])
def test_the_reference_computes_what_is_stored(name: str, folder: Path, exact: torch.Tensor) -> None:
    plan = plan_model(folder, "sm_90", reference=frozenset({name}))
    (op,), (other,) = plan.ops_of(SLOT), plan.ops_of("layers.2.ffn.experts")
    assert (op.choice.kernel.name, other.choice.kernel.name) == ("ref.mxfp4_moe", "cute.nvfp4_moe")
    assert op.choice.why.startswith("asked for by --reference")
    assert torch.equal(logits_of(folder, frozenset({name})), exact)


def test_a_name_that_is_none_of_the_model_is_an_error(folder: Path) -> None:
    for name in ("layers.9", "layers.1.ffn.expert", "wq_b", "layers.1.ffn.experts.3.w9"):
        with pytest.raises(PlanError, match=f"--reference {name}: no operation or module"):
            plan_model(folder, "cpu", reference=frozenset({name}))


@pytest.mark.parametrize("all_scales", [False, True])
def test_inspect_finds_the_block(all_scales: bool, folder: Path) -> None:
    (problem,) = failed(inspect_folder(folder, read_all_scales=all_scales).problems)
    assert (problem.id, problem.where) == ("wide-scales", WIDE)
    assert f"block {list(BLOCK)} has the scale 2^-37" in problem.message
    assert f"--reference {SLOT}" in problem.message
    assert not failed(inspect_folder(folder, reference=frozenset({SLOT})).problems)


def test_a_wide_scale_over_zeros_is_no_fault(tmp_path: Path) -> None:
    tensors = dict(wide_experts()[0])
    codes = tensors[f"{WIDE}.weight"].clone()
    codes[BLOCK[0], 16 * BLOCK[1] : 16 * (BLOCK[1] + 1)] = 0x80  # zeros of either sign
    folder = write_tiny(tmp_path, tensors | {f"{WIDE}.weight": codes})
    assert not failed(inspect_folder(folder).problems)
    load_model(folder, EngineConfig(max_model_len=64))


def test_gate_and_up_count_together(tmp_path: Path) -> None:
    """They share a global scale: each spans little, both together too much."""
    tensors = dict(wide_experts()[0])
    tensors[f"{WIDE}.scale"] = tensors[f"{SLOT}.4.w2.scale"].clone()
    up = tensors[f"{SLOT}.5.w3.scale"]
    tensors[f"{SLOT}.5.w3.scale"] = (up.view(torch.uint8) - 20).view(up.dtype)
    folder = write_tiny(tmp_path, tensors)
    (problem,) = failed(p for p in inspect_folder(folder).problems if p.id == "wide-scales")
    assert problem.where == f"{SLOT}.5.w3"
    with pytest.raises(CheckpointError, match=r"^layers\.1\.ffn\.experts\.5\.w1 and .*\.5\.w3: "):
        load_model(folder, EngineConfig(max_model_len=64))


def test_a_dense_matrix_with_wide_scales(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    name = "layers.0.attn.wq_b"
    weight = mxfp4_weights(tensors, [name])[name]
    assert weight.scale is not None
    weight.scale.view(torch.uint8)[BLOCK] = EXPONENT
    rest = without_nvfp4(tensors, [name])
    folder = write_tiny(tmp_path / "mxfp4", rest | {f"{name}.weight": weight.qdata, f"{name}.scale": weight.scale})
    assert [(p.id, p.where) for p in failed(inspect_folder(folder).problems)] == [("wide-scales", name)]
    with pytest.raises(CheckpointError, match=rf"^{name}: .*`--reference {name}`"):
        load_model(folder, EngineConfig(max_model_len=64))
    plain = QuantTensor(weight.qdata, weight.scale, None, MXFP4)
    expected = write_tiny(tmp_path / "plain", rest | {f"{name}.weight": dequantize(plain)})
    assert torch.equal(logits_of(folder, frozenset({name})), logits_of(expected))


def test_the_commands_take_the_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [str(folder), "The capital of France is", "--max-tokens", "3"]
    assert main(["generate", *prompt]) == 2
    assert f"--reference {SLOT}" in capsys.readouterr().err
    assert main(["generate", *prompt, "--reference", SLOT]) == 0
    capsys.readouterr()
    assert main(["plan", str(folder), "--json", "--reference", SLOT]) == 0
    kernels = {op["slot"]: op["kernel"] for op in json.loads(capsys.readouterr().out)["ops"]}
    assert (kernels[SLOT], kernels["layers.0.ffn.experts"]) == ("ref.mxfp4_moe", "ref.nvfp4_moe")
    assert main(["plan", str(folder), "--reference", "layers.7"]) == 2
    assert "--reference layers.7" in capsys.readouterr().err
    assert main(["inspect", str(folder)]) == 1
    assert main(["inspect", str(folder), "--reference", SLOT]) == 0


def test_verify_proves_the_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--stages", "file,load", "--layers", "1", "--experts", "4"]
    assert main(["verify", str(folder), *stages, "--reference", SLOT]) == 0, capsys.readouterr().out
    assert main(["verify", str(folder), "--stages", "file", "--layers", "1"]) == 1
