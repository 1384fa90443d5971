"""The choice of the kernel that selects, by the number of rows and the longest possible one. Needs no DSL."""

from functools import lru_cache
from typing import NamedTuple

from ownpath.kernels.scores.types import EntryPages
from ownpath.kernels.select.config_sm90 import SelectConfig

LONG_FROM = 4097
"""Scores of the longest possible row from which a cluster selects. At 2,048 one program of Triton's is faster."""
ANY = 1 << 31
PAGES = frozenset({32, 64, 128})
"""Entries of a block that the kernel takes."""


class SelectShape(NamedTuple):
    """A kernel, and the most rows for which it is the fastest. cluster: CTAs; keys: scores of a thread."""

    most_rows: int
    cluster: int
    threads: int
    keys: int


TIERS = (
    (SelectShape(16, 4, 512, 4), SelectShape(66, 2, 512, 8), SelectShape(ANY, 1, 1024, 8)),
    (
        SelectShape(4, 8, 512, 8),
        SelectShape(16, 4, 1024, 8),
        SelectShape(66, 2, 1024, 16),
        SelectShape(ANY, 1, 1024, 32),
    ),
    (SelectShape(ANY, 8, 1024, 32),),
)
"""For rows of up to 8,192 scores, 32,768 and 262,144; the fewest rows first.

Measured on an H200 at 1, 8, 32 and 128 rows. In between: 66 clusters of two find room at once; of four, whose CTAs have
an SM each, 32 do not.
"""


def choose_config(num_rows: int, num_blocks: int, pages: EntryPages) -> SelectConfig | None:
    """Returns the kernel for rows of up to ``num_blocks``; ``None`` for short rows, and for what no cluster takes."""
    num_scores = num_blocks * pages.per_block
    if num_scores < LONG_FROM or pages.per_block not in PAGES:
        return None
    for tier in TIERS:
        shape = next(shape for shape in tier if num_rows <= shape.most_rows)
        config = _config(shape, pages)
        if num_scores <= config.most_scores:
            return config
    return None


@lru_cache(maxsize=16)
def reachable_configs(pages: EntryPages) -> tuple[SelectConfig, ...]:
    """Returns every kernel that a call may launch."""
    return tuple(_config(shape, pages) for tier in TIERS for shape in tier) if pages.per_block in PAGES else ()


def _config(shape: SelectShape, pages: EntryPages) -> SelectConfig:
    return SelectConfig(shape.threads, shape.keys, shape.cluster, *pages)
