"""Gluon functions of queries and results in attention over chunks on Hopper, in halves of the channels.

As in ``queries``, for warps of three kinds: the bringing warps copy a row's queries as they are, 16 heads at a time;
the scoring warps norm and rotate what is there while more is on its way; the summing warps store results.

Legend: N heads at a time, H channels, R rotary channels, F pairs of them.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ownpath.kernels.chunks.producer import HALF, PRODUCERS
from ownpath.kernels.chunks.queries import F, H, N, R, rotate

HEADS = tl.constexpr(16)
"""Heads that come and are normed together."""
NORM = tl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
HALF_SUMS = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16]))
HALF_STORE = tl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 128]],
        [],
        [64, 256],
    )
)
"""The rows and channels of each warp in HALF_SUMS, so that 4 threads exchange what makes 16 bytes a thread."""


@gluon.jit
def copy_halves(q_row, head_stride, left, cos_row, sin_row, q_low, q_high, q_full, q_empty, angles, q_phase):
    """Brings a row's queries as they are, zeros for heads that are not there, and its angles."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    ANGLE: tl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [PRODUCERS, 1], [1, 0])
    f = gl.arange(0, F, gl.SliceLayout(0, ANGLE))[None, :]
    cos, sin = gl.load(cos_row + f), gl.load(sin_row + f)
    angles.index(2 * q_phase).slice(1, 1, dim=0).store(cos)
    angles.index(2 * q_phase + 1).slice(1, 1, dim=0).store(sin)
    gl.thread_barrier()
    n, c = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT)), gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    mbarrier.wait(q_empty, q_phase ^ 1)
    # Rows' places are not kept over the loop over rows, for which there are no registers.
    stride = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [head_stride // 8 + n * 0], dtype=gl.int32, is_pure=False, pack=1
    )
    for i in gl.static_range(N // HEADS):
        at = q_row + ((n + i * HEADS) * stride * 8)[:, None] + c[None, :]
        there = (n + i * HEADS < left)[:, None]
        async_copy.async_copy_global_to_shared(q_low.slice(i * HEADS, HEADS), at, mask=there)
        async_copy.async_copy_global_to_shared(q_high.slice(i * HEADS, HEADS), at + HALF, mask=there)
        async_copy.mbarrier_arrive(q_full.index(i), increment_count=False)
    mbarrier.arrive(q_full.index(N // HEADS - 1), count=1)


@gluon.jit
def _norm_factor(x_low, x_high, eps, STEPWISE: tl.constexpr):
    """Returns what norms queries of which halves of the channels are given."""
    if STEPWISE:
        squares = gl.sum((x_low * x_low).to(gl.bfloat16).to(gl.float32), axis=1)
        squares += gl.sum((x_high * x_high).to(gl.bfloat16).to(gl.float32), axis=1)
        mean = (squares / H).to(gl.bfloat16).to(gl.float32)
        factor = gl.rsqrt((mean + eps).to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16).to(gl.float32)
    else:
        factor = gl.rsqrt((gl.sum(x_low * x_low, axis=1) + gl.sum(x_high * x_high, axis=1)) / H + eps)
    return factor


@gluon.jit
def norm_halves(q_low, q_high, q_full, phase, cos, sin, eps, STEPWISE: tl.constexpr):
    """Norms and rotates queries of which halves of the channels are in shared memory, by four warps, some heads at a
    time."""
    for i in gl.static_range(N // HEADS):
        mbarrier.wait(q_full.index(i), phase)
        low, high = q_low.slice(i * HEADS, HEADS), q_high.slice(i * HEADS, HEADS)
        x_low, x_high = low.load(NORM).to(gl.float32), high.load(NORM).to(gl.float32)
        factor = _norm_factor(x_low, x_high, eps, STEPWISE)
        low.store((x_low * factor[:, None]).to(gl.bfloat16))
        high.store((x_high * factor[:, None]).to(gl.bfloat16))
    gl.thread_barrier()
    rotate(q_high.slice(HALF - R, R, dim=1), cos, sin, NORM)


@gluon.jit
def _turn_back_from(o, cos_row, sin_row):
    """Rotates the last channels of float32 [N, HALF] back, in pairs: of each warpgroup's half the last 64, of which the
    first warpgroup's turn by nothing."""
    first, last = gl.split(gl.permute(gl.reshape(o, (N, 2, 2, R)), (0, 1, 3, 2)))
    even, odd = gl.split(gl.reshape(last, (N, 2, F, 2)))
    OF_PAIRS: tl.constexpr = gl.SliceLayout(0, even.type.layout)
    half = gl.arange(0, 2, gl.SliceLayout(1, OF_PAIRS))[:, None]
    at = half * 0 + gl.arange(0, F, gl.SliceLayout(0, OF_PAIRS))[None, :]
    c = gl.expand_dims(gl.load(cos_row + at, mask=(half == 1) & (at >= 0), other=1.0), 0)
    s = gl.expand_dims(gl.load(sin_row + at, mask=(half == 1) & (at >= 0), other=0.0), 0)
    turned = gl.reshape(gl.join(even * c + odd * s, odd * c - even * s), (N, 2, R))
    # The layouts are the same, written in two ways.
    turned = gl.convert_layout(turned, first.type.layout)
    return gl.reshape(gl.permute(gl.join(first, turned), (0, 1, 3, 2)), (N, HALF))


@gluon.jit
def _store_half(o, left, at_out):
    n, c = gl.arange(0, N, gl.SliceLayout(1, HALF_STORE)), gl.arange(0, HALF, gl.SliceLayout(0, HALF_STORE))
    gl.store(
        at_out + n[:, None] * H + c[None, :], gl.convert_layout(o.to(gl.bfloat16), HALF_STORE), mask=(n < left)[:, None]
    )


@gluon.jit
def store_halves(low, high, cos_row, sin_row, t, first_head, num_heads, out_ptr):
    """Rotates a row's result back, rounds and stores it."""
    at_out = out_ptr + (t.to(gl.int64) * num_heads + first_head) * H
    _store_half(low, num_heads - first_head, at_out)
    _store_half(_turn_back_from(high, cos_row, sin_row), num_heads - first_head, at_out + HALF)
