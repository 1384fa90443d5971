"""The tool that times whole layers, on its smallest shape and on CPU: same values in, same numbers out."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import full_layer  # noqa: E402


@pytest.mark.parametrize("layer", ["sliding", "csa", "hca"])
@pytest.mark.parametrize("export", ["nvidia", "full"])
def test_a_layer_equals_itself(
    layer: str, export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--shape", "small", "--layer", layer, "--export", export, "--context", "130", "--tokens", "2"]
    options += ["--device", "cpu", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["full_layer.py", *options])
    assert full_layer.main() == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["cosine_streams"] == pytest.approx(1.0, abs=1e-9)
    assert row["cosine_experts"] == pytest.approx(1.0, abs=1e-9)
    assert all(kernel.startswith("ref.") for kernel in row["kernels"])
    assert "cosine 1.0000000" in capsys.readouterr().out


def test_cosine_of_what_is_not_finite_is_no_pass() -> None:
    good = torch.ones(4)
    assert full_layer.cosine(good, good) == pytest.approx(1.0)
    assert not full_layer.cosine(torch.tensor([1.0, float("nan"), 0.0, 1.0]), good) >= full_layer.MIN_COSINE
    assert not full_layer.cosine(torch.zeros(4), good) >= full_layer.MIN_COSINE
