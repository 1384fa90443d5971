"""``wo_a`` with FP8 weights on Hopper: W8A16 per group of rows, the rotation of its inputs undone on the way.

How it works. The product is that of ``fp8/w8a16_sm90.py``: the same blocks of weights, decode, tensor-core loops and
cluster sums. Two things differ. The tokens of a CTA are the columns of its rows' group, which only moves the copy
engine's boxes. And the last 64 channels of each head are rotated back before they are multiplied: their box lands at a
barrier of its own, two warps that have nothing else to do rotate it in shared memory, and their arrival completes the
stage. Multiplying threads see rotated tokens in the order and swizzle that they always read.

Why it is fast. Weights are read once and in FP8, half the bytes of a weight decoded when loaded; nothing else is added
to the loop that reads them. A box is rotated while the stages before it are multiplied.

Roofline. 1 byte per weight at 4.41 TB/s for few tokens.
Limits: sm_90a; head dim and rows of a group are multiples of 128; up to 32 angles, a multiple of 4.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Pipeline, Stages
from ownpath.kernels.dsl.ptx import Site, Value
from ownpath.kernels.dsl.warpgroup import Operands, Thread
from ownpath.kernels.fp8.config import BLOCK_K, CHUNK_K, WG
from ownpath.kernels.fp8.output_sm90 import Output
from ownpath.kernels.fp8.w8a16_sm90 import W8A16, CtaTile
from ownpath.kernels.grouped.config import MAX_ANGLES, REGISTERS, ROTATING_WARPS, GroupedFp8Config

ROTATING_THREADS = 32 * ROTATING_WARPS
BOX_ROW_BYTES = 2 * CHUNK_K
UNITS = BOX_ROW_BYTES // 16
"""16-byte units of a token's channels in a box; a thread rotates one at a time."""


@dataclass(frozen=True)
class Heads:
    """The heads' sizes, and where their boxes land. row_blocks: of a group; k_blocks: of a head."""

    row_blocks: Int32
    k_blocks: Int32
    landed: Pipeline


@dataclass(frozen=True)
class Angles:
    """cos and sin of each token, float32 [num_tokens, count]."""

    cos: cute.Pointer
    sin: cute.Pointer
    count: Int32
    num_tokens: Int32


