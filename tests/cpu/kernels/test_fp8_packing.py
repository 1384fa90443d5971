"""The packed FP8 layout and the torch twins that read it."""

import pytest
import torch

from ownpath.conformance.bounds import relative_l2
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.kernels.fp8.cases import CASES, Fp8Case
from ownpath.kernels.fp8.layout import (
    column_order,
    fp8_padding,
    pack_blocks,
    pack_fp8,
    restore_fp8,
    row_order,
    unpack_blocks,
)
from ownpath.kernels.fp8.ref import fp8_w8a8, fp8_w8a16, quantize_rows, unpack_fp8
from ownpath.numerics import decode_fp8_block, quantize_fp8_block

CPU = torch.device("cpu")
SMALL = [case for case in CASES if sum(case.shard_rows) * case.width < 600_000]


def test_orders_are_permutations() -> None:
    assert column_order().sort().values.equal(torch.arange(128))
    assert row_order().sort().values.equal(torch.arange(64))


def test_blocks_round_trip() -> None:
    codes = torch.randint(0, 256, (200, 300), dtype=torch.uint8)
    blocks = pack_blocks(codes, row_order())
    assert blocks.shape == (4, 3, 8192)
    assert unpack_blocks(blocks, row_order(), 200, 300).equal(codes)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
@pytest.mark.parametrize("shard_rows", [(136,), (64, 200), (192, 64, 65)])
def test_shards_come_back(shard_rows: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, 200, generator=generator) for rows in shard_rows]
    shards = [quantize_fp8_block(weight, scale_dtype) for weight in weights]
    packed = pack_fp8([shard.qdata for shard in shards], [shard.scale for shard in shards])
    for shard, (codes, scale) in zip(shards, restore_fp8(packed, shard_rows), strict=True):
        assert torch.equal(codes.view(torch.uint8), shard.qdata.view(torch.uint8))
        assert torch.equal(scale, shard.scale.float())
    assert not fp8_padding(packed).any()


def test_padding_is_what_lies_outside() -> None:
    packed = pack_fp8([torch.ones(70, 130).to(torch.float8_e4m3fn)], [torch.ones(1, 2)])
    assert fp8_padding(packed).numel() == 128 * 256 - 70 * 130
    packed.blocks.fill_(1)
    assert fp8_padding(packed).sum() == 128 * 256 - 70 * 130


@pytest.mark.parametrize("entry", [0, 1, 2])
@pytest.mark.parametrize("row_block", [0, 1, 2])
def test_a_scale_whose_forms_disagree_comes_back_as_nan(entry: int, row_block: int) -> None:
    packed = pack_fp8([torch.ones(160, 128).to(torch.float8_e4m3fn)], [torch.tensor([[0.5], [0.25]])])
    ((_, intact),) = restore_fp8(packed, (160,))
    assert intact.tolist() == [[0.5], [0.25]]
    packed.scales[row_block, 0, entry] ^= 1 << 22
    ((_, scale),) = restore_fp8(packed, (160,))
    assert torch.isnan(scale).flatten().tolist() == [row_block < 2, row_block == 2]


