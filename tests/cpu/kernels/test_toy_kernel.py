"""A kernel is one folder: a toy that nothing else knows of is planned, run, counted, verified and measured."""

import json
from typing import Any

import pytest
from support.fresh_interpreter import Told, run_steps

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


FACTOR = 1.0  # what a wrong kernel is off by


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

    def rounds_to_powers(self, operand, num_rows):
        return False

    def run_wide(self, x, operand):
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)


TOY_LINEAR = ToyLinear()
"""
WITH_TOY = """
import ownpath.kernels
ownpath.kernels.__path__.append({folder!r})
"""
RECORDED = """
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
used = {(it.use.runner, it.use.kernel, it.use.layout, it.variant) for it in records if it.slot == slot}
print(json.dumps([model.ledger.calls[slot], sorted(used)]))
"""
SMALL_COPIES = "from ownpath.bench import rotation\nrotation.COLD_BYTES = 1_000_000"
BREAK = "from ownpath.kernels.toy import ref\nref.FACTOR = 1.001"
VERIFY = ("verify", "--layers", "0", "--experts", "1", "--json", "-", "--stages")
BENCH = ("bench", "linear", "--device", "cpu", "--shape", "tiny", "--tokens", "1", "--seconds", "0", "--contenders")
STEPS: dict[str, str | tuple[str, ...]] = {
    "plan": ("plan", "--json"),
    "list": ("plan", "--list"),
    "records": RECORDED,
    "verify": (*VERIFY, "environment,load,kernels,ledger"),
    "small copies": SMALL_COPIES,
    "bench": (*BENCH, f"{NAME},ownpath"),
    "break": BREAK,
    "verify the broken": (*VERIFY, "kernels"),
}
SLOTS = {"attn.wqa_wkv", "attn.wq_b", "attn.wo_b", "ffn.shared_experts.w13", "ffn.shared_experts.w2"}
"""The NVFP4 linears of a layer of the embedded model."""


def findings_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of all stages."""
    return [finding for stage in report["stages"] for finding in stage["findings"]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """The words of an interpreter in which the folder is one of ``ownpath.kernels``."""
    folder = tmp_path_factory.mktemp("kernels")
    toy = folder / "toy"
    toy.mkdir()
    for name, text in (("__init__", ""), ("spec", SPEC), ("ref", REF)):
        (toy / f"{name}.py").write_text(text, encoding="utf-8")
    return dict(zip(STEPS, run_steps(WITH_TOY.format(folder=str(folder)), list(STEPS.values())), strict=True))


def test_the_plan_chooses_it(told: dict[str, Told]) -> None:
    assert (told["plan"].code, told["list"].code) == (0, 0)
    plan = json.loads(told["plan"].out)
    ops = [op for op in plan["ops"] if op["kernel"] == NAME]
    assert {op["slot"].split(".", 2)[2] for op in ops} == SLOTS
    assert {(op["runner"], op["layout"], op["why"]) for op in ops} == {
        ("ToyLinear", "toy_decoded", "a toy: decoded once, float64 sums")
    }
    assert all(op["kernel"] == NAME for op in plan["ops"] if op["kind"] == "linear" and op["format"] == "NVFP4")
    assert f"linear: {NAME}\n  runner ToyLinear; layout toy_decoded; formats NVFP4\n" in told["list"].out


def test_its_runner_runs_and_the_records_name_it(told: dict[str, Told]) -> None:
    assert json.loads(told["records"].out) == [1, [["ToyLinear", NAME, "toy_decoded", "toy_variant"]]]


def test_verify_judges_it(told: dict[str, Told]) -> None:
    assert told["verify"].code == 0
    report = json.loads(told["verify"].out)
    judged = {finding["id"] for finding in findings_of(report) if NAME in finding["kernel"]}
    assert judged == {"E02", "K01", "K02", "K04", "K06", "K10"}
    assert report["kernels"][NAME] == 20
    assert told["verify the broken"].code == 1
    report = json.loads(told["verify the broken"].out)
    failed = [finding for finding in findings_of(report) if finding["verdict"] == "fail"]
    assert {finding["kernel"].split()[0] for finding in failed} == {NAME}
    found = {finding["where"] for finding in failed if finding["id"] == "K01"}
    assert found == {f"layers.0.{slot}" for slot in SLOTS}


def test_bench_measures_it(told: dict[str, Told]) -> None:
    assert told["bench"].code == 0
    assert NAME in told["bench"].out.splitlines()[2]
    assert "WRONG" not in told["bench"].out
