"""compressed-tensors' MXFP4 and MXFP8: what the library writes decodes here to the values that it decodes itself.

The largest difference is 0 for both: every product of a code and a power of two is exact in bfloat16, in which the
library decodes, and in float32. A second decoder, of look-up tables made from the formats' definitions, agrees.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.index import SINGLE_NAME, CheckpointIndex
from ownpath.checkpoint.schema import COMPRESSED_MXFP4, COMPRESSED_MXFP8, Encoding, ModuleSpec
from ownpath.formats import MXFP4
from ownpath.numerics import dequantize, e8m0_from_bytes
from ownpath.oracle.weights import StoredWeights
from ownpath.qtensor import QuantTensor

SHAPE = (96, 256)
LARGEST = {"compressed-tensors-mxfp4": 6.0, "compressed-tensors-mxfp8": 448.0}


@pytest.fixture(scope="module")
def ct(device: torch.device) -> Any:
    if device.type != "cpu":
        pytest.skip("compared on the CPU: the library's own tensors are there")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme, quant_scheme

    def scheme(preset: Any) -> Any:
        return QuantizationScheme(targets=["Linear"], **preset)

    return SimpleNamespace(
        of={
            COMPRESSED_MXFP4.name: (MXFP4PackedCompressor, scheme(quant_scheme.MXFP4)),
            COMPRESSED_MXFP8.name: (MXFP8QuantizationCompressor, scheme(quant_scheme.MXFP8)),
        }
    )


def weights() -> torch.Tensor:
    """Blocks from 2^-60 to 2^60, one of them zero but for a sign."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(SHAPE[0], SHAPE[1] // 32, 32, generator=generator)
    powers = torch.randint(-60, 61, blocks.shape[:2], generator=generator)
    return torch.ldexp(blocks, powers[..., None]).flatten(1)


@pytest.mark.parametrize("encoding", [COMPRESSED_MXFP4, COMPRESSED_MXFP8], ids=lambda encoding: encoding.name)
def test_the_library_and_we_decode_the_same_values(encoding: Encoding, ct: Any, tmp_path: Path) -> None:
    compressor, scheme = ct.of[encoding.name]
    w = weights()
    scale = torch.exp2(torch.ceil(torch.log2(w.unflatten(1, (-1, 32)).abs().amax(-1) / LARGEST[encoding.name])))
    stored = compressor.compress({"weight": w.clone(), "weight_scale": scale}, scheme)
    assert stored["weight_scale"].dtype is torch.uint8
    theirs = compressor.decompress(dict(stored), scheme)["weight"].float()

    save_file({f"m.{name}": tensor.contiguous() for name, tensor in stored.items()}, tmp_path / SINGLE_NAME)
    index = CheckpointIndex.open(tmp_path)
    assert detect(index, ModuleSpec("m", SHAPE)) == encoding
    codes, bytes_ = stored[encoding.weight.suffix], e8m0_from_bytes(stored["weight_scale"])
    ours = dequantize(QuantTensor(codes, bytes_, None, encoding.format))
    assert float((ours - theirs).abs().max()) == 0.0
    tables = StoredWeights(index, torch.device("cpu")).matrix("m", encoding)
    assert float((tables - ours.double()).abs().max()) == 0.0
    step = 2.0 if encoding.format is MXFP4 else 32.0  # the widest step of the codes; half of it, times the scale
    assert bool(((ours - w).abs() <= step / 2 * scale.repeat_interleave(32, dim=1)).all())
