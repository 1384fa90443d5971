"""Compile-time configurations of Hopper's selection among long rows. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

CHUNK = 128
"""Scores that a warp holds in four registers of each thread."""
MAX_CLUSTER, MAX_KEYS = 8, 32
"""CTAs of a row, and scores of a thread."""
NUM_BINS = 1024
MAX_CANDIDATES = 256
"""Of the k-th best score's bin: so many are compared with each other, more are counted again."""


@dataclass(frozen=True)
class SelectConfig:
    """One compiled selection.

    threads: of a CTA. keys: scores of a thread. cluster: CTAs that share a row. per_block: entries of a block. ratio:
    tokens of an entry. Errors: ValueError naming the field.
    """

    threads: int
    keys: int
    cluster: int
    per_block: int = 64
    ratio: int = 4
    compiler: ClassVar[str] = "select.select_sm90:compile_select"

    def __post_init__(self) -> None:
        if self.threads not in {256, 512, 1024}:
            raise ValueError(f"threads={self.threads}: 256, 512 or 1024")
        if self.keys not in {4, 8, 16, MAX_KEYS}:
            raise ValueError(f"keys={self.keys}: 4, 8, 16 or {MAX_KEYS}")
        if self.cluster not in {1, 2, 4, MAX_CLUSTER}:
            raise ValueError(f"cluster={self.cluster}: 1, 2, 4 or {MAX_CLUSTER}")
        if self.per_block not in {1 << bit for bit in range(2, 8)}:
            raise ValueError(f"per_block={self.per_block}: a power of two from 4 to {CHUNK}")

    @property
    def name(self) -> str:
        pages = f"p{self.per_block}_r{self.ratio}"
        return f"select_sm90_{self.threads}x{self.keys}_c{self.cluster}_{pages}"

    @property
    def most_scores(self) -> int:
        """Of a row."""
        return self.cluster * self.threads * self.keys

    @property
    def sources(self) -> tuple[str, ...]:
        names = ("select_sm90", "search_sm90", "write_sm90", "parts_sm90", "config_sm90", "ptx")
        return (*(f"select/{name}.py" for name in names), "dsl/ptx.py")

    @property
    def num_threads(self) -> int:
        return self.threads