def test_a_threads_bytes_are_its_register_fragments() -> None:
    """Lane (g, q) of a warp reads units 2q and 2q + 1 of stored rows g and g + 8: its share of eight k16 steps."""
    k = torch.arange(128, dtype=torch.uint8).expand(64, 128)
    block = pack_blocks(k, row_order())[0, 0].view(64, 8, 16)
    for row in (0, 5, 9, 62):
        for q in range(4):
            for step in range(8):
                unit = (2 * q + step // 4) ^ row % 8
                word = block[row, unit, 4 * (step % 4) : 4 * (step % 4) + 4].tolist()
                assert word == [16 * step + 2 * q + offset for offset in (8, 0, 9, 1)]


def test_reads_of_eight_lanes_touch_all_banks() -> None:
    for half in range(2):
        for first in range(0, 8, 2):
            units = {((2 * q + half) ^ g) for g in (first, first + 1) for q in range(4)}
            assert units == set(range(8))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_packed_weights_hold_the_stored_values(case: Fp8Case) -> None:
    weights, scales = draw_weights(case, 1, CPU)
    packed = pack_fp8(weights, scales)
    codes, scale = unpack_fp8(packed)
    assert codes.view(torch.uint8).equal(torch.cat([w.view(torch.uint8) for w in weights]))
    wide = scale.repeat_interleave(128, dim=1)[:, : case.width]
    exact = torch.cat([decode_fp8_block(w, s) for w, s in zip(weights, scales, strict=True)])
    assert (codes.float() * wide).equal(exact)
    assert packed.folded == (case.scales == "e8m0")
    assert packed.num_row_blocks % 2 == 0


def test_the_decode_multiplier_restores_every_code() -> None:
    """Each code moved into BF16's fields, times the packed multiplier, is code times scale; all 254 codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    for exponent in (-100, -9, 0, 7):
        scale = torch.tensor([[127 + exponent]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        packed = pack_fp8([torch.zeros(64, 128, dtype=torch.float8_e4m3fn)], [scale])
        assert packed.folded
        multiplier = (packed.scales[0, 0, :1] & 0xFFFF).to(torch.int16).view(torch.bfloat16)
        moved = ((codes.int() & 0x80) << 8 | (codes.int() & 0x7F) << 4).to(torch.int16).view(torch.bfloat16)
        assert (moved * multiplier).double().equal(codes.view(torch.float8_e4m3fn).double() * 2.0**exponent)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_twins_against_float64(case: Fp8Case) -> None:
    weights, scales = draw_weights(case, 2, CPU)
    packed = pack_fp8(weights, scales)
    exact = torch.cat([decode_fp8_block(w, s, torch.float64) for w, s in zip(weights, scales, strict=True)])
    x = draw_rows(5, case.width, 1.0, CPU)
    y = torch.full((5, packed.out_features), torch.nan, dtype=torch.bfloat16)
    fp8_w8a16(x, packed, y)
    assert relative_l2(y, x.double() @ exact.T) <= 2.0**-8
    fp8_w8a8(x, packed, y, torch.empty(0))
    codes, scale = quantize_rows(x, packed.power_of_two)
    rows = (codes.double() * scale.double()[..., None]).flatten(1)[:, : case.width]
    assert relative_l2(y, rows @ exact.T) <= 2.0**-8


@pytest.mark.parametrize("power_of_two", [True, False])
def test_row_quantiser_is_the_block_quantiser_above_the_floor(power_of_two: bool) -> None:
    x = draw_rows(9, 256, 3.0, CPU)
    codes, scale = quantize_rows(x, power_of_two)
    dtype = torch.float8_e8m0fnu if power_of_two else torch.float32
    defined = quantize_fp8_block(x, dtype, block=(1, 128))
    assert codes.flatten(1).view(torch.uint8).equal(defined.qdata.view(torch.uint8))
    assert defined.scale is not None
    assert scale.equal(defined.scale.to(torch.float32))


def test_row_quantiser_edges() -> None:
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    x[1, 0], x[2, 7] = torch.nan, torch.inf
    codes, scale = quantize_rows(x, True)
    assert scale[0].item() == 2.0**-22  # 1e-4 / 448 = 1.87 * 2**-23
    assert not codes[0].float().any()
    assert scale[1:].isnan().all()


def test_what_cannot_be_packed_is_named() -> None:
    weight = torch.zeros(64, 128, dtype=torch.uint8)
    scale = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"scale\[0\]"):
        pack_fp8([weight.view(torch.float8_e4m3fn)], [scale * 0])
    weight[3, 4] = 0xFF
    with pytest.raises(ValueError, match=r"weight\[0\] holds a NaN"):
        pack_fp8([weight.view(torch.float8_e4m3fn)], [scale])
