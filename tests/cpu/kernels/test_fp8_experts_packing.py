"""The layout of the experts' FP8 kernel: round trips, its decode in integers, what E4M3 cannot hold, the twin."""

import re

import pytest
import torch

from ownpath.formats import MXFP4, NVFP4
from ownpath.kernels.fp8_experts import layout, pack
from ownpath.kernels.fp8_experts.choose import SHAPES, choose
from ownpath.kernels.fp8_experts.config import part_sizes
from ownpath.kernels.nvfp4.layout import gate_up_rows, plain_rows
from ownpath.kernels.official_experts.ref import ExpertWeights, moe_quantized_inputs
from ownpath.numerics import decode_mxfp4_blocks, decode_nvfp4_blocks, mxfp4_scale_as_nvfp4
from ownpath.qtensor import QuantTensor

ROWS, COLS = 128, 256


def mxfp4(
    num_rows: int = ROWS, num_cols: int = COLS, low: int = -8, high: int = 6, apart: int = 9
) -> tuple[torch.Tensor, ...]:
    """Random codes, and E8M0 scales whose exponents lie between low and high around a power of each row."""
    g = torch.Generator().manual_seed(num_rows + num_cols)
    codes = torch.randint(0, 256, (num_rows, num_cols // 2), dtype=torch.uint8, generator=g)
    exponents = torch.randint(low, high + 1, (num_rows, num_cols // 32), generator=g)
    exponents += torch.randint(-apart, apart + 1, (num_rows, 1), generator=g) + 127
    return codes, exponents.to(torch.uint8).view(torch.float8_e8m0fnu)


def as_kernel(codes: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Decodes packed codes as the kernel does, from a thread's words: E4M3 bytes [N, K] of packed rows."""
    words = codes.view(torch.int32).long().view(-1, COLS // 128, 2, 4, 8, 4, 2, 2) & 0xFFFFFFFF
    # [block, k block, step high, warp, g, q, step low, half] -> [block, warp, half, g, k block, step, q]
    words = words.permute(0, 3, 7, 4, 1, 2, 6, 5).flatten(5, 6)
    scales = offsets.view(-1, COLS // 128, 4, 8, 2, 4).permute(0, 2, 4, 3, 1, 5).long()
    entries = torch.tensor(layout.TABLES)
    tables = torch.stack([entries[:, byte // 4] >> 8 * (byte % 4) & 255 for byte in range(8)], dim=1)
    table = tables[scales // 8][..., None, :].expand(*words.shape, 8)
    sides = []
    for shift, signs in ((0, words), (16, words << 4)):
        columns = []
        for i in range(4):
            looked_up = table.gather(-1, (words >> shift + 4 * i & 7)[..., None])[..., 0]
            columns.append(looked_up | signs >> 8 * i & 0x80)
        sides.append(torch.stack(columns, dim=-1))
    # [..., k block, step, side, q, i]
    return torch.stack(sides, dim=-3).flatten(4).flatten(0, 3).to(torch.uint8)


@pytest.mark.parametrize("rows_of", [plain_rows, gate_up_rows])
def test_the_kernel_decodes_the_stored_values(rows_of) -> None:
    codes, scale = mxfp4()
    rows, window = rows_of(ROWS), layout.mxfp4_window(codes, scale)
    assert not isinstance(window, str)
    packed, offsets = layout.pack_codes(codes, rows), layout.pack_scales(window.relative, rows)
    decoded = as_kernel(packed, offsets).view(torch.float8_e4m3fn).double()
    values = torch.ldexp(decoded, window.row_exponents[rows][:, None])
    assert torch.equal(values, decode_mxfp4_blocks(codes, scale, torch.float64)[rows])
    assert torch.equal(layout.unpack_codes(packed, rows, COLS), codes)
    assert torch.equal(layout.unpack_scales(offsets, rows, COLS), window.relative)


def test_nvfp4_made_of_mxfp4_has_the_same_operand() -> None:
    codes, scale = mxfp4(low=-4, high=4, apart=3)
    made, factor = mxfp4_scale_as_nvfp4("w", codes[None], scale[None], None)
    one, other = layout.mxfp4_window(codes, scale), layout.nvfp4_window(codes, made[0])
    assert not isinstance(one, str)
    assert not isinstance(other, str)
    assert torch.equal(one.relative, other.relative)
    assert float(factor.log2()) == float((one.row_exponents - other.row_exponents)[0])
    assert torch.equal(decode_nvfp4_blocks(codes, made[0], torch.float64) * factor.double().flatten()[0],
                       decode_mxfp4_blocks(codes, scale, torch.float64))  # fmt: skip


def test_what_e4m3_cannot_hold_is_named() -> None:
    codes, scale = mxfp4(low=0, high=0)
    raw = scale.view(torch.uint8)
    raw[5, 3] -= 14
    assert not isinstance(layout.mxfp4_window(codes, scale), str)
    raw[5, 3] -= 1
    assert layout.mxfp4_window(codes, scale) == layout.TOO_WIDE
    codes[5, 48:64] = 0x80  # zeros of either sign: their scale is no matter
    assert not isinstance(layout.mxfp4_window(codes, scale), str)
    plain = torch.full((ROWS, COLS // 16), 1.0).to(torch.float8_e4m3fn)
    plain[7, 2] = 1.5
    assert layout.nvfp4_window(codes, plain) == "a block scale is no power of two"
    plain[7, 2] = 2.0
    assert layout.nvfp4_window(codes, plain) == "a block scale changes inside a group of 32"
    plain[7, 3] = 2.0
    assert not isinstance(layout.nvfp4_window(codes, plain), str)


def test_both_formats_have_the_same_twin() -> None:
    experts, dim, width = 2, 256, 256
    sides = []
    for num_rows, num_cols in ((2 * width, dim), (dim, width)):
        stacks = [mxfp4(num_rows, num_cols, -3, 3, apart=2) for _ in range(experts)]
        codes, scale = (torch.stack(parts) for parts in zip(*stacks, strict=True))
        made, factor = mxfp4_scale_as_nvfp4("w", codes, scale, None)
        sides.append((ExpertWeights(MXFP4, codes, scale), ExpertWeights(NVFP4, codes, made, factor)))
    x = torch.randn(5, dim, dtype=torch.float64).bfloat16()
    ids = torch.tensor([[0, 1]] * 5)
    weights = torch.rand(5, 2)
    found = [moe_quantized_inputs(x, ids, weights, w13, w2, 10.0) for w13, w2 in zip(*sides, strict=True)]
    assert torch.equal(*found)


def test_parts_and_choices() -> None:
    assert part_sizes(192, 2) == (96, 96)
    assert part_sizes(240, 3) == (80, 80, 80)
    assert part_sizes(208, 2) == (104, 104)
    assert part_sizes(24, 2) == (24,)
    assert part_sizes(8, 4) == (8,)
    for limit, shape in SHAPES:
        pairs = int(min(limit, 500.0) * 256)
        choice = choose(pairs, 256, 4096, 2048, False)
        assert choice.tile_rows == choice.down.n_sizes[-1] == shape.n_sizes[-1]
    assert choose(6, 256, 4096, 2048, True).down.wide


@pytest.mark.parametrize("made", [False, True], ids=["mxfp4", "nvfp4"])
def test_a_stack_comes_back(made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "require_packable", lambda *_: None)  # which wants a CUDA device
    side = stack(made)
    stored = QuantTensor(*(None if part is None else part.clone() for part in parts_of(side)), side.format)
    assert pack.check_stack("w13", side) is None
    packed = pack.pack_stack(side, gate_up_rows(ROWS))
    assert packed.scales.numel() == 2 * ROWS * COLS // 32
    for expert in range(2):
        back = pack.restore_stack(packed, gate_up_rows(ROWS), expert)
        assert back.format is side.format
        for found, expected in zip(parts_of(back), parts_of(stored.of_expert(expert)), strict=True):
            assert (found is None and expected is None) or torch.equal(as_bytes(found), as_bytes(expected))


def test_stacks_that_do_not_fit_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "require_packable", lambda *_: None)
    wide, other = stack(made=False), stack(made=True)
    wide.scale.view(torch.uint8)[1, 5, 2] += 16
    assert pack.check_stack("w2", wide) == f"w2 of expert 1: {layout.TOO_WIDE}"
    wide.scale.view(torch.uint8)[0, 0, 0] = 255
    with pytest.raises(ValueError, match="w2_scale holds a NaN block scale"):
        pack.check_stack("w2", wide)
    other.scale[0] = 1.5
    cost = re.escape(f"changes its weights by {1 / 3:.1%} (relative L2)")
    with pytest.raises(ValueError, match=rf"w2 of expert 0 was not made from MXFP4: a block scale is no power.*{cost}"):
        pack.check_stack("w2", other)


def stack(made: bool) -> QuantTensor:
    """Two experts of gate and up, as MXFP4, or as NVFP4 made of it."""
    stacks = [mxfp4(low=-3, high=3, apart=2) for _ in range(2)]
    codes, scale = (torch.stack(parts) for parts in zip(*stacks, strict=True))
    if not made:
        return QuantTensor(codes, scale, None, MXFP4)
    narrow, factor = mxfp4_scale_as_nvfp4("w", codes, scale, None)
    return QuantTensor(codes, narrow, factor[:, None].repeat(1, 2), NVFP4)


def parts_of(side: QuantTensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return side.qdata, side.scale, side.global_scale


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
