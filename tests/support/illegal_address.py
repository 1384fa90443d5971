"""A Triton kernel that writes where nothing is."""

import triton
import triton.language as tl

_FAR = tl.constexpr(1 << 44)


@triton.jit
def write_far_away(out):
    """Writes 64 TiB behind a float32 tensor's first element: an illegal address, which ends all work of the process."""
    tl.store(out + _FAR, 1.0)
