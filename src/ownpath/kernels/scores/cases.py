"""Shapes at which the bench times the indexer's scores."""

from dataclasses import dataclass

from ownpath.formats import KeyFormat


@dataclass(frozen=True)
class ScoresCase:
    """Rows of requests at the end of ``context`` tokens. keys: their format. tiny: small enough for a CPU."""

    label: str
    num_heads: int
    context: int
    keys: KeyFormat
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    tiny: bool = False
    bench: bool = True


def _forms(label: str, num_heads: int, context: int) -> tuple[ScoresCase, ...]:
    return tuple(ScoresCase(f"{label} {keys}", num_heads, context, keys) for keys in KeyFormat)


CASES = (
    *_forms("flash 8k", 64, 8192),
    *_forms("flash 128k", 64, 131072),
    *_forms("embedded 8k", 4, 8192),
    *(ScoresCase(f"embedded {keys}", 4, 512, keys, (1, 3), tiny=True, bench=False) for keys in KeyFormat),
)
"""V4-Flash's and V4-Pro's index heads, and the embedded model's."""
