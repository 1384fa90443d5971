"""An export is one entry of the schema: what nothing else knows of is recognised, planned, loaded and verified."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.checkpoints import random_checkpoint
from support.fresh_interpreter import Told, run_steps

from ownpath.checkpoint.writer import write_checkpoint

SUFFIXES = {
    "weight": "codes",
    "weight_scale": "block_scales",
    "weight_scale_2": "tensor_scale",
    "input_scale": "input_factor",
}
WITH_TOY = """
from ownpath.checkpoint import schema
from ownpath.checkpoint.schema import Encoding, PartSpec
from ownpath.formats import NVFP4

parts = (
    PartSpec("qdata", "codes", ("U8",), lambda n, k: (n, k // 2)),
    PartSpec("scale", "block_scales", ("F8_E4M3",), lambda n, k: (n, k // 16)),
    PartSpec("global_scale", "tensor_scale", ("F32",), lambda n, k: ()),
    PartSpec("input_scale", "input_factor", ("F32",), lambda n, k: ()),
)
schema.ENCODINGS = (*schema.ENCODINGS, Encoding("toy-nvfp4", NVFP4, parts, "toy"))
"""
SAME_BITS = """
from pathlib import Path
import torch
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch

found = []
for folder in {folders!r}:
    model = load_model(Path(folder), EngineConfig(max_model_len=64))
    found.append(model.forward(ForwardBatch.of([([5, 6, 7], model.new_cache())], "cpu")))
print(torch.equal(*found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same one in the toy's names."""
    folder, toy = (tmp_path_factory.mktemp(name) for name in ("modelopt", "toy"))
    random_checkpoint(folder, "full-nvfp4", quantization_config={"quant_method": "toy"})
    tensors = {key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()}
    shutil.copy(folder / "config.json", toy)
    renamed = {_toy_key(key, set(tensors)): value for key, value in tensors.items()}
    write_checkpoint(toy, renamed.items(), max_shard_bytes=200_000)
    return folder, toy


def _toy_key(key: str, keys: set[str]) -> str:
    module, _, suffix = key.rpartition(".")
    return f"{module}.{SUFFIXES[suffix]}" if f"{module}.weight_scale_2" in keys else key


@pytest.fixture(scope="module")
def told(folders: tuple[Path, Path]) -> dict[str, Told]:
    """The words of an interpreter that knows the toy."""
    other, toy = map(str, folders)
    stages = ("--layers", "1", "--stages", "file,load,kernels", "--keep-going", "--json", "-")
    steps = {
        "plan": ("plan", toy, "--json"),
        "list": ("inspect", "--list"),
        "plan of the other": ("plan", other, "--json"),
        "bits": SAME_BITS.format(folders=(other, toy)),
        "verify": ("verify", toy, *stages),
    }
    return dict(zip(steps, run_steps(WITH_TOY, list(steps.values())), strict=True))


def test_it_is_planned_and_listed(told: dict[str, Told]) -> None:
    plan = json.loads(told["plan"].out)
    assert not plan["contradictions"]
    stored = {(op["encoding"], op["format"], op["kernel"]) for op in plan["ops"]}
    assert {("toy-nvfp4", "NVFP4", "ref.nvfp4_linear"), ("toy-nvfp4", "NVFP4", "ref.nvfp4_moe")} < stored
    assert "modelopt-nvfp4" not in {encoding for encoding, _, _ in stored}
    assert "toy-nvfp4 (NVFP4)" in told["list"].out
    (contradiction,) = json.loads(told["plan of the other"].out)["contradictions"]
    assert "quant_method is 'toy', but no tensor is stored as toy-nvfp4" in contradiction
    assert [told[name].code for name in ("plan", "list", "plan of the other")] == [0, 0, 0]


def test_it_runs_to_the_same_bits(told: dict[str, Told]) -> None:
    assert told["bits"].out == "True\n"


def test_verify_reads_it(told: dict[str, Told]) -> None:
    assert told["verify"].code == 1
    report = json.loads(told["verify"].out)
    found = [finding for stage in report["stages"] for finding in stage["findings"]]
    assert {finding["id"] for finding in found if finding["verdict"] == "fail"} == {"F12"}, "there is no tokenizer"
    assert {"F03", "F04", "F05", "L01", "L02", "L03", "K01"} <= {it["id"] for it in found if it["verdict"] == "pass"}
