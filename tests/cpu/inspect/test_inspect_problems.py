"""Each thing that can be wrong with tensors is one problem of its own kind, with the tensor named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.inspect.found import found
from cpu.server.model_folder import VOCAB
from safetensors.torch import load_file, save_file
from support.broken import Tensors, change_tensors
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.inspect.inspection import inspect_folder

EXPERT = "layers.1.ffn.experts.3.w2"
GATE, UP = "layers.1.ffn.experts.3.w1", "layers.1.ffn.experts.3.w3"


def update(**values: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key.replace("__", "."): value for key, value in values.items()})


def set_bytes(key: str, index: Any, value: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key].view(torch.uint8)[index] = value

    return change


def test_a_clean_model_has_no_problems(folder: Path) -> None:
    assert found(folder) == set()


@pytest.mark.parametrize(
    "key",
    [
        f"{EXPERT}.weight",
        f"{EXPERT}.weight_scale",
        f"{EXPERT}.weight_scale_2",
        "layers.1.attn.wkv.scale",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.ffn.gate.bias",
        "head.weight",
        "norm.weight",
    ],
)
def test_a_missing_tensor(key: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(key))
    assert found(folder) == {("missing-tensor", key)}


def test_every_missing_tensor_is_collected(folder: Path) -> None:
    keys = [f"layers.{n}.ffn.experts.{e}.{w}.weight_scale_2" for n in (1, 2) for e in (0, 7) for w in ("w1", "w2")]
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in (*keys, "layers.3.attn.attn_sink")])
    assert found(folder) == {("missing-tensor", key) for key in (*keys, "layers.3.attn.attn_sink")}


def test_an_unexpected_tensor(folder: Path) -> None:
    change_tensors(folder, update(layers__1__attn__wq_c__weight=torch.zeros(2, 2)))
    assert found(folder) == {("unexpected-tensor", "layers.1.attn.wq_c.weight")}


@pytest.mark.parametrize(
    ("key", "value", "check"),
    [
        (f"{EXPERT}.weight", torch.zeros(64, 23, dtype=torch.uint8), "wrong-shape"),
        (f"{EXPERT}.weight", torch.zeros(64, 24, dtype=torch.int32), "wrong-dtype"),
        (f"{EXPERT}.weight_scale", torch.zeros(64, 3, dtype=torch.int16), "wrong-dtype"),
        (f"{EXPERT}.weight_scale_2", torch.full((2,), 1e-4), "wrong-shape"),
        ("layers.0.attn.attn_sink", torch.zeros(4, dtype=torch.float64), "wrong-dtype"),
        ("embed.weight", torch.zeros(95, 64, dtype=torch.bfloat16), "wrong-shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_shape_or_dtype(key: str, value: torch.Tensor, check: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({key: value}))
    assert found(folder) == {(check, key)}


def test_both_wrong_parts_of_one_module(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[f"{EXPERT}.weight_scale_2"]
        tensors[f"{EXPERT}.weight_scale"] = torch.zeros(3, 3, dtype=torch.int16)

    change_tensors(folder, change)
    assert found(folder) == {
        ("missing-tensor", f"{EXPERT}.weight_scale_2"),
        ("wrong-dtype", f"{EXPERT}.weight_scale"),
    }


@pytest.mark.parametrize("value", [0.0, -1e-4, float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight_scale_2", "input_scale"])
def test_a_scalar_that_is_no_scale(part: str, value: float, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{EXPERT}.{part}": torch.tensor(value)}))
    assert found(folder) == {("input-scale" if part == "input_scale" else "scalar-scale", f"{EXPERT}.{part}")}


def test_a_reciprocal_scale(folder: Path) -> None:
    key = f"{EXPERT}.weight_scale_2"
    change_tensors(folder, lambda tensors: tensors.update({key: 1 / tensors[key]}))
    assert found(folder) == {("reciprocal-scale", key)}


@pytest.mark.parametrize("factor", [2e-4, 113 * 2.0**-149])
def test_an_out_of_band_scale(factor: float, folder: Path) -> None:
    """Far from its layer's others; or the bits of a small integer read as float32."""
    key = f"{EXPERT}.weight_scale_2"

    def change(tensors: Tensors) -> None:
        tensors[key] = torch.tensor(factor) if factor < 1e-30 else tensors[key] * factor

    change_tensors(folder, change)
    is_tiny = factor < 1e-30
    assert found(folder) == (
        {("scalar-scale", key)} if is_tiny else {("out-of-band-scale", key), ("weight-magnitude", EXPERT)}
    )


@pytest.mark.parametrize("bits", [0x7F, 0xFF, 0xB8])
def test_a_block_scale_that_is_nan_or_negative(bits: int, folder: Path) -> None:
    change_tensors(folder, set_bytes(f"{EXPERT}.weight_scale", (5, 1), bits))
    assert found(folder) == {("block-scale", f"{EXPERT}.weight_scale")}


