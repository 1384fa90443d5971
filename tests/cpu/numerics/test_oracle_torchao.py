"""torchao: ties to even and the sign of zero kept, as here. It multiplies by a reciprocal and stops scales at 2^-6."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bit_oracles import E2M1_TIES
from oracle_data import e4m3_midpoint_matrix, random_weights, scale_bytes, tie_matrix

from ownpath.numerics import (
    decode_e2m1,
    encode_e2m1,
    nvfp4_global_scale,
    pack_e2m1,
    quantize_nvfp4,
    quantize_nvfp4_activation,
)


@pytest.fixture(scope="module")
def ao(device: torch.device) -> Any:
    if device.type != "cpu":
        pytest.skip("compared on the CPU: the oracle's own CUDA paths are other kernels")
    from torchao.prototype.mx_formats import kernels
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4

    return SimpleNamespace(
        encode=kernels.f32_to_f4_unpacked,
        decode=kernels.f4_unpacked_to_f32,
        quantize=nvfp4.nvfp4_quantize,
        global_scale=nvfp4.per_tensor_amax_to_scale,
    )


def test_torchao_rounds_ties_to_even_and_keeps_the_sign_of_zero(ao: Any) -> None:
    ties = torch.tensor(E2M1_TIES)
    up, down = (torch.nextafter(ties, torch.full_like(ties, to)) for to in (9.0, 0.0))
    x = torch.cat((ties, up, down, torch.tensor([0.0, 1e-40, 6.0, 7.0])))
    x = torch.cat((x, -x))
    assert torch.equal(ao.encode(x), encode_e2m1(x))


def test_torchao_decodes_all_codes_alike(ao: Any) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    theirs, ours = ao.decode(codes), decode_e2m1(codes)
    assert torch.equal(theirs, ours)
    assert torch.equal(torch.signbit(theirs), torch.signbit(ours))


def test_torchao_global_scale_is_our_multiplier(ao: Any) -> None:
    for w in random_weights():
        assert torch.equal(ao.global_scale(w.abs().max()), nvfp4_global_scale(w))


def test_torchao_activation_scales_are_byte_equal(ao: Any) -> None:
    """Both divide amax(block) by 6 and then by the global scale: midpoints included."""
    for w in (*random_weights(), e4m3_midpoint_matrix()):
        s2 = nvfp4_global_scale(w)
        scale, _ = ao.quantize(w, 16, s2)
        ours = quantize_nvfp4_activation(w, s2)
        assert ours.scale is not None
        at_least_2_to_minus_6 = scale_bytes(ours.scale).clamp(min=0x08)
        assert torch.equal(scale_bytes(scale), at_least_2_to_minus_6)


def test_torchao_bytes_are_equal_at_every_tie(ao: Any) -> None:
    w, s2 = tie_matrix()
    scale, packed = ao.quantize(w, 16, s2)
    for ours in (quantize_nvfp4(w), quantize_nvfp4_activation(w, s2)):
        assert ours.scale is not None
        assert torch.equal(scale_bytes(scale), scale_bytes(ours.scale))
        assert torch.equal(packed, ours.qdata)


def test_fact_torchao_codes_are_ours_with_a_reciprocal_for_the_division(ao: Any) -> None:
    """The whole difference: x * ((1 / s2) / scale) rounds twice more than x / (scale * s2)."""
    different = 0
    for w in random_weights():
        s2 = nvfp4_global_scale(w)
        scale, packed = ao.quantize(w, 16, s2)
        factor = ((1 / s2) / scale.float()).unsqueeze(-1)
        codes = encode_e2m1((w.view(w.shape[0], -1, 16) * factor).flatten(-2))
        assert torch.equal(packed, pack_e2m1(codes))
        different += int((packed != quantize_nvfp4_activation(w, s2).qdata).sum())
    assert different > 0, "BF16 weights sit on ties, where the reciprocal's error shows"


def test_fact_torchao_stops_block_scales_at_the_smallest_normal(ao: Any) -> None:
    """2^-6 there; 2^-9 for weights and 0 for activations here."""
    w = torch.zeros(2, 16)
    w[0, 0], w[1, 0] = 2688.0, 6 * 2.0**-12
    scale, _ = ao.quantize(w, 16, torch.tensor(1.0))
    ours, act = quantize_nvfp4(w), quantize_nvfp4_activation(w, torch.tensor(1.0))
    assert ours.scale is not None
    assert act.scale is not None
    assert [s.float()[1, 0].item() for s in (scale, ours.scale, act.scale)] == [2.0**-6, 2.0**-9, 0.0]
