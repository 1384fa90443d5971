"""Shapes at which the bench times the indexer's scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoresCase:
    """Rows of requests at the end of ``context`` tokens. fp8: keys in FP8 pages. tiny: small enough for a CPU."""

    label: str
    num_heads: int
    context: int
    fp8: bool
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    tiny: bool = False
    bench: bool = True


def _forms(label: str, num_heads: int, context: int) -> tuple[ScoresCase, ...]:
    return tuple(
        ScoresCase(f"{label} {name}", num_heads, context, fp8) for fp8, name in ((False, "bf16"), (True, "fp8"))
    )


CASES = (
    *_forms("flash 8k", 64, 8192),
    *_forms("flash 128k", 64, 131072),
    *_forms("embedded 8k", 4, 8192),
    ScoresCase("embedded bf16", 4, 512, False, (1, 3), tiny=True, bench=False),
    ScoresCase("embedded fp8", 4, 512, True, (1, 3), tiny=True, bench=False),
)
"""V4-Flash's and V4-Pro's index heads, and the embedded model's."""