def test_an_e8m0_block_scale_that_is_nan(folder: Path) -> None:
    change_tensors(folder, set_bytes("layers.1.attn.wq_b.scale", (0, 0), 0xFF))
    assert found(folder) == {("block-scale", "layers.1.attn.wq_b.scale")}


def test_a_block_scale_of_zero_over_values_that_are_not(folder: Path) -> None:
    change_tensors(folder, set_bytes(f"{EXPERT}.weight_scale", (5, 1), 0))
    assert found(folder) == {("vanished-blocks", f"{EXPERT}.weight_scale")}
    change_tensors(folder, set_bytes(f"{EXPERT}.weight_scale", (slice(0, 30), slice(None)), 0))
    assert found(folder) == {("zero-block-scale", f"{EXPERT}.weight_scale")}


def test_a_block_of_zeros_may_have_a_scale_of_zero(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale"].view(torch.uint8)[5, 1] = 0
        tensors[f"{EXPERT}.weight"][5, 8:16] = 0x80  # +0 and -0

    change_tensors(folder, change)
    assert found(folder) == set()


@pytest.mark.parametrize(
    ("key", "bits", "check"),
    [
        (f"{EXPERT}.weight_scale", 0, "zero-block-scale"),
        (f"{EXPERT}.weight_scale", 0x7E, "saturated-block-scale"),
        ("layers.1.attn.wq_b.scale", 0, "zero-block-scale"),
        ("layers.1.attn.wq_b.scale", 0xFE, "saturated-block-scale"),
    ],
)
def test_block_scales_that_vanished_or_saturated(key: str, bits: int, check: str, folder: Path) -> None:
    change_tensors(folder, set_bytes(key, slice(None), bits))
    assert found(folder) == {(check, key)}


def test_gate_and_up_scales_that_differ(folder: Path) -> None:
    key = f"{UP}.weight_scale_2"
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key] * 1.5}))
    assert found(folder) == {("gate-up-scale", GATE.removesuffix(".w1"))}


@pytest.mark.parametrize("expert", [-1, 8])
def test_ids_out_of_range(expert: int, folder: Path) -> None:
    key = "layers.0.ffn.gate.tid2eid"

    def change(tensors: Tensors) -> None:
        tensors[key][7, 2] = expert

    change_tensors(folder, change)
    (problem,) = inspect_folder(folder).problems
    assert (problem.id, problem.where) == ("expert-ids", key)
    assert f"({expert}) at [7, 2]" in problem.message


def test_experts_of_a_layer_stored_differently(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{EXPERT}.{part}"]
        tensors[f"{EXPERT}.weight"] = torch.zeros(64, 48, dtype=torch.bfloat16)

    change_tensors(folder, change)
    assert found(folder) == {("mixed-experts", EXPERT)}


# --- other exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_export_is_clean(layout: str, folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    random_checkpoint(folder, layout, vocab_size=VOCAB)
    assert found(folder) == set()


def test_a_multiplier_where_a_divisor_belongs(folder: Path) -> None:
    """compressed-tensors stores 2688 / amax."""
    for file in folder.glob("model*"):
        file.unlink()
    random_checkpoint(folder, "compressed-tensors", vocab_size=VOCAB)
    key = f"{EXPERT}.weight_global_scale"
    change_tensors(folder, lambda tensors: tensors.update({key: 1 / tensors[key]}))
    assert found(folder) == {("reciprocal-scale", key)}


def test_codes_in_a_broken_shard_are_not_read(folder: Path) -> None:
    """A zero scale whose codes lie in a truncated shard: the zero is reported, and nothing crashes."""
    change_tensors(folder, set_bytes(f"{EXPERT}.weight_scale", (5, 1), 0))
    index = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    scales, codes = folder / index[f"{EXPERT}.weight_scale"], folder / "codes.safetensors"
    name = f"{EXPERT}.weight"
    tensors = load_file(folder / index[name])
    save_file({name: tensors.pop(name)}, codes)
    save_file(tensors, folder / index[name])
    codes.write_bytes(codes.read_bytes()[:-9])
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index | {name: codes.name}}))
    assert scales != codes
    assert found(folder) == {("truncated-shard", codes.name), ("vanished-blocks", f"{EXPERT}.weight_scale")}


def test_transformers_names_are_read_where_they_lie(folder: Path) -> None:
    key = "layers.0.ffn.gate.tid2eid"

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.gate.tid2eid"] = tensors.pop(key)
        tensors["model.layers.0.mlp.gate.tid2eid"][7, 2] = 8

    change_tensors(folder, change)
    (problem,) = inspect_folder(folder).problems
    assert (problem.id, problem.where) == ("expert-ids", key)
    assert "(8) at [7, 2]" in problem.message
