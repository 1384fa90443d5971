"""The Hopper layout of NVFP4 weights: round trips, and the kernel's decode of it, bit by bit, in integers."""

import pytest
import torch

from ownpath.kernels.nvfp4 import layout as packing
from ownpath.numerics import decode_e4m3, decode_packed_e2m1

ROWS, COLS = 256, 384


def operand(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (ROWS, COLS // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(1, 127, (ROWS, COLS // 16), dtype=torch.uint8, generator=generator)
    return codes, scale.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("rows_of", [packing.plain_rows, packing.gate_up_rows])
def test_packing_round_trips(rows_of) -> None:
    codes, scale = operand()
    rows = rows_of(ROWS)
    assert torch.equal(rows.sort().values, torch.arange(ROWS))
    assert torch.equal(packing.unpack_codes(packing.pack_codes(codes, rows), rows, COLS), codes)
    assert torch.equal(packing.unpack_scales(packing.pack_scales(scale, rows), rows, COLS), scale.float())


@pytest.mark.parametrize("rows_of", [packing.plain_rows, packing.gate_up_rows])
def test_a_packed_weight_comes_back(rows_of) -> None:
    codes, scale = operand(1)
    scale.view(torch.uint8)[3, 5] = 0
    packed_codes, packed_scale, rows = codes.clone(), scale.clone(), rows_of(ROWS)
    packing.pack_weight_(packed_codes, packed_scale, rows)
    assert not torch.equal(packed_codes, codes)
    back, back_scale = packing.unpack_weight(packed_codes, packed_scale, rows, COLS)
    codes[3, 40:48], scale.view(torch.uint8)[3, 5] = 0, 1  # under a zero scale: zeros under 2**-9, E4M3's byte 1
    assert torch.equal(back, codes)
    assert torch.equal(back_scale.view(torch.uint8), scale.view(torch.uint8))


def test_rows_of_a_thread_are_neighbours_or_gate_and_up() -> None:
    # Packed row 16 w + 8 h + g: thread group g of warp w holds rows g (h = 0) and g + 8 (h = 1).
    for warp in range(4):
        for g in range(8):
            low, high = 64 + 16 * warp + g, 64 + 16 * warp + 8 + g
            plain, gate_up = packing.plain_rows(128), packing.gate_up_rows(128)
            assert (plain[low], plain[high]) == (64 + 16 * warp + 2 * g, 64 + 16 * warp + 2 * g + 1)
            assert (gate_up[low], gate_up[high]) == (32 + 8 * warp + g, 64 + 32 + 8 * warp + g)


def rotate_right(words: torch.Tensor, distance: int) -> torch.Tensor:
    return (words >> distance | words << (32 - distance)) & 0xFFFFFFFF


def bf16_words(words: torch.Tensor, scales: torch.Tensor, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Computes as the kernel does from a thread's word and its word of scales: four words with two BF16 each, and the
    BF16 that each is multiplied by."""
    wanted = 0x81C081C0
    fields = [
        words & wanted,
        rotate_right(words, 3) & wanted,
        rotate_right(words, 6) & wanted,
        (words & 0x001B001B) * 0x1084 & wanted,
    ]
    both = (rotate_right(scales, 8) if step % 2 else scales) & 0x0FF00FF0 | 0x70007000
    factors = (both & 0xFFFF, both >> 16)
    return [(field, factors[idx % 2]) for idx, field in enumerate(fields)]


def as_float64(bits: torch.Tensor) -> torch.Tensor:
    return (bits << 16).to(torch.int32).view(torch.float32).double()


def test_the_kernels_decode_is_exact() -> None:
    """Every code and scale, decoded with the kernel's shifts and masks, is code * scale * 2**-19 in one BF16."""
    codes, scale = operand()
    rows = packing.plain_rows(ROWS)
    words = packing.pack_codes(codes, rows).view(torch.int32).long() & 0xFFFFFFFF
    words = words.view(ROWS // 64, COLS // 128, 2, 4, 8, 4, 4)
    packed_scales = packing.pack_scales(scale, rows).view(torch.int32).long() & 0xFFFFFFFF
    packed_scales = packed_scales.view(ROWS // 64, COLS // 128, 2, 4, 8, 2)
    wanted = torch.empty(ROWS, COLS, dtype=torch.float64)
    wanted[:] = decode_packed_e2m1(codes, torch.float64) * decode_e4m3(
        scale.view(torch.uint8), torch.float64
    ).repeat_interleave(16, 1)
    found = torch.full((ROWS, COLS), torch.nan, dtype=torch.float64)
    for step in range(8):
        word = words[:, :, step // 4, :, :, :, step % 4]  # [block, k block, warp, g, q]
        scales = packed_scales[:, :, step // 4, :, :, step % 4 // 2, None].expand(-1, -1, -1, -1, 4)
        for register, (field, factor) in enumerate(bf16_words(word, scales, step)):
            for lane in range(2):
                product = as_float64(field >> (16 * lane) & 0xFFFF) * as_float64(factor)
                assert torch.equal(product.to(torch.bfloat16).double(), product), "not exact in BF16"
                place(found, rows, product * 2.0**19, step, register, lane)
    assert torch.equal(found, wanted)


def place(found: torch.Tensor, rows: torch.Tensor, value: torch.Tensor, step: int, register: int, lane: int) -> None:
    block, k_block, warp, g, q = torch.meshgrid(*map(torch.arange, value.shape), indexing="ij")
    row = rows[block * 64 + warp * 16 + 8 * (register % 2) + g]
    found[row, k_block * 128 + step * 16 + 8 * (register // 2) + 2 * q + lane] = value


def test_codes_under_a_zero_scale_become_zero() -> None:
    codes, scale = operand()
    scale.view(torch.uint8)[3, 5] = 0
    scale.view(torch.uint8)[7, 0] = 0x80
    kept = codes.clone()
    kept[3, 40:48] = 0
    kept[7, :8] = 0
    rows = packing.plain_rows(ROWS)
    packing.pack_weight_(codes, scale, rows)
    assert torch.equal(packing.unpack_codes(codes.flatten(), rows, COLS), kept)


@pytest.mark.parametrize(("byte", "word"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative"), (0xFE, "negative")])
def test_bad_scales_are_named(byte: int, word: str) -> None:
    _, scale = operand()
    scale.view(torch.uint8)[1, 1] = byte
    with pytest.raises(ValueError, match=f"w13_scale holds a {word}"):
        packing.check_scales("w13_scale", scale)
