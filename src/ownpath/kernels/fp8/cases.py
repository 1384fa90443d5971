"""Test and bench cases of the FP8 linears: shapes, numbers of rows and amplitudes."""

from dataclasses import dataclass

NUM_ROWS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127, 128, 129, 255, 1024, 2048, 4096)
AMPLITUDES = (1e-4, 1.0, 1e4)


@dataclass(frozen=True)
class Fp8Case:
    """Rows of each shard, columns, and the kind of scales: small or wide powers of two, or any float32."""

    name: str
    shard_rows: tuple[int, ...]
    width: int
    scales: str


CASES = (
    Fp8Case("fused", (1024, 512), 4096, "e8m0"),
    Fp8Case("rows", (4096,), 1024, "e8m0"),
    Fp8Case("float32-scales", (1024, 512), 2048, "float32"),
    Fp8Case("wide-scales", (256,), 512, "e8m0-wide"),
    Fp8Case("partial-blocks", (576, 200), 384, "e8m0"),
    Fp8Case("ragged", (577, 203), 600, "float32"),
    Fp8Case("tiny", (8,), 128, "e8m0"),
)
