"""``ownpath verify --engine vllm`` on stock vLLM, right and made wrong on purpose."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT_S, environment, write_plain

pytestmark = pytest.mark.vllm
ROWS = "1,2,5"
STEPS = {f"{kind} of {rows}" for kind in ("prefill", "decode", "mixed") for rows in ("1 row", "2 rows", "5 rows")}
STEPS -= {"mixed of 1 row"}
NUM_LAYERS, CSA = 4, (1, 3)
OPTIONS = ("--kv-cache-dtype", "fp8", "--max-num-seqs", "8")


@dataclass(frozen=True)
class Report:
    """code: of the process. failing: place -> finding. measured: (layer, value, step) -> measurement."""

    code: int
    whole: dict[str, Any]
    page: str
    text: str

    @property
    def failing(self) -> dict[str, dict[str, Any]]:
        found = (finding for stage in self.whole["stages"] for finding in stage["findings"])
        return {finding["where"]: finding for finding in found if finding["verdict"] == "fail"}


def verify(folder: Path, out: Path, *options: str, **changes: str) -> Report:
    command = [sys.executable, "-m", "ownpath", "verify", str(folder), "--engine", "vllm", "--rows", ROWS]
    paths = out / "report.json", out / "report.html"
    command += ["--json", str(paths[0]), "--html", str(paths[1]), *OPTIONS, *options]
    ended = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=WAIT_S)
    told = ended.stdout + ended.stderr
    assert paths[0].exists(), told[-3000:]
    return Report(ended.returncode, json.loads(paths[0].read_text()), paths[1].read_text(), told)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def stock(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return verify(plain, tmp_path_factory.mktemp("stock"), OWNPATH_VLLM="none")


def test_every_value_of_every_step_is_compared(stock: Report) -> None:
    steps = {measured["run"] for measured in stock.whole["measurements"]}
    assert steps == {f"{step}, eager" for step in STEPS}
    for layer in range(NUM_LAYERS):
        of_layer = {m["slot"] for m in stock.whole["measurements"] if m["layer_idx"] == layer}
        assert {"hc_attn.h", "attn.core", "hc_ffn.x", "hc_ffn.h", "ffn.experts", "out"} <= of_layer
        assert ("attn.indexer.weights_proj" in of_layer) == (layer in CSA)
    assert {"embed", "hc_head", "head"} <= {m["slot"] for m in stock.whole["measurements"]}
    assert all(m["kernel"] for m in stock.whole["measurements"])


def test_stock_experts_in_bf16_lack_the_clamp(stock: Report) -> None:
    """A fault of vLLM 0.32's CPU build: it does not pass swiglu_limit on. All other modules are right."""
    assert stock.code == 1
    assert {where.partition(".")[2].partition(".")[2] for where in stock.failing} == {"ffn.experts"}
    assert all("UnquantizedFusedMoEMethod" in finding["kernel"] for finding in stock.failing.values())
    others = [m for m in stock.whole["measurements"] if m["slot"] != "ffn.experts"]
    assert max(m["excess"] for m in others) < 1


def test_the_page_shows_the_same(stock: Report) -> None:
    assert "in vLLM 0.32.0" in stock.page
    assert "layers.0.ffn.experts" in stock.page
    assert "in vLLM 0.32.0" in stock.text
    assert stock.whole["engine"] == "vLLM 0.32.0"


def test_each_fault_is_named_with_its_steps(plain: Path, tmp_path: Path) -> None:
    """A hyper-connection that is wrong for fewer than 3 rows, a scaled projection, and a NaN."""
    found = verify(plain, tmp_path, OWNPATH_VLLM="none", OWNPATH_TEST_FAULTS="hyper,weight,nan").failing
    hyper = {f"layers.{layer}.{value}" for layer in range(NUM_LAYERS) for value in ("hc_ffn.x", "out")}
    faults = hyper | {"layers.2.attn.wq_b", "layers.3.ffn.shared_experts.w2"}
    others = {where for where in found if not where.endswith("ffn.experts")}
    assert faults - {"layers.3.out"} <= others <= faults
    few = "off in prefill of 1 and 2 rows, decode of 1 and 2 rows, mixed of 2 rows (eager)"
    assert all(found[f"layers.{layer}.hc_ffn.x"]["message"].startswith(few) for layer in range(NUM_LAYERS))
    assert "right in no step; worst: relative error 1.0e-01" in found["layers.2.attn.wq_b"]["message"]
    assert "% not finite" in found["layers.3.ffn.shared_experts.w2"]["message"]


def test_an_option_that_vllm_lacks_is_its_error(plain: Path, tmp_path: Path) -> None:
    found = verify(plain, tmp_path, "--no-such-option=1")
    assert found.code == 1
    (finding,) = found.failing.values()
    assert "no-such-option" in finding["message"]
