"""Shapes at which the bench times the selection."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectCase:
    """Rows that see ``context // 4`` scores and select ``topk``. tiny: small enough for a CPU."""

    label: str
    topk: int
    context: int
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    tiny: bool = False
    bench: bool = True


CASES = (
    SelectCase("flash 8k", 512, 8192),
    SelectCase("flash 128k", 512, 131072),
    SelectCase("pro 8k", 1024, 8192),
    SelectCase("pro 128k", 1024, 131072),
    SelectCase("embedded 8k", 128, 8192),
    SelectCase("embedded", 128, 1024, (1, 3), tiny=True, bench=False),
)
