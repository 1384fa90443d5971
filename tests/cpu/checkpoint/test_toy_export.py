"""An export is one entry of the schema: what nothing else knows of is recognised, planned, loaded and verified."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.checkpoints import random_checkpoint

from ownpath.checkpoint.writer import write_checkpoint

SUFFIXES = {
    "weight": "codes",
    "weight_scale": "block_scales",
    "weight_scale_2": "tensor_scale",
    "input_scale": "input_factor",
}
WITH_TOY = """
import sys
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
MAIN = f"{WITH_TOY}\nfrom ownpath.cli import main\nsys.exit(main(sys.argv[1:]))"
RUN = f"""{WITH_TOY}
from pathlib import Path
import torch
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch

found = []
for folder in sys.argv[1:]:
    model = load_model(Path(folder), EngineConfig(max_model_len=64))
    found.append(model.forward(ForwardBatch.of([([5, 6, 7], model.new_cache())], "cpu")))
assert torch.equal(*found)
"""


def output_of(code: str, *arguments: str, fails: bool = False) -> str:
    """Returns the output of a fresh interpreter that knows the toy."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout


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


def test_it_is_planned_and_listed(folders: tuple[Path, Path]) -> None:
    plan = json.loads(output_of(MAIN, "plan", str(folders[1]), "--json"))
    assert not plan["contradictions"]
    stored = {(op["encoding"], op["format"], op["kernel"]) for op in plan["ops"]}
    assert {("toy-nvfp4", "NVFP4", "ref.nvfp4_linear"), ("toy-nvfp4", "NVFP4", "ref.nvfp4_moe")} < stored
    assert "modelopt-nvfp4" not in {encoding for encoding, _, _ in stored}
    assert "toy-nvfp4 (NVFP4)" in output_of(MAIN, "inspect", "--list")
    (contradiction,) = json.loads(output_of(MAIN, "plan", str(folders[0]), "--json"))["contradictions"]
    assert "quant_method is 'toy', but no tensor is stored as toy-nvfp4" in contradiction


def test_it_runs_to_the_same_bits(folders: tuple[Path, Path]) -> None:
    output_of(RUN, *map(str, folders))


def test_verify_reads_it(folders: tuple[Path, Path]) -> None:
    stages = ("--layers", "1", "--stages", "file,load,kernels", "--keep-going", "--json", "-")
    report = json.loads(output_of(MAIN, "verify", str(folders[1]), *stages, fails=True))
    found = [finding for stage in report["stages"] for finding in stage["findings"]]
    assert {finding["id"] for finding in found if finding["verdict"] == "fail"} == {"F12"}, "there is no tokenizer"
    assert {"F03", "F04", "F05", "L01", "L02", "L03", "K01"} <= {it["id"] for it in found if it["verdict"] == "pass"}
