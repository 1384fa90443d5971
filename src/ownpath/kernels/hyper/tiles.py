"""Tile sizes of the boundary, by the number of tokens."""

from dataclasses import dataclass

MIN_DOT_TOKENS = 17
MANY_TOKENS = 256
MIN_COLUMN_TOKENS = 1024


@dataclass(frozen=True)
class BoundaryTiles:
    """Tile sizes of the first launch's programs, and tokens per Sinkhorn program.

    per_sm: programs per SM that walk over blocks of tokens, the tokens being columns; 0: each program has one block.
    slices_at_once: whose parts a Sinkhorn program adds; 0: all.
    """

    channels: int
    tokens: int
    use_dot: bool
    num_warps: int
    num_stages: int
    sinkhorn_tokens: int
    per_sm: int = 0
    slices_at_once: int = 0


ONE_TILES = BoundaryTiles(32, 1, False, 4, 1, 1)
FEW_TILES = BoundaryTiles(64, 1, False, 4, 1, 1)
INVARIANT_TILES = BoundaryTiles(32, 16, True, 2, 3, 1)
MANY_TILES = BoundaryTiles(128, 32, True, 2, 3, 4)
COLUMN_TILES = BoundaryTiles(64, 64, True, 8, 1, 16, per_sm=2, slices_at_once=8)


def choose_tiles(num_tokens: int, hidden_size: int, invariant: bool) -> BoundaryTiles:
    """Chooses tiles by token count, as measured on an H200; invariant: the same slices and order of sums always."""
    if num_tokens >= MIN_COLUMN_TOKENS and hidden_size % COLUMN_TILES.channels == 0 and not invariant:
        return COLUMN_TILES
    if num_tokens > MANY_TOKENS and not invariant:
        return MANY_TILES
    if num_tokens >= MIN_DOT_TOKENS or invariant:
        return INVARIANT_TILES
    return ONE_TILES if num_tokens == 1 else FEW_TILES
