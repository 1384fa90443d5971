"""A result describes itself: the tensors that it holds, and no contradiction that `ownpath inspect` would find."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from cpu.quantize.sources import store_mxfp4, write_source
from support.broken import Tensors, change_tensors
from support.mutations.runs import write_model

from ownpath.checkpoint.schema import MODELOPT_NVFP4
from ownpath.inspect.inspection import inspect_folder
from ownpath.numerics import quantize_nvfp4
from ownpath.quantize.run import Options, quantize_checkpoint
from ownpath.quantize.steps import QuantizeScope
from ownpath.verify.run import VerifyJob, verify

SHARD_BYTES = 200_000


@pytest.mark.parametrize("scope", list(QuantizeScope))
def test_what_was_nvfp4_before_is_listed_and_not_excluded(scope: QuantizeScope, tmp_path: Path) -> None:
    """A source with some of its attention in NVFP4: the result contradicts neither of its config files."""
    write_source(tmp_path, store_mxfp4)
    names = ["layers.1.attn.compressor.wkv", "layers.3.attn.compressor.wkv", "layers.3.attn.indexer.wq_b"]

    def change(tensors: Tensors) -> None:
        for name in names:
            made = quantize_nvfp4(torch.randn(*weight_shape(tensors, name)) * 0.1)
            for key in [key for key in tensors if key.rpartition(".")[0] == name]:
                del tensors[key]
            tensors.update(MODELOPT_NVFP4.encode(name, made, torch.tensor(0.01)))

    change_tensors(tmp_path / "source", change)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Options(scope, SHARD_BYTES))
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert set(names) <= set(described["quantized_layers"])
    excluded = [name for name in names if any(fnmatchcase(name, entry) for entry in described["exclude_modules"])]
    assert excluded == []
    assert any(fnmatchcase("layers.2.attn.compressor.wkv", entry) for entry in described["exclude_modules"])
    found = inspect_folder(tmp_path / "out").problems
    assert {problem.id for problem in found} <= {"tokenizer"}, "the small source has no tokenizer"


def weight_shape(tensors: Tensors, name: str) -> tuple[int, int]:
    rows, columns = tensors[f"{name}.weight"].shape
    return rows, columns


@pytest.mark.parametrize("layout", ["bf16", "deepseek-native", "fp8-experts"])
def test_a_result_of_each_source_passes_inspect_and_verify(layout: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", layout, moe_intermediate_size=64)
    quantize_checkpoint(source, tmp_path / "out", Options(QuantizeScope.EXPERTS, SHARD_BYTES))
    assert inspect_folder(tmp_path / "out").problems == ()
    assert verify(VerifyJob(tmp_path / "out"), ("file", "load")).passed
