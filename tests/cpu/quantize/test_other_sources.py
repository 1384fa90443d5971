"""``quantize`` takes every encoding that is read: the result depends on the weights and not on who stored them."""

from pathlib import Path

import pytest
import torch
from cpu.quantize.sources import Store, read_tensors, write_source
from support.checkpoints import Tensors, random_checkpoint
from support.tiny_exports import e8m0_bytes, mxfp8_of

from ownpath.cli import main
from ownpath.numerics import dequantize, nvfp4_global_scale, quantize_mxfp4, quantize_nvfp4
from ownpath.quantize.run import Options, quantize_checkpoint
from ownpath.quantize.steps import QuantizeScope

EXPERT = "layers.1.ffn.experts.3.w2"


def compressed_mxfp4(name: str, value: torch.Tensor) -> Tensors:
    """With a scale of the input beside it, which the result must not hold twice."""
    weight = quantize_mxfp4(value)
    stored = {f"{name}.weight_packed": weight.qdata, f"{name}.weight_scale": e8m0_bytes(weight)}
    return stored | {f"{name}.input_scale": torch.tensor(3e-3), f"{name}.input_global_scale": torch.ones(1)}


def native_mxfp4(name: str, value: torch.Tensor) -> Tensors:
    weight = quantize_mxfp4(value)
    assert weight.scale is not None
    return {f"{name}.weight": weight.qdata.view(torch.int8), f"{name}.scale": weight.scale}


def compressed_mxfp8(name: str, value: torch.Tensor) -> Tensors:
    weight = mxfp8_of(value)
    return {f"{name}.weight": weight.qdata, f"{name}.weight_scale": e8m0_bytes(weight)}


def half(name: str, value: torch.Tensor) -> Tensors:
    return {f"{name}.weight": value.half()}


def quantized(folder: Path, store: Store) -> Tensors:
    folder.mkdir()
    write_source(folder, store)
    quantize_checkpoint(folder / "source", folder / "out", Options(QuantizeScope.EXPERTS, 200_000))
    return read_tensors(folder / "out")


def test_mxfp4_of_another_exporter_becomes_the_same_bytes(tmp_path: Path) -> None:
    native, other = (quantized(tmp_path / store.__name__, store) for store in (native_mxfp4, compressed_mxfp4))
    assert native.keys() == other.keys()
    for key, tensor in native.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), other[key].flatten().view(torch.uint8)), key
    assert main(["plan", str(tmp_path / "compressed_mxfp4" / "out")]) == 0


@pytest.mark.parametrize("store", [compressed_mxfp8, half])
def test_other_formats_are_quantised_from_the_values_they_mean(store: Store, tmp_path: Path) -> None:
    made = random_checkpoint(tmp_path / "made", "modelopt-experts-only", moe_intermediate_size=64, vocab_size=512)
    written = quantized(tmp_path / "run", store)
    value = made.decoded[EXPERT]
    meant = dequantize(mxfp8_of(value)) if store is compressed_mxfp8 else value.half().float()
    expected = quantize_nvfp4(meant, nvfp4_global_scale(meant))
    assert expected.scale is not None
    assert torch.equal(written[f"{EXPERT}.weight"], expected.qdata)
    assert torch.equal(written[f"{EXPERT}.weight_scale"].view(torch.uint8), expected.scale.view(torch.uint8))
