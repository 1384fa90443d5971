"""Random checkpoints to quantise: experts in MXFP4 as DeepSeek releases them, or in BF16; the rest FP8 and BF16."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from cpu.chat.small_tokenizer import tokenizer_spec
from safetensors.torch import load_file
from support.checkpoints import Tensors, random_checkpoint

from ownpath.checkpoint.writer import write_checkpoint
from ownpath.numerics import quantize_mxfp4

STORED_PARTS = (".weight_scale", ".weight_scale_2", ".input_scale")
Store = Callable[[str, torch.Tensor], Tensors]


def store_mxfp4(name: str, value: torch.Tensor) -> Tensors:
    """As DeepSeek stores it: packed codes as I8, scales as E8M0."""
    weight = quantize_mxfp4(value)
    assert weight.scale is not None
    return {f"{name}.weight": weight.qdata.view(torch.int8), f"{name}.scale": weight.scale}


def store_bf16(name: str, value: torch.Tensor) -> Tensors:
    return {f"{name}.weight": value.to(torch.bfloat16)}


def write_source(folder: Path, store: Store, seed: int = 0) -> Tensors:
    """Writes a checkpoint with its experts stored so; returns all of its tensors."""
    made = random_checkpoint(
        folder / "made", "modelopt-experts-only", seed=seed, moe_intermediate_size=64, vocab_size=512
    )
    tensors = read_tensors(made.folder)
    experts = {name for name in made.decoded if ".ffn.experts." in name}
    for name in experts:
        for suffix in (".weight", *STORED_PARTS):
            del tensors[name + suffix]
        tensors |= store(name, made.decoded[name])
    target = folder / "source"
    target.mkdir()
    (target / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    (target / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    write_checkpoint(target, tensors.items(), max_shard_bytes=300_000)
    return tensors


def read_tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found
