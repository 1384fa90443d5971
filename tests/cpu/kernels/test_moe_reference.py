"""The torch reference of the experts: shared experts, maps, unknown ids; and the error bounds the GPU tests use."""

import pytest
import torch
from support.live_bytes import PeakBytes

from ownpath import Nvfp4Linear, Nvfp4MoE
from ownpath.conformance.bounds import assert_allowed, assert_rounded_once, deviation
from ownpath.conformance.exact import product
from ownpath.conformance.quant_weights import DenseWeight, ExpertStacks, RoutedTokens, exact_mixture
from ownpath.formats import NVFP4
from ownpath.numerics import dequantize, mxfp4_scale_as_nvfp4, quantize_fp8_block
from ownpath.qtensor import QuantTensor
from ownpath.runners import Fp8MoE, PlainMoE

CPU = torch.device("cpu")
LIMIT = 10.0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def test_the_reference_keeps_the_bounds() -> None:
    dense = DenseWeight.draw(64, 128, CPU)
    x = torch.randn(5, 128).bfloat16()
    y = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale)(x)
    assert_allowed(y, product(x.double(), dense.weight()))
    experts = ExpertStacks.draw(5, 128, 128, CPU)
    routed = RoutedTokens.draw(9, 128, 4, 2, CPU)
    y = Nvfp4MoE(*experts.tensors(), swiglu_limit=LIMIT)(routed.x, routed.ids, routed.weights, num_shared=1)
    assert_rounded_once(y, exact_mixture(experts, routed, LIMIT, num_shared=1))


def test_the_bounds_see_a_wrong_scale() -> None:
    experts = ExpertStacks.draw(4, 128, 128, CPU)
    routed = RoutedTokens.draw(9, 128, 4, 2, CPU)
    exact = exact_mixture(experts, routed, LIMIT)
    experts.w2_scale_2[2] *= 1.05
    y = Nvfp4MoE(*experts.tensors(), swiglu_limit=LIMIT)(routed.x, routed.ids, routed.weights)
    assert not deviation(y, exact).is_allowed


def test_maps_and_unknown_ids() -> None:
    experts = ExpertStacks.draw(4, 128, 128, CPU)
    routed = RoutedTokens.draw(9, 128, 4, 2, CPU)
    x = routed.x.double()
    whole = Nvfp4MoE(*experts.tensors(), swiglu_limit=LIMIT)(x, routed.ids, routed.weights)
    total = torch.zeros_like(whole)
    for parity in (0, 1):
        expert_map = torch.full((4,), -1, dtype=torch.int32)
        expert_map[parity::2] = torch.arange(2, dtype=torch.int32)
        local = Nvfp4MoE(*(tensor[parity::2] for tensor in experts.tensors()), swiglu_limit=LIMIT)
        total += local(x, routed.ids, routed.weights, expert_map=expert_map)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    nobody = torch.tensor([[-1, 4]], dtype=torch.int32)
    assert not Nvfp4MoE(*experts.tensors(), swiglu_limit=LIMIT)(x[:1], nobody, routed.weights[:1]).any()


def test_plain_experts_are_the_same_mixture() -> None:
    """Decoded NVFP4 experts in float32 with power-of-two global scales: equal to the packed ones, bit for bit."""
    experts = ExpertStacks.draw(5, 128, 64, CPU)
    for scalar in (experts.w13_scale_2, experts.w2_scale_2):
        scalar.copy_(2.0 ** torch.randint(-12, -6, scalar.shape))
    w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = experts.tensors()
    shared = w13_scale_2 if w13_scale_2.ndim == 1 else w13_scale_2[:, 0]
    packed = Nvfp4MoE(w13, w13_scale, shared, w2, w2_scale, w2_scale_2, swiglu_limit=LIMIT)
    decoded = [
        dequantize(QuantTensor(*parts, NVFP4)) for parts in ((w13, w13_scale, shared), (w2, w2_scale, w2_scale_2))
    ]
    routed = RoutedTokens.draw(9, 128, 4, 2, CPU)
    expert_map = torch.tensor([2, 0, -1, 3], dtype=torch.int32)
    for given in ({}, {"num_shared": 1}, {"num_shared": 1, "expert_map": expert_map}):
        call = (routed.x, routed.ids, routed.weights)
        assert torch.equal(PlainMoE(*decoded, LIMIT)(*call, **given), packed(*call, **given))
    with pytest.raises(ValueError, match="w2 must have shape"):
        PlainMoE(decoded[0], decoded[1][:, :, 1:], LIMIT)
    with pytest.raises(ValueError, match="topk_ids must have shape"):
        PlainMoE(*decoded, LIMIT)(routed.x, routed.ids[1:], routed.weights)


