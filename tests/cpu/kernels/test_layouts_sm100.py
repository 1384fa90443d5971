"""Blackwell's order of block scales: the published formula byte by byte, and both ways round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.kernels.nvfp4_sm100.layout import linear_operand, scale_padding
from ownpath.kernels.nvfp4_sm100.scales import swizzle_scales, swizzled_shape, unswizzle_scales


def byte_offset(row: int, column: int, num_column_pieces: int) -> int:
    """Returns the offset of a scale by the PTX manual's formula."""
    piece = (row // 128) * num_column_pieces + column // 4
    return piece * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4


@pytest.mark.parametrize(("num_rows", "num_groups"), [(128, 4), (256, 8), (384, 24), (130, 5), (1, 1)])
def test_every_scale_lies_where_the_formula_says(num_rows: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    scale = torch.randint(1, 256, (num_rows, num_groups), dtype=torch.uint8, generator=generator)
    flat = swizzle_scales(scale).flatten()
    rows, columns = torch.meshgrid(torch.arange(num_rows), torch.arange(num_groups), indexing="ij")
    pieces = -(-num_groups // 4)
    at = torch.tensor(
        [byte_offset(int(r), int(c), pieces) for r, c in zip(rows.flatten(), columns.flatten(), strict=True)]
    )
    assert torch.equal(flat[at], scale.flatten())
    assert int((flat != 0).sum()) == scale.numel(), "padding must be zero"


def test_the_worked_example_of_the_module() -> None:
    scale = torch.zeros(128, 16, dtype=torch.uint8)
    scale[33, 5] = 7
    assert swizzle_scales(scale).flatten().nonzero().tolist() == [[533]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
def test_round_trip(num_rows: int, num_groups: int, num_experts: int) -> None:
    lead = (num_experts,) if num_experts else ()
    generator = torch.Generator().manual_seed(num_rows * 41 + num_groups)
    scale = torch.randint(0, 256, (*lead, num_rows, num_groups), dtype=torch.uint8, generator=generator)
    scale = scale.view(torch.float8_e4m3fn)
    swizzled = swizzle_scales(scale)
    assert swizzled.shape == (*lead, *swizzled_shape(num_rows, num_groups))
    assert swizzled.dtype == torch.float8_e4m3fn
    assert swizzled.is_contiguous()
    back = unswizzle_scales(swizzled, num_rows, num_groups)
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


def test_what_is_not_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="one-byte elements"):
        swizzle_scales(torch.zeros(128, 4))
    with pytest.raises(ValueError, match="not"):
        unswizzle_scales(torch.zeros(1, 1, 32, 4, 4, dtype=torch.uint8), 129, 4)


@pytest.mark.parametrize(("num_rows", "k"), [(128, 64), (8, 64), (200, 192), (264, 320)])
def test_padding_of_a_linears_scales(num_rows: int, k: int) -> None:
    scale = torch.full((num_rows, k // 16), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one = torch.ones(())
    operand = linear_operand(torch.zeros(num_rows, k // 2, dtype=torch.uint8), scale, one.expand(num_rows), one)
    whole = -(-num_rows // 128) * 128 * (k // 16)
    padding = scale_padding(operand.scale, num_rows, k // 16)
    assert padding.numel() == whole - num_rows * k // 16
    assert not padding.any()
    operand.scale.view(torch.uint8).fill_(7)
    assert (scale_padding(operand.scale, num_rows, k // 16) == 7).all()
