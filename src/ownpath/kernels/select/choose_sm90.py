"""The choice of the kernel that selects, by the number of rows and the longest possible one. Needs no DSL."""

from functools import lru_cache

from ownpath.kernels.scores.types import EntryPages
from ownpath.kernels.select.config_sm90 import SelectConfig

LONG_FROM = 8193
"""Scores of the longest possible row from which a cluster is faster than one program of Triton's."""
SHAPES = ((8, 512, 8), (4, 512, 16), (2, 512, 32), (8, 1024, 32))
"""CTAs, threads of each and scores of a thread: up to 32,768 scores a row, then up to 262,144."""
MOST_CTAS = 264
"""That an H200's 132 SMs hold at once, two each."""
PAGES = frozenset({32, 64, 128})


def choose_config(num_rows: int, num_blocks: int, pages: EntryPages) -> SelectConfig | None:
    """Returns the kernel for rows of up to ``num_blocks``; ``None`` for short rows, and for what no cluster takes."""
    num_scores = num_blocks * pages.per_block
    if num_scores < LONG_FROM or pages.per_block not in PAGES:
        return None
    fitting = [config for config in reachable_configs(pages) if num_scores <= config.most_scores]
    at_once = (config for config in fitting if num_rows * config.cluster <= MOST_CTAS)
    return next(at_once, min(fitting, key=lambda config: config.cluster, default=None))


@lru_cache(maxsize=16)
def reachable_configs(pages: EntryPages) -> tuple[SelectConfig, ...]:
    """Returns every kernel that a call may launch."""
    if pages.per_block not in PAGES:
        return ()
    return tuple(SelectConfig(threads, keys, cluster, *pages) for cluster, threads, keys in SHAPES)
