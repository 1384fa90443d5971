"""compressed-tensors: ties to even. Its global scale is a DIVISOR, and its block scales round one product more.

``weight_global_scale = 2688 / amax``; ``scale = e4m3(weight_global_scale * (amax(block) / 6))``;
``code = e2m1(w / (scale / weight_global_scale))``.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bit_oracles import E2M1_TIES
from oracle_data import e4m3_midpoint_matrix, random_weights, scale_bytes, tie_matrix
from torch import Tensor

from ownpath.formats import NVFP4
from ownpath.numerics import dequantize, encode_e2m1, encode_e4m3, pack_e2m1, quantize_nvfp4
from ownpath.qtensor import QuantTensor


@pytest.fixture(scope="module")
def ct(device: torch.device) -> Any:
    if device.type != "cpu":
        pytest.skip("compared on the CPU: the oracle's own CUDA paths are other kernels")
    from compressed_tensors.compressors.nvfp4 import helpers
    from compressed_tensors.quantization import quant_scheme as schemes
    from compressed_tensors.quantization import utils
    from compressed_tensors.quantization.lifecycle import forward as lifecycle
    from compressed_tensors.quantization.utils import fp4_utils as fp4

    return SimpleNamespace(
        args=schemes.NVFP4["weights"],
        cast=fp4.cast_to_fp4,
        pack=helpers.quantize_and_pack_fp4,
        unpack=helpers.unpack_fp4_from_uint8,
        qparams=utils.calculate_qparams,
        gparam=utils.generate_gparam,
        dequantize=lifecycle.dequantize,
    )


def theirs(ct: Any, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, float32 block scales and the divisor, by the library's own functions."""
    blocks = w.view(w.shape[0], -1, 16)
    divisor = ct.gparam(w.min(), w.max())
    scale, _ = ct.qparams(blocks.amin(-1), blocks.amax(-1), ct.args, global_scale=divisor)
    return ct.pack(w, scale.float(), divisor), scale.float(), divisor


def test_trap_compressed_tensors_global_scale_is_a_divisor(ct: Any) -> None:
    w = random_weights()[0]
    packed, scale, divisor = theirs(ct, w)
    assert divisor.shape == (1,)
    amax = w.abs().max()
    assert divisor.item() == torch.tensor(2688.0).div(amax).item()
    right = QuantTensor(packed, scale.to(torch.float8_e4m3fn), 1 / divisor[0], NVFP4)
    wrong = QuantTensor(packed, scale.to(torch.float8_e4m3fn), divisor[0], NVFP4)
    # Half the step from 4 to 6 is one unit of the largest block, amax / 6.
    assert bool((dequantize(right) - w).abs().max() <= amax / 6)
    assert dequantize(wrong).abs().max() > 1e5 * amax


def test_compressed_tensors_rounds_ties_to_even(ct: Any) -> None:
    ties = torch.tensor(E2M1_TIES)
    up, down = (torch.nextafter(ties, torch.full_like(ties, to)) for to in (9.0, 0.0))
    x = torch.cat((ties, up, down, torch.tensor([6.0, 7.0])))
    x = torch.cat((x, -x)).view(1, -1)
    ours = encode_e2m1(x)
    assert torch.equal(
        ct.cast(x.clone()), torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2])[0][ours.long() & 7].copysign(x)
    )
    w, _ = tie_matrix()
    assert torch.equal(theirs(ct, w)[0], quantize_nvfp4(w).qdata)


def test_compressed_tensors_drops_the_sign_of_negative_zero_only(ct: Any) -> None:
    x = torch.tensor([[-0.0, 0.0, -0.1, 6.0] * 4])
    packed = ct.pack(x, torch.ones(1, 1), torch.ones(1))
    assert packed[0, :2].tolist() == [0x00, 0x78]
    assert pack_e2m1(encode_e2m1(x))[0, :2].tolist() == [0x08, 0x78]


def test_compressed_tensors_bytes_are_equal_where_both_orders_round_alike(ct: Any) -> None:
    """Every block scale of the random weights; every code but those of the named fact below."""
    for w in random_weights():
        packed, scale, _ = theirs(ct, w)
        ours = quantize_nvfp4(w)
        assert ours.scale is not None
        assert torch.equal(scale_bytes(scale.to(torch.float8_e4m3fn)), scale_bytes(ours.scale))
        assert (packed != ours.qdata).float().mean() < 0.01


def test_fact_compressed_tensors_bytes_are_its_own_order_of_the_same_steps(ct: Any) -> None:
    """The whole difference: with its divisor and its order, our rounding reproduces every byte."""
    for w in (*random_weights(), tie_matrix()[0], e4m3_midpoint_matrix()):
        packed, scale, divisor = theirs(ct, w)
        blocks = w.view(w.shape[0], -1, 16)
        amax = blocks.abs().amax(-1)
        expected = encode_e4m3(divisor * (amax / 6)).float()
        expected = torch.where(expected == 0, 0.125, expected)
        assert torch.equal(scale, expected)
        codes = encode_e2m1((blocks / (scale / divisor).unsqueeze(-1)).flatten(-2) + 0.0)  # + 0.0 turns -0 into 0
        assert torch.equal(packed, pack_e2m1(codes))


def test_fact_on_e4m3_midpoints_its_scale_is_at_most_one_byte_from_ours(ct: Any) -> None:
    """Two more roundings (2688 / amax, and amax(block) / 6) push a quotient off a midpoint, to either side."""
    w = e4m3_midpoint_matrix()
    ours = quantize_nvfp4(w)
    assert ours.scale is not None
    step = scale_bytes(theirs(ct, w)[1].to(torch.float8_e4m3fn)) - scale_bytes(ours.scale)
    assert int(step.abs().max()) == 1
    exact = w.abs().amax(-1).double() * 448 / w.abs().max().double()
    for scale in (ours.scale, theirs(ct, w)[1].to(torch.float8_e4m3fn)):
        # On a midpoint either neighbour is half a step away, so neither is further from the exact quotient.
        half_step = (ours.scale.double() - exact[:, None]).abs()
        assert torch.equal((scale.double() - exact[:, None]).abs(), half_step)


def test_fact_compressed_tensors_stores_zero_blocks_as_an_eighth(ct: Any) -> None:
    w = torch.zeros(2, 16)
    w[0, 0] = 6.0
    assert theirs(ct, w)[1].flatten().tolist() == [448.0, 0.125]
    ours = quantize_nvfp4(w)
    assert ours.scale is not None
    assert ours.scale.float().flatten().tolist() == [448.0, 1.0]


def test_compressed_tensors_decodes_our_bytes_to_our_values(ct: Any) -> None:
    """With a power-of-two global scale its divisor is exact, so the values must be equal, not close."""
    w, s2 = random_weights()[0], torch.tensor(2.0**-9)
    q = quantize_nvfp4(w, s2)
    assert q.scale is not None
    codes = ct.unpack(q.qdata, *w.shape, dtype=torch.float32)
    assert torch.equal(ct.dequantize(codes, q.scale.float(), args=ct.args, global_scale=1 / s2.view(1)), dequantize(q))
