"""The tool that times whole layers, on its smallest shape and on CPU: same values in, same numbers out."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import full_layer  # noqa: E402

from ownpath.bench.synthetic import Values, headers, layer_config  # noqa: E402
from ownpath.formats import NVFP4  # noqa: E402
from ownpath.plan.plan import make_plan  # noqa: E402
from ownpath.plan.select import Caps  # noqa: E402


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


def test_synthetic_weights_have_the_size_that_training_gives() -> None:
    """Standard deviations near 1/sqrt(in), different global scales for fused shards, every slot written."""
    config = layer_config("small", "csa", "hash")
    index = headers(config, "full")
    plan = make_plan(config, index, Caps("cpu", "CPU"))
    operands = list(Values.of_seed(torch.device("cpu"), 0).operands(plan, index))
    again = list(Values.of_seed(torch.device("cpu"), 0).operands(plan, index))
    for op, operand, same in zip(plan.ops, operands, again, strict=True):
        for name, buffers in operand.buffers.items():
            for buffer, other in zip(buffers, same.buffers[name], strict=True):
                assert not buffer.float().isnan().any(), op.label
                assert torch.equal(buffer.view(torch.uint8), other.view(torch.uint8))
        if op.encoding.format is NVFP4 and "weight_scale_2" in operand.buffers and len(op.spec.modules) > 1:
            assert len(operand.buffers["weight_scale_2"][0].unique()) == len(op.spec.modules)
    from ownpath.runners.make import make_runners

    runners = make_runners(plan, operands)
    x = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for slot in ("layers.0.attn.wqa_wkv", "layers.0.ffn.gate", "layers.0.ffn.shared_experts.w13"):
        assert 0.5 < runners[slot](x).std() < 2, slot
