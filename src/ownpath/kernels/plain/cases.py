"""V4-Flash's unquantised matrices: rows, columns, and whether sums are kept in float32."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PlainCase:
    """One bfloat16 weight [num_rows, width] and the numbers of tokens that it is multiplied with."""

    label: str
    num_rows: int
    width: int
    is_wide: bool
    tokens: tuple[int, ...] = (1, 2, 8, 16, 17, 32, 64, 1024)


CASES = (
    PlainCase("gate", 256, 4096, is_wide=True),
    PlainCase("compressor", 2048, 4096, is_wide=True),
    PlainCase("HCA compressor", 1024, 4096, is_wide=True),
    PlainCase("both compressors", 2624, 4096, is_wide=True),
    PlainCase("indexer weights", 64, 4096, is_wide=False),
    PlainCase("head", 129280, 4096, is_wide=True, tokens=(1, 16, 64)),
)
