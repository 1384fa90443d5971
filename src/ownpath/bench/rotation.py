"""How many calls on different weights one measurement goes round, so that each finds the caches cold."""

COLD_BYTES = 128_000_000
"""More than twice the L2 cache of a Hopper GPU (50 to 60 MB): after this much, nothing of the first call is left."""


def num_calls(bytes_per_call: float, least: int = 4) -> int:
    """Calls in one round: enough that together they read COLD_BYTES, and at least ``least``."""
    return max(least, -int(-COLD_BYTES // bytes_per_call))
