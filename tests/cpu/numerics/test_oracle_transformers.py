"""transformers decodes DeepSeek's native tensors (int8 FP4 with 1 x 32 E8M0, FP8 with 128 x 128); it has no tie rule.

Its ``quant_method: "nvfp4"`` quantises with a kernel fetched at run time, so there is nothing in it to compare.
"""

from typing import Any

import pytest
import torch

from ownpath.formats import FP8_BLOCK, MXFP4
from ownpath.numerics import dequantize
from ownpath.qtensor import QuantTensor


@pytest.fixture(scope="module")
def decoder(device: torch.device) -> Any:
    if device.type != "cpu":
        pytest.skip("compared on the CPU: the oracle's own CUDA paths are other kernels")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)


def test_transformers_decodes_native_int8_fp4_alike(decoder: Any) -> None:
    qdata = torch.arange(256, dtype=torch.uint8).repeat(4).view(64, 16).view(torch.int8)
    scale = torch.arange(100, 164, dtype=torch.uint8).view(64, 1).view(torch.float8_e8m0fnu)
    theirs = decoder._dequantize_one(qdata, scale, torch.float32)
    assert torch.equal(theirs, dequantize(QuantTensor(qdata, scale, None, MXFP4)))


def test_transformers_decodes_native_fp8_blocks_alike(decoder: Any) -> None:
    finite = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    qdata = finite.repeat(259)[: 256 * 256].view(256, 256).view(torch.float8_e4m3fn)
    e8m0 = torch.tensor([[120, 127], [100, 133]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for scale in (e8m0, torch.tensor([[0.3, 1.7], [1e-4, 3.0]])):
        theirs = decoder._dequantize_one(qdata, scale, torch.float32)
        assert torch.equal(theirs, dequantize(QuantTensor(qdata, scale, None, FP8_BLOCK)))
