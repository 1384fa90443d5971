"""Memory for operands that the loader fills.

Host memory is not filled with a sentinel first: that took half of the loading time. Counting proves that it was written
instead (``targets``, ``load``): destinations tile each buffer, and each byte of each was copied once. Until then, large
buffers read as zeros. On an accelerator the sentinel costs a hundredth of loading and is kept: a copy that was queued
and never ran would leave NaN.
"""

import mmap
from contextlib import suppress
from math import prod

import torch

from ownpath.weights.operands import sentinel

_HUGE_PAGE_BYTES = 2 * 2**20
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates a buffer: in host memory of huge pages where the system has them, on an accelerator with a sentinel."""
    if device.type != "cpu":
        return sentinel(shape, dtype, device)
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE_BYTES or not _HAS_HUGE_PAGES:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: small ones then
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
