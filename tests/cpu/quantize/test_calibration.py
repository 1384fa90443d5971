"""Input scales from a text: what enters each expert, worked out again in float64 from the values on disk."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from cpu.quantize.sources import read_tensors, store_mxfp4, write_source

from ownpath.calibration import calibrate, input_scales
from ownpath.chat.tokenizer import Tokenizer
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.formats import MXFP4
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor
from ownpath.quantize.steps import QuantizeScope
from ownpath.trace.observers import CallArguments, Observer, Watched

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
LIMIT = 10.0
RELATIVE = 64 * 2.0**-23
"""Sums over 64 columns in float32, in another order."""


def expected_amax(source: Path, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest magnitudes that enter w1 and w2 of each expert, from the recorded inputs of the experts."""
    model = load_model(source, EngineConfig(max_model_len=512))
    amax: dict[str, float] = defaultdict(float)

    class ExpertInputs(Observer):
        def before(self, call: Watched, args: CallArguments) -> None:
            slot = call.slot
            if not slot.endswith(".ffn.experts"):
                return
            for x, ids in zip(args[0].double(), args[1].tolist(), strict=True):
                for expert in ids:
                    gate, up = (values[f"{slot}.{expert}.{w}.weight"].double() @ x for w in ("w1", "w3"))
                    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                    hidden = gate / (1 + torch.exp(-gate)) * up
                    for name, entering in (("w1", x), ("w2", hidden)):
                        key = f"{slot}.{expert}.{name}"
                        amax[key] = max(amax[key], float(entering.abs().max()))

    ids = Tokenizer.from_folder(source).encode_text(TEXT)
    with model.ledger.observe(ExpertInputs()):
        model.forward(ForwardBatch.of([(ids, model.new_cache())], "cpu"))
    return amax


def test_scales_are_the_largest_inputs_over_2688(tmp_path: Path) -> None:
    tensors = write_source(tmp_path, store_mxfp4)
    values = {
        key: dequantize(QuantTensor(codes.view(torch.uint8), tensors[key.replace(".weight", ".scale")], None, MXFP4))
        for key, codes in tensors.items()
        if ".ffn.experts." in key and key.endswith(".weight")
    }
    found = calibrate(tmp_path / "source", TEXT, QuantizeScope.EXPERTS, "cpu")
    expected = expected_amax(tmp_path / "source", values)
    assert len(expected) > 40
    for module, amax in expected.items():
        assert found[module] == pytest.approx(amax / 2688, rel=RELATIVE)
        if module.endswith(".w1"):
            assert found[f"{module[:-2]}w3"] == found[module]
    assert len(found) == 5 * 8 * 3
    assert all(0 < scale < 1 for scale in found.values())


def test_who_was_never_reached_gets_the_largest_of_its_like() -> None:
    like, other = "layers.0.ffn.experts", "layers.1.ffn.experts"
    amax = {f"{like}.0.w1": 2.0, f"{like}.2.w1": 3.0, f"{like}.0.w2": 5.0}
    modules = [f"{like}.{expert}.{w}" for expert in range(3) for w in ("w1", "w2")] + [f"{other}.0.w2", "head"]
    found = {module: scale * 2688 for module, scale in input_scales(modules, amax).items()}
    assert found[f"{like}.1.w1"] == pytest.approx(3.0)
    assert found[f"{like}.1.w2"] == pytest.approx(5.0)
    assert found[f"{other}.0.w2"] == pytest.approx(5.0), "no expert of that layer was reached"
    assert found["head"] == pytest.approx(2688.0), "nothing is known: 1.0"


def test_the_command_writes_them(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    source, target = str(tmp_path / "source"), str(tmp_path / "out")
    assert main(["quantize", source, target, "--scope", "full", "--calibrate", str(tmp_path / "text")]) == 0
    written = read_tensors(tmp_path / "out")
    scales = [float(written[key]) for key in written if key.endswith(".input_scale")]
    assert len(scales) == 5 * (8 * 3 + 3 + 4)
    assert all(0 < scale < 1 for scale in scales)
    gate, up = (float(written[f"layers.1.ffn.shared_experts.{w}.input_scale"]) for w in ("w1", "w3"))
    assert gate == up


def test_a_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, store_mxfp4)
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    source, target = str(tmp_path / "source"), tmp_path / "out"
    assert main(["quantize", source, str(target), "--calibrate", str(tmp_path / "noise")]) == 2
    assert f"{tmp_path / 'noise'}: not UTF-8 text" in capsys.readouterr().err
    assert not target.exists()


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path, store_mxfp4)
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(tmp_path / "source", "", QuantizeScope.EXPERTS, "cpu")
