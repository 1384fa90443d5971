"""Keys of FP8 pages as BF16 rows, in Triton: what a peer that reads BF16 alone needs done before it.

The peer's own users run a kernel of their engine for it, which is not in the peer's library. This one reads and writes
each byte once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ownpath.kernels.attend.triton_attend import load_page_keys

HEAD_DIM = tl.constexpr(512)
HALF = tl.constexpr(256)
KEY_DATA = tl.constexpr(576)
KEY_ALL = tl.constexpr(584)
KEYS = 4
"""Of a program."""


def bf16_keys(pages: torch.Tensor, rows: torch.Tensor, per_block: int, out: torch.Tensor) -> None:
    """Writes the pages' rows as BF16. Shapes: pages uint8 [blocks, per_block * 584], rows int32 [C], out [C, 512]."""
    bits = per_block.bit_length() - 1
    _bf16_keys[(triton.cdiv(len(rows), KEYS),)](pages, rows, out, len(rows), bits, KEYS, num_warps=4)


def _jit(kernel: Any) -> Any:
    return triton.jit(kernel)


@_jit
def _bf16_keys(pages_ptr, rows_ptr, out_ptr, count, BLOCK_BITS: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    j = tl.program_id(0) * K + tl.arange(0, K)
    valid = j < count
    row = tl.load(rows_ptr + j, mask=valid, other=0)
    start = (row >> BLOCK_BITS).to(tl.int64) * (KEY_ALL << BLOCK_BITS)
    place = row & ((1 << BLOCK_BITS) - 1)
    at = pages_ptr + (start + place * KEY_DATA)
    scale_at = pages_ptr + (start + (KEY_DATA << BLOCK_BITS) + place * (KEY_ALL - KEY_DATA))
    c = tl.arange(0, HALF)
    out = out_ptr + j.to(tl.int64)[:, None] * HEAD_DIM + c[None, :]
    tl.store(out, load_page_keys(at, scale_at, valid, 0), mask=valid[:, None])
    tl.store(out + HALF, load_page_keys(at, scale_at, valid, HALF), mask=valid[:, None])
