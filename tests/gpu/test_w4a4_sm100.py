"""The W4A4 kernels on a Blackwell device, for whoever has one first. Until then every run skips them, and says so."""

import pytest
import torch

from ownpath.kernels.nvfp4_sm100.layout import linear_operand, unboxed
from ownpath.kernels.nvfp4_sm100.prove import prove_linear, prove_moe
from ownpath.kernels.nvfp4_sm100.ref import nvfp4_linear_w4a4
from ownpath.kernels.registry import KERNELS
from ownpath.numerics import nvfp4_global_scale, quantize_nvfp4, quantize_nvfp4_activation

pytestmark = [pytest.mark.gpu, pytest.mark.sm100]
NAMES = ("triton.nvfp4_linear_w4a4_sm100", "triton.nvfp4_moe_w4a4_sm100")


@pytest.fixture(scope="module", autouse=True)
def blackwell(cuda: torch.device) -> torch.device:
    capability = torch.cuda.get_device_capability(cuda)
    if capability not in ((10, 0), (10, 3)):
        pytest.skip(f"needs compute capability 10.0 or 10.3, this is {capability}")
    return cuda


@pytest.mark.parametrize("suffix", ["", "_invariant"])
def test_the_proof_holds(suffix: str, blackwell: torch.device) -> None:
    prove_linear(KERNELS[NAMES[0] + suffix], blackwell)
    prove_moe(KERNELS[NAMES[1] + suffix], blackwell)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 2048])
def test_quantiser_and_linear_at_v4_width(num_rows: int, blackwell: torch.device) -> None:
    """wqa_wkv of V4-Flash: bytes equal to the definition; the product within BF16's epsilon in relative L2."""
    from ownpath.kernels.nvfp4_sm100.launch import quantize_activation

    generator = torch.Generator(blackwell).manual_seed(num_rows)
    x = torch.randn(num_rows, 4096, generator=generator, device=blackwell).bfloat16()
    w = quantize_nvfp4(torch.randn(1536, 4096, generator=generator, device=blackwell))
    assert w.scale is not None
    assert w.global_scale is not None
    input_scale = nvfp4_global_scale(x)
    codes, scale = quantize_activation(x, input_scale)
    expected = quantize_nvfp4_activation(x, input_scale)
    assert expected.scale is not None
    assert torch.equal(codes, expected.qdata)
    assert torch.equal(unboxed(scale, num_rows, 256).view(torch.uint8), expected.scale.view(torch.uint8))
    rows = w.global_scale.expand(1536)
    y = KERNELS[NAMES[0]].run(x, linear_operand(w.qdata, w.scale, rows, input_scale))
    exact = nvfp4_linear_w4a4(x.double(), input_scale, w.qdata, w.scale, rows)
    assert float((y.double() - exact).norm() / exact.norm()) <= 2.0**-8
