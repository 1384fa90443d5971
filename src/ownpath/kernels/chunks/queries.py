"""Gluon functions of queries and results in attention over chunks on Hopper: in, normed, rotated; out, rotated back.

The bringing warps copy a row's queries to shared memory as they are, as soon as the last product of the row before has
read that row's. The multiplying warps norm and rotate them there. Results go from registers to memory.

Legend: N heads at a time, H channels, R rotary channels, F pairs of them.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ownpath.kernels.chunks.producer import PRODUCERS

LOG2E = tl.constexpr(1.4426950408889634)
N = tl.constexpr(64)
H = tl.constexpr(512)
R = tl.constexpr(64)
F = tl.constexpr(32)
COPY = tl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
ROTARY = tl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SCORES = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
SUMS = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
STORE = tl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 256]],
        [],
        [64, 512],
    )
)
"""The rows and channels of each warp in SUMS, so that 4 threads exchange what makes 16 bytes a thread."""
SHARED = tl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PAIRS = tl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0]))
ANGLES = tl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def rotate(rotary, cos, sin, LAYOUT: tl.constexpr):
    """Rotates normed queries' last channels, rounded again. cos, sin: shared [2, F]."""
    even, odd = gl.split(gl.reshape(rotary.load(LAYOUT).to(gl.float32), (N, F, 2)))
    OF_EVEN: tl.constexpr = even.type.layout
    c, s = cos.slice(1, 1, dim=0).load(OF_EVEN), sin.slice(1, 1, dim=0).load(OF_EVEN)
    turned = gl.join(even * c - odd * s, even * s + odd * c)
    rotary.store(gl.convert_layout(gl.reshape(turned, (N, R)).to(gl.bfloat16), LAYOUT))


@gluon.jit
def norm_queries(q_shared, cos, sin, eps, STEPWISE: tl.constexpr):
    """Norms each head's query in shared memory and rotates its last channels, both rounded. cos, sin: shared [2, F]."""
    x = q_shared.load(COPY).to(gl.float32)
    if STEPWISE:
        squares = gl.sum((x * x).to(gl.bfloat16).to(gl.float32), axis=1)
        mean = (squares / H).to(gl.bfloat16).to(gl.float32)
        factor = gl.rsqrt((mean + eps).to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16).to(gl.float32)
    else:
        factor = gl.rsqrt(gl.sum(x * x, axis=1) / H + eps)
    q_shared.store((x * factor[:, None]).to(gl.bfloat16))
    gl.thread_barrier()
    rotate(q_shared.slice(H - R, R, dim=1), cos, sin, ROTARY)


@gluon.jit
def turn_back(o, cos, sin):
    """Rotates the last channels of float32 [N, H] back, in pairs. cos, sin: shared [2, F], of which the first half
    turns by nothing: each warpgroup treats the last 64 channels of its own half."""
    eighths = gl.permute(gl.reshape(o, (N, 2, 2, 2, R)), (0, 1, 3, 4, 2))
    first, second = gl.split(eighths)
    third, last = gl.split(gl.permute(second, (0, 1, 3, 2)))
    even, odd = gl.split(gl.reshape(last, (N, 2, F, 2)))
    OF_PAIRS: tl.constexpr = gl.SliceLayout(0, even.type.layout)
    c, s = gl.expand_dims(cos.load(OF_PAIRS), 0), gl.expand_dims(sin.load(OF_PAIRS), 0)
    turned = gl.reshape(gl.join(even * c + odd * s, odd * c - even * s), (N, 2, R))
    # The layouts are the same, written in two ways.
    second = gl.permute(gl.join(third, gl.convert_layout(turned, third.type.layout)), (0, 1, 3, 2))
    second = gl.convert_layout(second, first.type.layout)
    return gl.reshape(gl.permute(gl.join(first, second), (0, 1, 4, 2, 3)), (N, H))


@gluon.jit
def store_row(o, total, largest, sink, cos, sin, t, first_head, num_heads, out_ptr):
    """Divides a row's sums over values by those of weights and its sink, rotates back, rounds and stores."""
    factor = 1.0 / (total + gl.exp2(sink - largest))
    o = turn_back(o * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None], cos, sin)
    n, c = first_head + gl.arange(0, N, gl.SliceLayout(1, STORE)), gl.arange(0, H, gl.SliceLayout(0, STORE))
    at_out = out_ptr + (t.to(gl.int64) * num_heads + n)[:, None] * H + c[None, :]
    gl.store(at_out, gl.convert_layout(o.to(gl.bfloat16), STORE), mask=(n < num_heads)[:, None])


@gluon.jit
def load_sink(sink_ptr, first_head, num_heads):
    """Loads the sinks of 64 heads, in powers of two."""
    head = first_head + gl.arange(0, N, gl.SliceLayout(1, SCORES))
    return gl.load(sink_ptr + head, mask=head < num_heads, other=0.0) * LOG2E


@gluon.jit
def fill_angles(angles):
    """Writes a turn by nothing, which stays in the first half."""
    for i in gl.static_range(4):
        angles.index(i).store(gl.full([2, F], 1.0 - i % 2, gl.float32, PAIRS))


@gluon.jit
def fetch_queries(q_row, head_stride, left):
    """Asks for a later row's queries, to be in the L2 cache when they are loaded."""
    LINES: tl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [PRODUCERS, 1], [1, 0])
    n = gl.arange(0, N, gl.SliceLayout(1, LINES))
    line = gl.arange(0, 8, gl.SliceLayout(0, LINES))
    at = q_row + gl.minimum(n, left - 1)[:, None] * head_stride + line[None, :] * 64
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def copy_queries(q_row, head_stride, left, cos_row, sin_row, q_shared, q_full, q_empty, angles, q_phase):
    """Brings a row's queries as they are, zeros for heads that are not there, and its angles."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [PRODUCERS, 1], [1, 0])
    ANGLE: tl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [PRODUCERS, 1], [1, 0])
    f = gl.arange(0, F, gl.SliceLayout(0, ANGLE))[None, :]
    cos, sin = gl.load(cos_row + f), gl.load(sin_row + f)
    n, c = gl.arange(0, N, gl.SliceLayout(1, LAYOUT)), gl.arange(0, H, gl.SliceLayout(0, LAYOUT))
    mbarrier.wait(q_empty, q_phase ^ 1)
    # Rows' places are not kept over the loop over rows, for which there are no registers.
    stride = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [head_stride // 8 + n * 0], dtype=gl.int32, is_pure=False, pack=1
    )
    at = q_row + (n * stride * 8)[:, None] + c[None, :]
    async_copy.async_copy_global_to_shared(q_shared, at, mask=(n < left)[:, None])
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    angles.index(2 * q_phase).slice(1, 1, dim=0).store(cos)
    angles.index(2 * q_phase + 1).slice(1, 1, dim=0).store(sin)
    gl.thread_barrier()
    mbarrier.arrive(q_full, count=1)
