"""The products with few rows of x, interpreted: every tile right against float64 at sizes that it does not divide."""

import pytest
import torch

from ownpath.conformance.bounds import deviation
from ownpath.conformance.exact import product
from ownpath.formats import BF16
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.plain.few import PLAIN_LINEAR, FewOperand, launch_few
from ownpath.kernels.plain.few_choose import TILES, FewTile, PlainTile
from ownpath.qtensor import QuantTensor

X_FIRST = FewTile(3, 8, 16, 4, 2, 3, is_weight_first=False)
SIZES = [(1, 64, 256), (3, 50, 136), (8, 17, 8), (2, 33, 520)]
"""Rows of x, rows of W, columns."""


def tiles() -> list[PlainTile]:
    return list(dict.fromkeys([*(tile for *_, tile in TILES), X_FIRST]))


def operand_of(*weights: torch.Tensor) -> FewOperand:
    return PLAIN_LINEAR.prepare(StoredLinear(tuple(QuantTensor(weight, None, None, BF16) for weight in weights)))


def spaced_rows(num_rows: int, width: int) -> torch.Tensor:
    """Rows inside wider ones whose other columns are NaN."""
    wide = torch.full((num_rows, 3 * width), float("nan"), dtype=torch.bfloat16)
    wide[:, width : 2 * width] = torch.randn(num_rows, width)
    return wide[:, width : 2 * width]


@pytest.mark.parametrize("tile", tiles(), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tile_against_float64(tile: PlainTile, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    num_rows, width = size[1:]
    num_tokens = min(size[0], tile.tokens)
    x, weight = spaced_rows(num_tokens, width), torch.randn(num_rows, width).bfloat16()
    y = torch.full((num_tokens + 1, num_rows), float("nan"))
    launch_few(x, weight, y[:num_tokens], tile)
    found = deviation(y[:num_tokens], product(x.double(), weight.double()))
    assert found.is_allowed, str(found)
    assert y[num_tokens].isnan().all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 65])
def test_the_kernel_against_float64(num_tokens: int, out_dtype: torch.dtype) -> None:
    """65 rows are cuBLAS' on a device. Shards are one matrix; a given ``out`` decides the dtype."""
    torch.manual_seed(1)
    shards = [torch.randn(num_rows, 264).bfloat16() for num_rows in (20, 9)]
    operand, x = operand_of(*shards), spaced_rows(num_tokens, 264)
    exact = product(x.double(), torch.cat(shards).double())
    out = torch.full((num_tokens, 29), float("nan"), dtype=out_dtype)
    assert PLAIN_LINEAR.run(x, operand, out=out) is out
    y = PLAIN_LINEAR.run(x, operand) if out_dtype == torch.bfloat16 else PLAIN_LINEAR.run_wide(x, operand)
    assert torch.equal(y, out)
    assert deviation(y, exact).is_allowed, str(deviation(y, exact))


def test_neighbours_change_no_bit_of_a_tile() -> None:
    torch.manual_seed(2)
    x, operand = torch.randn(8, 256).bfloat16(), operand_of(torch.randn(40, 256).bfloat16())
    together = PLAIN_LINEAR.run_wide(x, operand)
    for idx in (0, 3, 5):
        assert torch.equal(PLAIN_LINEAR.run_wide(x[idx : idx + 3], operand), together[idx : idx + 3])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 1, 72).bfloat16(),
        torch.randn(2, 72),
        torch.randn(72, 2).bfloat16().T,
        torch.randn(2, 73).bfloat16()[:, 1:],
    ],
    ids=["3d", "float32", "columns", "unaligned"],
)
def test_what_the_kernel_cannot_read_is_computed_all_the_same(x: torch.Tensor) -> None:
    weight = torch.randn(24, 72).bfloat16()
    operand = operand_of(weight)
    y = PLAIN_LINEAR.run_wide(x, operand)
    assert y.shape == (*x.shape[:-1], 24)
    found = deviation(y.flatten(0, -2), product(x.double().flatten(0, -2), weight.double()))
    assert found.is_allowed, str(found)
    assert (PLAIN_LINEAR.variant(x, operand) == "library") == (x.ndim == 2)


def test_no_rows_and_odd_widths_are_the_librarys() -> None:
    assert PLAIN_LINEAR.run(torch.zeros(0, 72).bfloat16(), operand_of(torch.zeros(24, 72).bfloat16())).shape == (0, 24)
    operand = operand_of(torch.ones(24, 51).bfloat16())
    assert PLAIN_LINEAR.variant(torch.ones(1, 51).bfloat16(), operand) == "library"
    assert (PLAIN_LINEAR.run(torch.ones(1, 51).bfloat16(), operand) == 51).all()


def test_what_does_not_fit_is_named() -> None:
    operand = operand_of(torch.zeros(24, 72).bfloat16())
    x = torch.zeros(2, 72).bfloat16()
    with pytest.raises(ValueError, match="x has 80 features, the weight takes 72"):
        PLAIN_LINEAR.run(torch.zeros(2, 80).bfloat16(), operand)
    with pytest.raises(ValueError, match=r"out must have shape \[2, 24\]"):
        PLAIN_LINEAR.run(x, operand, out=torch.zeros(2, 32).bfloat16())
    with pytest.raises(ValueError, match=r"out must have shape \[2, 24\]"):
        PLAIN_LINEAR.run(x.float(), operand, out=torch.zeros(1, 2, 24))
    with pytest.raises(ValueError, match="out must be contiguous"):
        PLAIN_LINEAR.run(x, operand, out=torch.zeros(24, 2).bfloat16().T)
