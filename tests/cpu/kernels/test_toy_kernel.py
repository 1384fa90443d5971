"""A kernel is one folder: a toy that nothing else knows of is planned, run, counted, verified and measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NAME = "torch.toy_linear"
SPEC = """
from ownpath.formats import NVFP4
from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "torch.toy_linear",
        OpKind.LINEAR,
        (NVFP4,),
        "ToyLinear",
        "toy_decoded",
        "a toy: decoded once, float64 sums",
        "toy.ref:TOY_LINEAR",
        evidence=Evidence("toy.ref:toy_linear", "tests/cpu/kernels/test_toy_kernel.py", "ownpath bench linear"),
    ),
)
"""
REF = """
import torch

from ownpath.formats import NVFP4
from ownpath.kernels.reference import Reference
from ownpath.kernels.shards import fuse_nvfp4
from ownpath.numerics import decode_nvfp4_blocks
from ownpath.qtensor import QuantTensor


def toy_linear(x, weight):
    return FACTOR * x.double() @ weight.T


class ToyLinear(Reference):
    def prepare(self, stored):
        codes, scale, rows = fuse_nvfp4(stored)
        return QuantTensor(codes, scale, rows, NVFP4), decode_nvfp4_blocks(codes, scale, torch.float64) * rows[:, None]

    def restore(self, operand):
        return operand[:1]

    def variant(self, x, operand):
        return "toy_variant"

    def workspace(self, operand, num_tokens):
        return None

    def run(self, x, operand, *, out=None, workspace=None):
        if x.shape[-1] != operand[1].shape[1] or not x.is_floating_point() or x.device != operand[1].device:
            raise ValueError("x does not fit the weight")
        y = toy_linear(x, operand[1]).to(x.dtype)
        return y if out is None else out.copy_(y)

    def run_wide(self, x, operand):
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)


TOY_LINEAR = ToyLinear()
"""
WITH_TOY = """
import sys
import ownpath.kernels
ownpath.kernels.__path__.append(sys.argv.pop(1))
"""
COMMAND = "from ownpath.cli import main\nsys.exit(main(sys.argv[1:]))"
MAIN = f"{WITH_TOY}\n{COMMAND}"
BENCH = f"{WITH_TOY}\nfrom ownpath.bench import rotation\nrotation.COLD_BYTES = 1_000_000\n{COMMAND}"
RUN = f"""{WITH_TOY}
import json
from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.trace import Records

model = load_model(default_model_dir(), EngineConfig(max_model_len=64))
with model.ledger.observe(Records()) as records:
    logits = model.forward(ForwardBatch.of([([5, 6, 7], model.new_cache())], "cpu"))
assert bool(logits.isfinite().all())
slot = "layers.0.attn.wq_b"
used = {{(it.use.runner, it.use.kernel, it.use.layout, it.variant) for it in records if it.slot == slot}}
print(json.dumps([model.ledger.calls[slot], sorted(used)]))
"""
SLOTS = {"attn.wqa_wkv", "attn.wq_b", "attn.wo_b", "ffn.shared_experts.w13", "ffn.shared_experts.w2"}
"""The NVFP4 linears of a layer of the embedded model."""


def write_toy(folder: Path, factor: float = 1.0) -> Path:
    """The one folder. factor: what a wrong kernel is off by."""
    toy = folder / "toy"
    toy.mkdir()
    for name, text in (("__init__", ""), ("spec", SPEC), ("ref", f"FACTOR = {factor}\n{REF}")):
        (toy / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def findings_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of all stages."""
    return [finding for stage in report["stages"] for finding in stage["findings"]]


def output_of(code: str, folder: Path, *arguments: str, fails: bool = False) -> str:
    """Returns the output of a fresh interpreter in which the folder is one of ``ownpath.kernels``."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == fails, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("kernels"))


def test_the_plan_chooses_it(toy: Path) -> None:
    plan = json.loads(output_of(MAIN, toy, "plan", "--json"))
    ops = [op for op in plan["ops"] if op["kernel"] == NAME]
    assert {op["slot"].split(".", 2)[2] for op in ops} == SLOTS
    assert {(op["runner"], op["layout"], op["why"]) for op in ops} == {
        ("ToyLinear", "toy_decoded", "a toy: decoded once, float64 sums")
    }
    assert all(op["kernel"] == NAME for op in plan["ops"] if op["kind"] == "linear" and op["format"] == "NVFP4")
    listed = output_of(MAIN, toy, "plan", "--list")
    assert f"linear: {NAME}\n  runner ToyLinear; layout toy_decoded; formats NVFP4\n" in listed


def test_its_runner_runs_and_the_records_name_it(toy: Path) -> None:
    used = ["ToyLinear", NAME, "toy_decoded", "toy_variant"]
    assert json.loads(output_of(RUN, toy)) == [1, [used]]


def test_verify_judges_it(toy: Path, tmp_path: Path) -> None:
    arguments = ("verify", "--layers", "0", "--experts", "1", "--json", "-", "--stages")
    report = json.loads(output_of(MAIN, toy, *arguments, "environment,load,kernels,ledger"))
    judged = {finding["id"] for finding in findings_of(report) if NAME in finding["kernel"]}
    assert judged == {"E02", "K01", "K02", "K04", "K06", "K10"}
    assert report["kernels"][NAME] == 20
    wrong = write_toy(tmp_path, factor=1.001)
    report = json.loads(output_of(MAIN, wrong, *arguments, "kernels", fails=True))
    failed = [finding for finding in findings_of(report) if finding["verdict"] == "fail"]
    assert {finding["kernel"].split()[0] for finding in failed} == {NAME}
    found = {finding["where"] for finding in failed if finding["id"] == "K01"}
    assert found == {f"layers.0.{slot}" for slot in SLOTS}


def test_bench_measures_it(toy: Path) -> None:
    arguments = ("bench", "linear", "--device", "cpu", "--shape", "tiny", "--tokens", "1", "--seconds", "0")
    out = output_of(BENCH, toy, *arguments, "--contenders", f"{NAME},ownpath")
    assert NAME in out.splitlines()[2]
    assert "WRONG" not in out
