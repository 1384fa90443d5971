"""Corrupted checkpoints that the files alone give away: shards, tensors, config.json, the tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from ownpath.chat.markers import ASSISTANT
from ownpath.checkpoint.writer import INDEX_NAME
from support.broken import Tensors
from support.mutations.mutation import Mutation, assigned, in_config, json_changed, tensors_changed

EXPERT = "layers.1.ffn.experts.3"
GLOBAL = f"{EXPERT}.w2.weight_scale_2"
SCALE = f"{EXPERT}.w2.weight_scale"
INPUT = f"{EXPERT}.w2.input_scale"
TABLE = "layers.0.ffn.gate.tid2eid"
BIAS = "layers.2.ffn.gate.bias"
FIRST_SHARD, SECOND_SHARD = (f"model-0000{n}-of-0000{{}}.safetensors" for n in (1, 2))


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_another_shard(folder: Path) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"][GLOBAL] = sorted(set(index["weight_map"].values()) - {index["weight_map"][GLOBAL]})[0]
    path.write_text(json.dumps(index), encoding="utf-8")


def powers_of_two_copied(tensors: Tensors) -> None:
    """E8M0 scales of MXFP4 written as E4M3 by value, with a global scale of 1: most are too small for E4M3."""
    scale = tensors[SCALE].float() * tensors[GLOBAL]
    tensors[SCALE] = torch.exp2(scale.log2().floor() - 6).to(torch.float8_e4m3fn)
    tensors[GLOBAL] = torch.ones(())


def as_bf16(tensors: Tensors) -> None:
    rows, packed = tensors[f"{EXPERT}.w2.weight"].shape
    for name in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{EXPERT}.w2.{name}"]
    tensors[f"{EXPERT}.w2.weight"] = torch.ones(rows, 2 * packed, dtype=torch.bfloat16)


def a_nan(scale: torch.Tensor) -> torch.Tensor:
    scale.view(torch.uint8)[0, 1] = 0x7F
    return scale


def named_twice(table: torch.Tensor) -> torch.Tensor:
    table[7, 1] = table[7, 0]
    return table


def not_special(spec: dict[str, Any]) -> None:
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != ASSISTANT]


def generation(**fields: Any) -> Any:
    return json_changed("generation_config.json", lambda config: config.update(fields))


def without(field: str) -> Any:
    return json_changed("config.json", lambda config: config.pop(field))


MUTATIONS = {
    "truncated shard": Mutation("the last byte of a shard", "F01", "model-00001-of-{n}.safetensors", truncate),
    "lost shard": Mutation("a shard's file is not there", "F01", "model-00002-of-{n}.safetensors", lose_a_shard),
    "index names another shard": Mutation("one entry of the index", "F01", GLOBAL, index_another_shard),
    "index that is a list": Mutation(
        "the index", "F01", INDEX_NAME, lambda folder: (folder / INDEX_NAME).write_text("[]")
    ),
    "matrix missing": Mutation(
        "an expert's w3.weight", "F02", f"{EXPERT}.w3.weight", tensors_changed(lambda t: t.pop(f"{EXPERT}.w3.weight"))
    ),
    "input scale missing": Mutation(
        "an expert's input_scale", "F02", INPUT, tensors_changed(lambda t: t.pop(INPUT)), is_official=True
    ),
    "stray tensor": Mutation(
        "a tensor that no module has", "F02", "stray", tensors_changed(lambda t: t.update(stray=torch.zeros(1)))
    ),
    "norm one short": Mutation("norm.weight's length", "F03", "norm.weight", assigned("norm.weight", lambda w: w[:-1])),
    "one expert in BF16": Mutation("the format of one matrix", "F04", f"{EXPERT}.w2", tensors_changed(as_bf16)),
    "global scale inverted": Mutation("weight_scale_2 as a divisor", "F05", GLOBAL, assigned(GLOBAL, lambda g: 1 / g)),
    "global scale zero": Mutation("weight_scale_2", "F05", GLOBAL, assigned(GLOBAL, lambda g: g * 0)),
    "generation_config without meaning": Mutation(
        "generation_config.json: eos_token_id", "F12", "generation_config.json", generation(eos_token_id="stop")
    ),
    "MXFP4 scales copied by value": Mutation(
        "small E8M0 scales as E4M3, global scale 1", "F07", SCALE, tensors_changed(powers_of_two_copied)
    ),
    "NaN among block scales": Mutation("one byte of weight_scale", "F07", SCALE, assigned(SCALE, a_nan)),
    "expert's scales lost": Mutation("all of weight_scale zero", "F07", SCALE, assigned(SCALE, torch.zeros_like)),
    "input scale zero": Mutation("input_scale", "F09", INPUT, assigned(INPUT, torch.zeros_like), is_official=True),
    "input scale NaN": Mutation(
        "input_scale", "F09", INPUT, assigned(INPUT, lambda s: s * torch.nan), is_official=True
    ),
    "input scale by default": Mutation(
        "input_scale is 1", "F09", INPUT, assigned(INPUT, torch.ones_like), is_official=True
    ),
    "tid2eid out of range": Mutation("a table of expert ids", "F10", TABLE, assigned(TABLE, lambda t: t + 8)),
    "tid2eid names one twice": Mutation("a row of the table", "F10", TABLE, assigned(TABLE, named_twice)),
    "gate.bias dropped": Mutation("a router's bias is zero", "F10", BIAS, assigned(BIAS, torch.zeros_like)),
    "gate.bias NaN": Mutation("a router's bias", "F10", BIAS, assigned(BIAS, lambda b: b / 0)),
    "another scoring function": Mutation(
        "config.json: scoring_func", "F11", "config.json", in_config(scoring_func="softmax")
    ),
    "hash layers miscounted": Mutation(
        "config.json: num_hash_layers", "F11", "num_hash_layers", in_config(num_hash_layers=2)
    ),
    "compress_ratios exchanged": Mutation(
        "config.json: compress_ratios", "F11", "compress_ratios[1]", in_config(compress_ratios=[0, 128, 4])
    ),
    "compress_ratios cut off": Mutation(
        "config.json: one entry too few", "F11", "config.json", in_config(compress_ratios=[0, 4])
    ),
    "swiglu_limit lost": Mutation("config.json", "F11", "config.json", without("swiglu_limit")),
    "routed_scaling_factor lost": Mutation("config.json", "F11", "config.json", without("routed_scaling_factor")),
    "YaRN without its factor": Mutation(
        "config.json: rope_scaling",
        "F11",
        "config.json",
        json_changed("config.json", lambda c: c["rope_scaling"].pop("factor")),
    ),
    "end token of another model": Mutation(
        "config.json: eos_token_id", "F12", "eos_token_id", in_config(eos_token_id=2)
    ),
    "marker not special": Mutation(
        "tokenizer.json: added_tokens", "F12", ASSISTANT, json_changed("tokenizer.json", not_special)
    ),
    "tokenizer lowers letters": Mutation(
        "tokenizer.json: normalizer",
        "F12",
        "tokenizer.json",
        json_changed("tokenizer.json", lambda spec: spec.update(normalizer={"type": "Lowercase"})),
    ),
}
