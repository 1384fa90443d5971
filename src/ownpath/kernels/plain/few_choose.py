"""Tiles of products with few rows of x, by the sizes of a call; measured on an H200."""

from dataclasses import dataclass
from functools import lru_cache

STEP = 32
"""Columns that a warp multiplies at a time: 8 a lane, which is 16 bytes."""
MAX_CHUNKS = 64
"""Steps of one warp, which are unrolled."""
MAX_PARTS = 2
"""Parts of a row, all in registers, without tensor cores."""


@dataclass(frozen=True)
class FmaTile:
    """Sizes of a program without tensor cores: rows of W, rows of x (padded), columns that all warps take at a time."""

    live: int
    tokens: int
    warps: int
    columns: int

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the variant's name has."""
        return {"rows": self.live, "tokens": self.tokens, "warps": self.warps, "fma": self.columns}

    def warps_for(self, width: int) -> int:
        """Returns the warps of a program."""
        return self.warps

    def takes(self, width: int) -> bool:
        """Returns True if registers hold rows of ``width`` columns."""
        return -(-width // self.columns) <= MAX_PARTS

    def constants(self, width: int) -> dict[str, int | bool]:
        """Returns the kernel's constants for a weight of ``width`` columns."""
        chunk = min(self.columns, 1 << (width - 1).bit_length())
        chunks = -(-width // chunk)
        uneven = chunk * chunks != width
        return {"ROWS": self.live, "TOKENS": self.tokens, "CHUNK": chunk, "CHUNKS": chunks, "UNEVEN": uneven}


@dataclass(frozen=True)
class FewTile:
    """Sizes of a program on tensor cores.

    live: rows of W that it owns. rows: those of the tensor core's tile. tokens: rows of x, padded. warps: slices of K.
    ahead, x_ahead: steps of weights and of x that a warp asks for before it multiplies the first. is_weight_first: W is
    the left operand, whose tile has 16 rows; else x is.
    """

    live: int
    rows: int
    tokens: int
    warps: int
    ahead: int
    x_ahead: int
    is_weight_first: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the variant's name has."""
        return {"rows": self.live, "tokens": self.tokens, "warps": self.warps, "ahead": self.ahead}

    def warps_for(self, width: int) -> int:
        """Returns the warps of a program, a power of two: no more than there are steps."""
        steps = -(-width // STEP)
        return min(self.warps, 1 << (steps - 1).bit_length())

    def chunks_for(self, width: int) -> int:
        """Returns the steps of each warp."""
        return -(-width // (STEP * self.warps_for(width)))

    def takes(self, width: int) -> bool:
        """Returns True if the steps of a warp can be unrolled."""
        return self.chunks_for(width) <= MAX_CHUNKS

    def constants(self, width: int) -> dict[str, int | bool]:
        """Returns the kernel's constants for a weight of ``width`` columns."""
        warps, chunks = self.warps_for(width), self.chunks_for(width)
        return {
            "LIVE": self.live,
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "WARPS": warps,
            "STEP": STEP,
            "CHUNKS": chunks,
            "AHEAD": min(self.ahead, chunks),
            "X_AHEAD": min(self.x_ahead, chunks),
            "WEIGHT_FIRST": self.is_weight_first,
            "UNEVEN": warps * chunks * STEP != width,
        }


PlainTile = FewTile | FmaTile
TILES: tuple[tuple[int, int, PlainTile], ...] = (
    (1, 320, FmaTile(2, 1, 8, 4096)),
    (1, 1280, FmaTile(4, 1, 8, 4096)),
    (1, 2112, FmaTile(8, 1, 8, 2048)),
    (2, 320, FmaTile(2, 2, 8, 4096)),
    (2, 1280, FmaTile(4, 2, 8, 2048)),
    (8, 320, FewTile(4, 16, 8, 8, 16, 16)),
    (8, 1280, FewTile(8, 16, 8, 8, 16, 16)),
    (8, 2112, FewTile(16, 16, 8, 4, 8, 8)),
    (8, 3072, FewTile(10, 16, 8, 4, 8, 8)),
    (16, 320, FewTile(4, 8, 16, 8, 16, 8, is_weight_first=False)),
    (16, 2112, FewTile(8, 8, 16, 4, 16, 8, is_weight_first=False)),
)
"""(Most rows of x, most rows of W, tile): the first that holds both serves a call. What none holds, cuBLAS computes."""


@lru_cache(maxsize=1024)
def choose_tile(num_tokens: int, num_rows: int, width: int) -> PlainTile | None:
    """Chooses the tile of a call; ``None`` where cuBLAS is as fast, or K too long."""
    for most_tokens, most_rows, tile in TILES:
        if num_tokens <= most_tokens and num_rows <= most_rows and tile.takes(width):
            return tile
    return None
