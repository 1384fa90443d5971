"""Shapes at which tests run attention over chunks and the bench times it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkCase:
    """Requests whose chunks end at, or a little before, ``context`` tokens.

    ratio: 0, 4 or 128. topk: most entries of a selection, at ratio 4. rows: of each request. fp8: entries in FP8 pages.
    tiny: small enough to be interpreted on a CPU. bench: shown in the bench's table.
    """

    label: str
    num_heads: int
    ratio: int
    context: int
    topk: int = 0
    rows: tuple[int, ...] = (1024,)
    fp8: bool = False
    tiny: bool = False
    bench: bool = False


def _both(
    label: str, num_heads: int, ratio: int, context: int, topk: int, rows: tuple[int, ...], *, tiny: bool = False
) -> tuple[ChunkCase, ...]:
    """Returns a case with BF16 entries and one with FP8 pages."""
    return tuple(
        ChunkCase(f"{label} {kind}", num_heads, ratio, context, topk, rows, fp8=fp8, tiny=tiny, bench=not tiny)
        for fp8, kind in ((False, "bf16"), (True, "fp8"))
    )


CASES = (
    ChunkCase("embedded SWA", 4, 0, 300, rows=(2, 1), tiny=True),
    *_both("embedded CSA", 4, 4, 700, 128, rows=(1, 2), tiny=True),
    *_both("embedded HCA", 4, 128, 9000, 0, rows=(2, 1), tiny=True),
    ChunkCase("flash SWA", 64, 0, 200, rows=(1,), tiny=True),
    *_both("flash CSA", 64, 4, 700, 128, rows=(1,), tiny=True),
    *_both("flash HCA", 64, 128, 9000, 0, rows=(1,), tiny=True),
    ChunkCase("pro SWA", 128, 0, 140, rows=(1,), tiny=True),
    ChunkCase("flash SWA 1024", 64, 0, 8192, rows=(1024,), bench=True),
    ChunkCase("flash SWA 4096", 64, 0, 8192, rows=(4096,), bench=True),
    *_both("flash CSA 1024", 64, 4, 8192, 512, rows=(1024,)),
    *_both("flash CSA 4096", 64, 4, 8192, 512, rows=(4096,)),
    *_both("flash HCA 1024", 64, 128, 8192, 0, rows=(1024,)),
    *_both("flash HCA 128k", 64, 128, 131072, 0, rows=(1024,)),
    *_both("pro CSA 1024", 128, 4, 8192, 1024, rows=(1024,)),
    ChunkCase("flash CSA, mixed", 64, 4, 3000, 512, rows=(1, 300, 1, 77, 129)),
    ChunkCase("flash HCA, mixed", 64, 128, 40000, 0, rows=(1, 300, 1, 77, 129)),
    ChunkCase("flash CSA, mixed, fp8", 64, 4, 3000, 512, rows=(1, 300, 1, 77), fp8=True),
    ChunkCase("embedded CSA, mixed", 4, 4, 3000, 128, rows=(1, 300, 1, 77)),
    ChunkCase("flash SWA, mixed", 64, 0, 3000, 0, rows=(1, 300, 1, 77, 129)),
)
