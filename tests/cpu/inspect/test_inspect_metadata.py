"""config.json, hf_quant_config.json and the tokenizer against the tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
from cpu.chat.small_tokenizer import tokenizer_spec
from cpu.server.model_folder import VOCAB
from support.checkpoints import random_checkpoint
from support.pages import inspection_text

from ownpath.cli import main
from ownpath.finding import Verdict, failed
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


def warnings(folder: Path) -> list[str]:
    """The messages of an inspection that finds nothing worse, without who fails on them."""
    problems = inspect_folder(folder).problems
    assert not failed(problems)
    return [problem.message.split("; the tensors decide")[0] for problem in problems]


def write_quant_config(folder: Path, quantization: Any) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))


def test_a_quantisation_config_that_agrees(folder: Path) -> None:
    """As ModelOpt writes it for experts only; the routed experts are matched by no pattern of the excluded."""
    layers = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in range(5)}
    excluded = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    write_quant_config(folder, {"quantized_layers": layers, "exclude_modules": excluded})
    assert found(folder) == set()


def test_a_format_that_contradicts_the_tensors(folder: Path) -> None:
    layers = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4"} for n in range(1, 5)}
    layers |= {"layers.0.ffn.experts": {"quant_algo": "FP8_PB_WO"}, "layers.1.attn.wq_a": {"quant_algo": "NVFP4"}}
    write_quant_config(folder, {"quantized_layers": layers})
    field = "hf_quant_config.json: quantization.quantized_layers"
    experts = "'layers.0.ffn.experts.0.w1' is stored as NVFP4 (modelopt-nvfp4) and 23 more alike"
    assert sorted(warnings(folder)) == [
        f"{field} says FP8_PB_WO, but {experts}",
        f"{field} says NVFP4, but 'layers.1.attn.wq_a' is stored as FP8_BLOCK (native-fp8-block)",
    ]


def test_an_excluded_module_that_is_quantised(folder: Path) -> None:
    write_quant_config(folder, {"exclude_modules": ["layers.2.ffn.experts.5.*"]})
    where = "'layers.2.ffn.experts.5.w1' is stored as NVFP4 (modelopt-nvfp4) and 2 more alike"
    field = "hf_quant_config.json: quantization.exclude_modules has 'layers.2.ffn.experts.5.*'"
    assert warnings(folder) == [f"{field}, but {where}"]


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


@pytest.mark.parametrize(("field", "check"), [("bos_token_id", "token-id"), ("eos_token_id", "tokenizer")])
def test_ids_that_the_tokenizer_contradicts(field: str, check: str, folder: Path) -> None:
    """Prompts begin with the chat format's own marker, whatever config.json says; answers must be able to end."""
    change_config(folder, **{field: 9})
    assert found(folder) == {(check, field)}
    assert bool(failed(inspect_folder(folder).problems)) == (check == "tokenizer")


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
    assert problem.verdict is Verdict.WARN
    assert main(["inspect", str(folder)]) == 0


STALE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_the_two_config_files_are_held_against_each_other(folder: Path) -> None:
    """config.json kept the section of the FP8 release; ModelOpt's file is right. One FP8 module confirms nothing."""
    write_quant_config(
        folder, {"quantized_layers": {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4"} for n in range(5)}}
    )
    assert warnings(folder) == []
    change_config(folder, quantization_config=STALE)
    expert = "'layers.0.ffn.experts.0.w1'"
    method = "config.json: quantization_config.quant_method is 'fp8', but"
    assert set(warnings(folder)) == {
        f"{method} {expert} is stored as NVFP4 (modelopt-nvfp4) and 119 more alike",
        f"{method} hf_quant_config.json: quantization.quantized_layers says NVFP4, of {expert} and 119 more alike",
    }


def test_a_module_that_no_list_names_is_told(folder: Path) -> None:
    layers = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4"} for n in range(4)}
    write_quant_config(folder, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    (line,) = warnings(folder)
    assert "lists others only, but 'layers.4.ffn.experts.0.w1' is stored as NVFP4" in line


NVFP4_GROUP = {"targets": ["re:.*\\.ffn\\.experts\\.\\d+\\.(w1|w2|w3)$"], "weights": {"num_bits": 4, "type": "float",
               "strategy": "tensor_group", "group_size": 16}}  # fmt: skip
FP8_GROUP = {"targets": ["re:.*attn\\.(wq_a|wq_b|wkv|wo_a|wo_b)$"], "weights": {"num_bits": 8, "type": "float",
             "strategy": "block", "block_structure": [128, 128]}}  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "ignore", "said"),
    [
        ({"experts": NVFP4_GROUP, "attention": FP8_GROUP}, ["head"], None),
        (
            {"experts": NVFP4_GROUP},
            ["re:.*attn\\..*"],
            "ignore has 're:.*attn\\\\..*', but 'layers.0.attn.wq_a' is stored",
        ),
        (
            {"all": NVFP4_GROUP | {"targets": ["Linear"]}},
            ["head"],
            "config_groups.all has the target 'Linear', but 'layers.0.attn.wq_a' is stored as FP8_BLOCK",
        ),
        ({"slow": NVFP4_GROUP | {"targets": ["re:(.*)*x", "re:(a+)+$", "re:["]}}, [], None),
    ],
)
def test_the_groups_of_compressed_tensors(
    groups: dict[str, Any], ignore: list[str], said: str | None, folder: Path
) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    random_checkpoint(folder, "compressed-tensors", vocab_size=VOCAB)
    section = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore}
    change_config(folder, quantization_config=section)
    lines = warnings(folder)
    assert (lines == []) if said is None else any(said in line for line in lines)


# --- end tokens -------------------------------------------------------------------------------------------------------


def write_generation_config(folder: Path, **fields: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (1, None, {1: ("config.json",)}),
        ([1, 7], 1, {1: ("config.json", "generation_config.json"), 7: ("config.json",)}),
        (1, [1, 9], {1: ("config.json", "generation_config.json"), 9: ("generation_config.json",)}),
        (1, [7, 7], {1: ("config.json",), 7: ("generation_config.json",)}),
    ],
)
def test_every_end_token_counts_and_has_its_source(
    ours: Any, theirs: Any, expected: dict[int, tuple[str, ...]], folder: Path
) -> None:
    change_config(folder, eos_token_id=ours)
    write_generation_config(folder, eos_token_id=theirs)
    inspection = inspect_folder(folder)
    assert inspection.end_tokens is not None
    assert inspection.end_tokens.sources == expected
    assert not failed(inspection.problems)
    differs = theirs is not None and ours != theirs
    assert [p.id for p in inspection.problems] == ["end-tokens"] * differs
    assert f"answers end at token {'1 (config.json' if expected else ''}" in inspection_text(inspection)


@pytest.mark.parametrize("value", ["stop", [], [1, "2"], 1.5, True, {"id": 1}, [[1]]])
def test_an_end_token_that_is_none_names_file_and_field(value: Any, folder: Path) -> None:
    write_generation_config(folder, eos_token_id=value)
    (problem,) = inspect_folder(folder).problems
    assert (problem.id, problem.where) == ("generation-config", "generation_config.json")
    assert "generation_config.json: eos_token_id must be a token id" in problem.message
    assert failed([problem])


def test_an_end_token_beyond_the_vocabulary_is_told_and_left_out(folder: Path) -> None:
    write_generation_config(folder, eos_token_id=[1, 10**6, -1])
    inspection = inspect_folder(folder)
    assert {(p.id, p.where) for p in inspection.problems} == {("token-id", "eos_token_id")}
    assert inspection.end_tokens is not None
    assert inspection.end_tokens.ids == {1}
