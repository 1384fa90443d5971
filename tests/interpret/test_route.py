"""Gate and router in one launch, interpreted: what its cases in ``test_small_ops`` leave out."""

import pytest
import torch

from ownpath.kernels.contract import RouterWeights, RouteWeights
from ownpath.kernels.router.ref import route as reference
from ownpath.kernels.router.route import MAX_ROWS, MIN_DOT_TOKENS, ROUTE, RouteTiles, TritonRoute, choose_tiles

E, D, K, VOCAB = 20, 96, 3, 50
TILES = [
    RouteTiles(2, 128, 1, 0, 8),
    RouteTiles(4, 32, 2, 0, 1),
    RouteTiles(32, 64, 4, 0, 4),
    RouteTiles(8, 32, 4, 2, 4),
    RouteTiles(16, 128, 16, 8, 8),
]
"""One and several groups; one and several splits, the last of which is cut off; experts that do not fill a tile."""


def gate() -> torch.Tensor:
    """Weights that are multiples of 1/8, so that sums with whole inputs are exact in any order."""
    return (torch.randint(-8, 9, (E, D), generator=torch.Generator().manual_seed(1)) / 8).bfloat16()


def rows(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(-2, 3, (num_tokens, D), generator=torch.Generator().manual_seed(2)).to(dtype)


def scored() -> RouterWeights:
    return RouterWeights(K, 2.5, torch.linspace(-0.5, 0.5, E), None)


def named() -> RouterWeights:
    ids = (torch.arange(VOCAB)[:, None] * 7 + torch.arange(K) * 3) % E
    return RouterWeights(K, 2.5, None, ids)


@pytest.mark.parametrize(
    ("tiles", "dtype"), [*((tiles, torch.bfloat16) for tiles in TILES), (TILES[1], torch.float32)], ids=str
)
@pytest.mark.parametrize("weights", [scored(), named()], ids=["by score", "by token"])
def test_every_tiling_gives_the_twins_choice(tiles: RouteTiles, dtype: torch.dtype, weights: RouterWeights) -> None:
    x_TD, gate_ED, token_ids_T = rows(7, dtype), gate(), torch.tensor([4, -1, 49, 0, 17, -1, 8])
    ids_TK, weights_TK = TritonRoute(tiles)(x_TD, gate_ED, weights, token_ids_T)
    expected_ids, expected_weights = reference(x_TD.double(), gate_ED, weights, token_ids_T)
    assert torch.equal(ids_TK, expected_ids)
    # Logits are exact; a weight is then a score by another, each within some steps.
    torch.testing.assert_close(weights_TK.double(), expected_weights, rtol=32 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_ties_go_to_the_lower_expert(tiles: RouteTiles) -> None:
    """All of a token's logits are equal, across programs and splits."""
    weights = RouterWeights(K, 1.0, torch.zeros(E), None)
    ids_TK, weights_TK = TritonRoute(tiles)(rows(5), torch.ones(E, D).bfloat16(), weights)
    assert ids_TK.tolist() == [[0, 1, 2]] * 5
    torch.testing.assert_close(weights_TK, torch.full((5, K), 1 / 3))


def test_counters_are_zero_behind_a_call() -> None:
    """So that the next one, of another size too, finds them as the first did."""
    operand = ROUTE.prepare(RouteWeights(gate(), scored()))
    token_ids_T = torch.arange(MAX_ROWS)
    for num_tokens in (MIN_DOT_TOKENS + 12, 1, 3):
        x_TD = rows(num_tokens)
        found = ROUTE.run(x_TD, token_ids_T[:num_tokens], operand)
        expected = ROUTE(x_TD, gate(), scored(), token_ids_T[:num_tokens])
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        assert not operand.counters.any()


@pytest.mark.parametrize("width", [8, 256, 4096, 7168, 16384])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, MAX_ROWS])
def test_tiles_cover_the_gate(num_tokens: int, width: int) -> None:
    tiles = choose_tiles(num_tokens, width, is_narrow=True)
    assert tiles.group in (1, 4)
    assert tiles.width & (tiles.width - 1) == 0
    assert not tiles.slices or tiles.width // tiles.slices >= 16, "a product's least depth"


def test_wrong_operands_are_refused() -> None:
    x_TD, gate_ED, ids = rows(2), gate(), torch.zeros(2, dtype=torch.int64)
    for what, call in (
        ("x_TD", (rows(MAX_ROWS + 1), gate_ED, scored())),
        ("x_TD", (x_TD.double(), gate_ED, scored())),
        ("x_TD", (x_TD[0], gate_ED, scored())),
        ("gate_ED", (x_TD, gate_ED[:, :-8].contiguous(), scored())),
        ("bias_E", (x_TD, gate_ED[:-4].contiguous(), scored())),
        ("token_ids_T", (x_TD, gate_ED, scored(), ids[:1])),
        ("token_ids_T", (x_TD, gate_ED, named())),
        ("tid2eid", (x_TD, gate_ED, RouterWeights(K, 1.0, None, None))),
        (r"out\[0\]", (x_TD, gate_ED, scored(), ids, (torch.zeros(2, K), torch.zeros(2, K)))),
    ):
        with pytest.raises(ValueError, match=what):
            ROUTE(*call)


def test_rows_are_independent_of_their_neighbours() -> None:
    """Within one tiling; NaN in other rows does not reach them."""
    x_TD = rows(9)
    spoilt = x_TD.clone()
    spoilt[::2] = torch.nan
    kernel = TritonRoute(RouteTiles(8, 32, 4, 2, 4))
    right, found = (kernel(x, gate(), scored()) for x in (x_TD, spoilt))
    assert all(torch.equal(a[1::2], b[1::2]) for a, b in zip(right, found, strict=True))