class GroupedW8A16(W8A16):
    """Builds the kernel of one ``GroupedFp8Config``."""

    def __init__(self, config: GroupedFp8Config) -> None:
        super().__init__(config)
        self.registers = REGISTERS[config.per_sm, config.consumers]

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        num_groups: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
        head_blocks: Int32,
        num_angles: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        width = num_k_blocks * BLOCK_K
        tokens = cute.make_tensor(x, cute.make_layout((num_tokens, width), stride=(width, 1)))
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tokens, box, (8, CHUNK_K))
        self.kernel(
            atom, blocks, scales, row_table, cos, sin, out, num_tokens, num_groups, num_row_blocks, num_k_blocks,
            head_blocks, num_angles,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster_k, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        cos: cute.Pointer,
        sin: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        num_groups: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
        head_blocks: Int32,
        num_angles: Int32,
    ) -> None:
        """Sets the rings up, then loads, rotates or multiplies, by warp. num_row_blocks: of all groups."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages = self.allocate()
        inbox = self.open_inbox(stages, thread, cta)
        heads = Heads(num_row_blocks // num_groups, head_blocks, Pipeline.allocate(cfg.num_stages))
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            stages.pipeline.init(2 + ROTATING_WARPS, 4 * cfg.consumers)
            heads.landed.init(1, 1)
        cute.arch.sync_threads()
        self.announce()
        cute.arch.griddepcontrol_launch_dependents()
        tile = self.tile(cta, num_row_blocks, num_k_blocks)
        if warp_group == cfg.consumers:
            cute.arch.setmaxregister_decrease(self.registers[0])
            worker = thread - cfg.consumers * WG
            if worker == 0:
                self.load_weights(blocks, scales, stages, tile, num_row_blocks, num_k_blocks)
            if worker == 32:
                self.load_groups(ptx.descriptor_address(tma_x), stages, tile, heads, num_k_blocks)
            if worker >= WG - ROTATING_THREADS:
                angles = Angles(cos, sin, num_angles, num_tokens)
                self.rotate(worker - (WG - ROTATING_THREADS), stages, tile, heads, angles)
        else:
            cute.arch.setmaxregister_increase(self.registers[1])
            operands = Operands(Thread(thread % WG, warp_group), stages, tile.k_iters)
            ld_out = num_row_blocks * 64
            self.consume(tile, operands, Output(out, row_table, num_tokens, ld_out, num_row_blocks), inbox)

    @cute.jit
    def load_groups(self, descriptor: Int64, stages: Stages, tile: CtaTile, heads: Heads, num_k_blocks: Int32) -> None:
        """Loads each stage's tokens as two boxes. The box at the end of a head lands where it is rotated; for the
        others, this thread arrives in the place of those who rotate. One thread."""
        cfg = self.cfg
        cute.arch.griddepcontrol_wait()
        ring = stages.pipeline.producer()
        first = (tile.block // heads.row_blocks) * num_k_blocks + tile.k_start
        head = tile.k_start // heads.k_blocks
        box_bytes = cfg.num_n * BOX_ROW_BYTES
        for k in cutlass.range(tile.k_iters, unroll=1):
            ring.acquire()
            target = stages.tokens + ring.slot * (2 * cfg.num_n * CHUNK_K)
            column = (first + k) * BLOCK_K
            block = tile.k_start + k
            if block % heads.k_blocks == heads.k_blocks - 1:
                landed = heads.landed.full + (block // heads.k_blocks - head) % cfg.num_stages
                ring.commit(box_bytes)
                cute.arch.mbarrier_arrive_and_expect_tx(landed, box_bytes)
                ptx.load_box(target, descriptor, column, tile.token0, ring.full)
                ptx.load_box(target + cfg.num_n * CHUNK_K, descriptor, column + CHUNK_K, tile.token0, landed)
            else:
                ring.commit(2 * box_bytes)
                for _ in cutlass.range_constexpr(ROTATING_WARPS):
                    cute.arch.mbarrier_arrive(ring.full)
                ptx.load_box(target, descriptor, column, tile.token0, ring.full)
                ptx.load_box(target + cfg.num_n * CHUNK_K, descriptor, column + CHUNK_K, tile.token0, ring.full)
            ring.advance()

    @cute.jit
    def rotate(self, worker: Int32, stages: Stages, tile: CtaTile, heads: Heads, angles: Angles) -> None:
        """Rotates the box at the end of each head back, in place. Eight threads share a token."""
        cfg = self.cfg
        cute.arch.griddepcontrol_wait()
        head = tile.k_start // heads.k_blocks
        num_heads = (tile.k_start + tile.k_iters) // heads.k_blocks - head
        num_valid = cutlass.min(angles.num_tokens - tile.token0, cfg.num_n)
        unit, first = worker % UNITS, worker // UNITS
        angle = 4 * unit - (MAX_ANGLES - angles.count)
        for idx in cutlass.range(num_heads, unroll=1):
            k = (head + idx + 1) * heads.k_blocks - 1 - tile.k_start
            slot = k % cfg.num_stages
            box = stages.tokens.toint() + (2 * slot + 1) * (cfg.num_n * BOX_ROW_BYTES)
            heads.landed.consumer_at(idx).wait()
            if angle >= 0:
                for token in cutlass.range(first, num_valid, ROTATING_THREADS // UNITS, unroll=1):
                    at = Int64(tile.token0 + token) * angles.count + angle
                    unit_at = box + token * BOX_ROW_BYTES + (unit ^ (token % 8)) * 16
                    for half in cutlass.range_constexpr(2):
                        c, s = (load_global_vec2((side + at + 2 * half).toint()) for side in (angles.cos, angles.sin))
                        words = ptx.load_shared_vec2(unit_at + 8 * half)
                        turned = [turn_back(word, c[i], s[i]) for i, word in enumerate(words)]
                        store_shared_vec2(unit_at + 8 * half, turned)
            # The tensor cores read through another path to shared memory than these stores took.
            fence_shared()
            cute.arch.sync_warp()
            if worker % 32 == 0:
                cute.arch.mbarrier_arrive(stages.pipeline.full + slot)


def turn_back(word: Uint32, cos: Float32, sin: Float32) -> Uint32:
    """Rotates a pair of BF16 channels by the negative angle, rounded once."""
    even, odd = ptx.widen_bf16(word, high=False), ptx.widen_bf16(word, high=True)
    return ptx.pack_bf16x2(even * cos + odd * sin, odd * cos - even * sin)


@dsl_user_op
def load_global_vec2(address: Value, *, loc: Site = None, ip: Site = None) -> tuple[Float32, Float32]:
    """Loads two float32 of global memory at an aligned byte address."""
    struct = llvm.StructType.get_literal([T.f32()] * 2)
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    loaded = ptx.asm("ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", struct, operands, False, loc, ip)
    first, second = (Float32(llvm.extractvalue(T.f32(), loaded, [idx], loc=loc, ip=ip)) for idx in range(2))
    return first, second


@dsl_user_op
def store_shared_vec2(address: Value, words: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Stores two words to shared memory at an aligned byte address."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip)] + [Uint32(word).ir_value(loc=loc, ip=ip) for word in words]
    ptx.asm("st.shared.v2.b32 [$0], {$1, $2};", "r,r,r", None, operands, False, loc, ip)


@dsl_user_op
def fence_shared(*, loc: Site = None, ip: Site = None) -> None:
    """Makes this thread's writes to shared memory visible to the copy engine and the tensor cores."""
    ptx.asm("fence.proxy.async.shared::cta;", "", None, [], False, loc, ip)


def compile_grouped(config: GroupedFp8Config) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        GroupedW8A16(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=8),
        ptr(Float32, 1024, space, assumed_align=16),
        ptr(Float32, 1024, space, assumed_align=16),
        ptr(BFloat16, 1024, space, assumed_align=4),
        Int32(8), one, one, one, one, Int32(32), one,
    )  # fmt: skip