def test_mxfp4_scales_become_nvfp4_ones_exactly() -> None:
    codes = torch.randint(0, 256, (3, 8, 64), dtype=torch.uint8)
    codes[1, 2, :16] = 0x80  # a block of zeros may have any scale
    scale = torch.randint(100, 118, (3, 8, 4), dtype=torch.uint8)
    scale[1, 2, 0] = 0
    narrow, global_scale = mxfp4_scale_as_nvfp4("w", codes, scale.view(torch.float8_e8m0fnu))
    value = narrow.double() * global_scale[:, None, None].double()
    wanted = (2.0 ** (scale.double() - 127)).repeat_interleave(2, dim=-1)
    assert torch.equal(value[0], wanted[0])
    assert torch.equal(value[1, 3:], wanted[1, 3:])
    scale[2, 0, 0] = 80
    with pytest.raises(ValueError, match="w of expert 2 spans"):
        mxfp4_scale_as_nvfp4("w", codes, scale.view(torch.float8_e8m0fnu))
    scale[0, 0, 0] = 255
    with pytest.raises(ValueError, match="w of expert 0 holds a NaN"):
        mxfp4_scale_as_nvfp4("w", codes, scale.view(torch.float8_e8m0fnu))


def test_mxfp4_scales_grow_where_they_lie() -> None:
    """In the memory of what they become: the same scales as in new memory, and the codes are not touched."""
    codes = torch.randint(0, 256, (5, 8, 64), dtype=torch.uint8)
    scale = torch.randint(100, 118, (5, 8, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    wanted, wanted_global = mxfp4_scale_as_nvfp4("w", codes, scale)
    for half in (0, 1):
        room = torch.full((5, 8, 8), 0xFF, dtype=torch.uint8)
        lying = room.view(5, 2, 8, 4)[:, half].view(torch.float8_e8m0fnu)
        lying.copy_(scale)
        kept = codes.clone()
        grown, global_scale = mxfp4_scale_as_nvfp4("w", codes, lying, room.view(torch.float8_e4m3fn))
        assert grown.data_ptr() == room.data_ptr()
        assert torch.equal(grown.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(global_scale, wanted_global)
        assert torch.equal(codes, kept)


def test_the_cast_takes_memory_for_one_expert_however_many_there_are() -> None:
    """Experts of V4-Flash: 8 MiB of codes for gate and up, 4 MiB for down. 256 of them in a layer may take 256 MiB."""
    few, many = (_cast_peak(count, 256, 512, in_place=True) for count in (2, 7))
    assert many - few <= 5 * 16, "an expert more costs its exponent and two answers"
    result = 2 * (4096 * 4096 + 4096 * 2048) // 16
    assert _cast_peak(2, 4096, 2048, in_place=True) < 32 * 2**20
    assert _cast_peak(2, 4096, 2048, in_place=False) < 32 * 2**20 + result


def _cast_peak(num_experts: int, dim: int, inter: int, *, in_place: bool) -> int:
    shapes = ((num_experts, 2 * inter, dim), (num_experts, dim, inter))
    codes = [torch.full((e, n, k // 2), 0x21, dtype=torch.uint8) for e, n, k in shapes]
    rooms = [torch.full((e, n, k // 16), 120, dtype=torch.uint8) for e, n, k in shapes]
    scales = [room.view(2, len(room), room.shape[1], -1)[1].view(torch.float8_e8m0fnu) for room in rooms]
    with PeakBytes() as live:
        if in_place:
            parts = zip(codes, scales, rooms, strict=True)
            cast = [mxfp4_scale_as_nvfp4("w", c, s, room.view(torch.float8_e4m3fn)) for c, s, room in parts]
            moe = Nvfp4MoE(codes[0], *cast[0], codes[1], *cast[1], LIMIT)
        else:
            moe = Nvfp4MoE.from_mxfp4(codes[0], scales[0], codes[1], scales[1], LIMIT)
    assert moe.num_experts == num_experts
    return live.peak


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "inter"), [(64, 48), (128, 256), (160, 144)])
def test_fp8_experts_are_the_same_mixture(dim: int, inter: int, scale_dtype: torch.dtype) -> None:
    """Decoded matrix by matrix and given to the plain experts: the same bits; partial blocks of gate and up apart."""
    stored = {
        name: [quantize_fp8_block(torch.randn(n, k) * gain, scale_dtype) for gain in (0.1, 1.0, 3.0, 0.01, 0.3)]
        for name, n, k in (("w1", inter, dim), ("w3", inter, dim), ("w2", dim, inter))
    }
    codes, scales, values = (
        {name: torch.stack([pick(weight) for weight in weights]) for name, weights in stored.items()}
        for pick in (lambda w: w.qdata, lambda w: w.scale, dequantize)
    )
    fp8 = (torch.cat([codes["w1"], codes["w3"]], dim=1), torch.stack([scales["w1"], scales["w3"]], dim=1))
    moe = Fp8MoE(*fp8, codes["w2"], scales["w2"], LIMIT)
    plain = PlainMoE(torch.cat([values["w1"], values["w3"]], dim=1), values["w2"], LIMIT)
    routed = RoutedTokens.draw(9, dim, 4, 2, CPU)
    expert_map = torch.tensor([2, 0, -1, 3], dtype=torch.int32)
    for given in ({}, {"num_shared": 1}, {"num_shared": 1, "expert_map": expert_map}):
        for x in (routed.x, routed.x.float()):
            assert torch.equal(
                moe(x, routed.ids, routed.weights, **given), plain(x, routed.ids, routed.weights, **given)
            )


def test_fp8_operands_that_do_not_fit_are_named() -> None:
    codes13, codes2 = torch.zeros(2, 288, 160).to(torch.float8_e4m3fn), torch.zeros(2, 160, 144).to(torch.float8_e4m3fn)
    scale13, scale2 = torch.ones(2, 2, 2, 2), torch.ones(2, 2, 2)
    with pytest.raises(ValueError, match=r"w13_scale must have shape \[2, 2, 2, 2\], found \[2, 3, 2\]"):
        Fp8MoE(codes13, torch.ones(2, 3, 2), codes2, scale2, LIMIT)  # one grid over gate and up: partial blocks merged
    with pytest.raises(ValueError, match=r"w2_scale must be torch\.float8_e8m0fnu or torch\.float32"):
        Fp8MoE(codes13, scale13, codes2, scale2.bfloat16(), LIMIT)
    with pytest.raises(ValueError, match=r"w2 must have shape \[2, 160, 144\]"):
        Fp8MoE(codes13, scale13, codes2[:, :128], scale2, LIMIT)
    with pytest.raises(ValueError, match=r"w13 must be torch\.float8_e4m3fn"):
        Fp8MoE(codes13.float(), scale13, codes2, scale2, LIMIT)
    with pytest.raises(ValueError, match="x has 96 features"):
        Fp8MoE(codes13, scale13, codes2, scale2, LIMIT)(torch.zeros(1, 96), torch.zeros(1, 1).long(), torch.ones(1, 1))
