"""config.json, hf_quant_config.json and the tokenizer against the tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
from cpu.chat.small_tokenizer import tokenizer_spec

from ownpath.inspect.inspection import inspect_folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def found(folder: Path) -> set[tuple[str, str]]:
    return {(problem.id, problem.where) for problem in inspect_folder(folder).problems}


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("num_hidden_layers", 4, "num_hidden_layers"),
        ("num_hidden_layers", 6, "num_hidden_layers"),
        ("n_routed_experts", 7, "n_routed_experts"),
        ("n_routed_experts", 9, "n_routed_experts"),
        ("num_hash_layers", 0, "num_hash_layers"),
        ("num_hash_layers", 2, "num_hash_layers"),
        ("compress_ratios", [4, 4, 128, 4, 128, 0], "compress_ratios[0]"),
        ("compress_ratios", [0, 4, 128, 4, 0, 0], "compress_ratios[4]"),
        ("compress_ratios", [0, 128, 128, 4, 128, 0], "compress_ratios[1]"),
    ],
)
def test_a_config_that_contradicts_the_tensors(field: str, value: Any, where: str, folder: Path) -> None:
    change_config(folder, **{field: value})
    assert ("config-contradiction", where) in found(folder)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 128), ("vocab_size", 1000), ("q_lora_rank", 64)])
def test_a_size_that_contradicts_the_tensors_is_a_wrong_shape(field: str, value: int, folder: Path) -> None:
    change_config(folder, **{field: value})
    assert "wrong-shape" in {check for check, _ in found(folder)}


@pytest.mark.parametrize("value", [2**31 - 1, 10**9])
def test_a_config_of_billions_of_experts_is_not_counted_out(value: int, folder: Path) -> None:
    change_config(folder, n_routed_experts=value)
    inspection = inspect_folder(folder)
    assert inspection.contents is None
    assert ("config-contradiction", "n_routed_experts") in {(p.id, p.where) for p in inspection.problems}
    assert inspection.seconds < 10


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"vocab_size": ' + "9" * 5000 + "}",
        '{"architectures": 5}',
        '{"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}',
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
    ],
    ids=range(8),
)
def test_an_unusable_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    inspection = inspect_folder(folder)
    assert inspection.contents is None
    assert [(problem.id, problem.where) for problem in inspection.problems] == [("config", "config.json")]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10**400},
        {"compress_ratios": [0, 4.0, 128, 4, 128, 0]},
        {"compress_ratios": [False, 4, 128, 4, 128, 0]},
        {"hidden_act": ["silu"]},
        {"rope_scaling": []},
        {"architectures": {"a": 1}, "model_type": None},
    ],
    ids=range(6),
)
def test_a_field_of_another_type_is_a_config_problem(changes: dict[str, Any], folder: Path) -> None:
    change_config(folder, **changes)
    assert found(folder) == {("config", "config.json")}


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert found(folder) == {("config", "config.json")}


def write_quant_config(folder: Path, quantization: Any) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))


def test_a_quantisation_config_that_agrees(folder: Path) -> None:
    """As ModelOpt writes it for experts only; the routed experts are matched by no pattern of the excluded."""
    layers = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in range(5)}
    excluded = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    write_quant_config(folder, {"quantized_layers": layers, "exclude_modules": excluded})
    assert found(folder) == set()


def test_a_format_that_contradicts_the_tensors(folder: Path) -> None:
    names = [f"layers.0.ffn.experts.{e}.{w}" for e in range(8) for w in ("w1", "w2", "w3")]
    layers = {"layers.0.ffn.experts": {"quant_algo": "FP8_PB_WO"}, "layers.1.attn.wq_a": {"quant_algo": "NVFP4"}}
    write_quant_config(folder, {"quantized_layers": layers})
    assert found(folder) == {("format-contradiction", name) for name in (*names, "layers.1.attn.wq_a")}


def test_an_excluded_module_that_is_quantised(folder: Path) -> None:
    write_quant_config(folder, {"exclude_modules": ["layers.2.ffn.experts.5.*"]})
    assert found(folder) == {("format-contradiction", f"layers.2.ffn.experts.5.{w}") for w in ("w1", "w2", "w3")}


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"quantization": '])
def test_an_unreadable_quantisation_config(text: str, folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(text)
    assert found(folder) == {("format-contradiction", "hf_quant_config.json")}


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(folder: Path) -> None:
    spec = tokenizer_spec()
    most = max(spec["model"]["vocab"].values())
    spec["model"]["vocab"] |= {"zz" + "z" * n: most + n for n in range(1, 9)}  # the embedding has 7 rows to spare
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert found(folder) == {("tokenizer", "vocab_size")}


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_ids_that_the_tokenizer_contradicts(field: str, folder: Path) -> None:
    change_config(folder, **{field: 9})
    assert found(folder) == {("tokenizer", field)}


@pytest.mark.parametrize("text", [None, "", "{}", "[" * 100_000])
def test_an_unusable_tokenizer(text: str | None, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    assert found(folder) == {("tokenizer", "tokenizer.json")}


def test_a_claim_of_config_json_that_the_tensors_do_not_bear_out(folder: Path) -> None:
    change_config(folder, expert_dtype="bf16")
    (problem,) = inspect_folder(folder).problems
    assert (problem.id, problem.where) == ("format-contradiction", "config.json")
    assert "expert_dtype is 'bf16'" in problem.message
