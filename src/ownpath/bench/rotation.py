"""The number of calls on different weights in one measurement, so that each call finds the caches cold."""

COLD_BYTES = 128_000_000
"""Over twice the L2 cache of a Hopper GPU (50 to 60 MB): reading this much evicts everything of the first call."""


def num_calls(bytes_per_call: float, least: int = 4) -> int:
    """Returns the calls of a round: enough to read COLD_BYTES together, and at least ``least``."""
    return max(least, -int(-COLD_BYTES // bytes_per_call))
