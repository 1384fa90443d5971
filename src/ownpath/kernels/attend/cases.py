"""Shapes at which tests run decode attention and the bench times it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttendCase:
    """Rows of requests with up to ``context`` tokens.

    ratio: 0, 4 or 128. topk: most entries of a selection, at ratio 4. tokens: numbers of rows. fp8: FP8 pages.
    is_full: every row is at the last position; otherwise positions are mixed. tiny: small enough to be interpreted on
    a CPU. bench: shown in the bench's table.
    """

    label: str
    num_heads: int
    ratio: int
    context: int
    topk: int = 0
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    fp8: bool = False
    is_full: bool = False
    tiny: bool = False
    bench: bool = False


def _bench(label: str, num_heads: int, ratio: int, context: int, topk: int = 0) -> tuple[AttendCase, ...]:
    tokens = (1, 8, 64) if num_heads == 4 else (1, 8, 32, 128)
    return tuple(
        AttendCase(f"{label} {kind}", num_heads, ratio, context, topk, tokens, fp8, is_full=True, bench=True)
        for fp8, kind in ((False, "bf16"), (True, "fp8"))
    )


def _tiny(label: str, num_heads: int, ratio: int, context: int, topk: int, num_rows: int) -> tuple[AttendCase, ...]:
    return tuple(
        AttendCase(f"{label} {kind}", num_heads, ratio, context, topk, (num_rows,), fp8, tiny=True)
        for fp8, kind in ((False, "bf16"), (True, "fp8"))
    )


CASES = (
    *_tiny("embedded SWA", 4, 0, 300, 0, 9),
    *_tiny("embedded CSA", 4, 4, 700, 128, 4),
    *_tiny("embedded HCA", 4, 128, 9000, 0, 4),
    *_tiny("flash CSA", 64, 4, 700, 128, 2),
    *_tiny("flash HCA", 64, 128, 9000, 0, 1),
    *_tiny("pro SWA", 128, 0, 300, 0, 2),
    *_bench("flash SWA", 64, 0, 8192),
    *_bench("flash CSA 8k", 64, 4, 8192, 512),
    *_bench("flash HCA 8k", 64, 128, 8192),
    *_bench("flash HCA 128k", 64, 128, 131072),
    *_bench("pro SWA", 128, 0, 8192),
    *_bench("pro CSA 8k", 128, 4, 8192, 1024),
    *_bench("pro HCA 128k", 128, 128, 131072),
    *_bench("embedded CSA", 4, 4, 1024, 128),
    *_bench("embedded HCA", 4, 128, 1024),
    AttendCase("flash CSA, mixed rows", 64, 4, 3000, 512, (1, 7, 33, 256)),
    AttendCase("flash HCA, mixed rows", 64, 128, 40000, 0, (1, 7, 33, 256)),
    AttendCase("flash CSA, mixed rows, fp8", 64, 4, 3000, 512, (1, 7, 33), fp8=True),
    AttendCase("flash HCA, mixed rows, fp8", 64, 128, 40000, 0, (1, 7, 33), fp8=True),
)
