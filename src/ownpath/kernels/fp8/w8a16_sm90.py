"""W8A16 on Hopper: E4M3 block weights times BF16 activations, for decode (up to 128 tokens a tile).

How it works. The product is taken transposed, y.T = W x.T: weight rows are the M of the tensor cores (64 to a block)
and tokens their N, so that one token costs 8 columns rather than 64 rows. A CTA owns ``num_m64`` blocks of 64 rows and
a share of K. One thread streams 8 KiB weight blocks into a ring of shared-memory stages by bulk copies; another brings
the tokens as TMA boxes of all rows by 64 columns, swizzled as the tensor cores read them. Consumer warpgroups read
their blocks with conflict-free 16-byte loads (``kernels.fp8.layout``), decode to BF16 in registers and multiply from
there: below 32 tokens by ``mma``, each warp its own 16 rows without waiting; from 32 by ``wgmma``, decoding one group
of steps while the tensor cores work on the other. CTAs that share rows and split K form a cluster, send each
other their float32 sums (``output_sm90``) and add them in the order of ranks: no workspace, and always the same bits.
The next kernel may start at once: its CTAs fetch weights while this one's finish, and wait before they read a token.

Decode. E4M3's sign, exponent and mantissa are moved into BF16's fields, which gives value * 2**-120, subnormals
included; one BF16 multiply by 2**120 makes it exact. Where every block scale is a power of two in range, that multiply
carries the scale as well (still exact) and the sums run over all of K. Otherwise sums are kept per 128 of K and enter
the float32 total through the scale.

Why it is fast. Per 8 weights and thread: 10 integer operations (half of them on the multiplier's pipe) and 4 BF16
multiplies. Nearly a CTA's whole share of the weights is in flight at once (up to 200 KiB per SM), and nothing but
weights, tokens and results passes through memory.

Roofline. 1 byte per weight at 4.41 TB/s up to M = 64, where tensor cores are at about half their rate; tokens beyond
128 go to further CTAs, which read the weights again from L2. docs/benchmarks.md has the measured rates.
Limits: sm_90a; K a multiple of 8; 16-byte aligned rows.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Pipeline, Stages
from ownpath.kernels.dsl.warpgroup import Operands, Thread, decoded_mma, shared_operand, wgmma
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import BLOCK_K, CHUNK_K, ENTRY_BYTES, MAX_K_BLOCKS, W8A16_REGISTERS, WG, W8A16Config
from ownpath.kernels.fp8.layout import BLOCK_BYTES
from ownpath.kernels.fp8.output_sm90 import ClusterSums, Output, RowBlock

Words = tuple[Uint32, Uint32, Uint32, Uint32]
"""16 bytes of shared memory."""


@dataclass(frozen=True)
class CtaTile:
    """A CTA's tile: row blocks from ``block`` on, tokens from ``token0`` on, ``k_iters`` blocks of K from ``k_start``
    on. rank: of the CTA in its cluster."""

    block: Int32
    token0: Int32
    k_start: Int32
    k_iters: Int32
    rank: Int32


class W8A16:
    """Builds the kernel of one ``W8A16Config``."""

    def __init__(self, config: W8A16Config) -> None:
        self.cfg = config
        self.per_wg = config.num_m64 // config.consumers
        self.registers = W8A16_REGISTERS[config.per_sm, config.consumers]
        self.group = 4 if self.per_wg == 1 else 2

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        width = num_k_blocks * BLOCK_K
        tokens = cute.make_tensor(x, cute.make_layout((num_tokens, width), stride=(width, 1)))
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tokens, box, (8, CHUNK_K))
        self.kernel(atom, blocks, scales, row_table, out, num_tokens, ld_out, num_row_blocks, num_k_blocks).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster_k, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        row_table: cute.Pointer,
        out: cute.Pointer,
        num_tokens: Int32,
        ld_out: Int32,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """Sets the ring up, then loads or multiplies, by warpgroup."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages = self.allocate()
        inbox = self.open_inbox(stages, thread, cta)
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            stages.pipeline.init(2, 4 * cfg.consumers)
        cute.arch.sync_threads()
        self.announce()
        cute.arch.griddepcontrol_launch_dependents()
        if warp_group == cfg.consumers:
            cute.arch.setmaxregister_decrease(self.registers[0])
            tile = self.tile(cta, num_row_blocks, num_k_blocks)
            worker = thread - cfg.consumers * WG
            if worker == 0:
                self.load_weights(blocks, scales, stages, tile, num_row_blocks, num_k_blocks)
            if worker == 32:
                self.load_tokens(ptx.descriptor_address(tma_x), stages, tile)
        else:
            cute.arch.setmaxregister_increase(self.registers[1])
            own_tile = self.tile(cta, num_row_blocks, num_k_blocks)  # again: one for both branches is spilled
            operands = Operands(Thread(thread % WG, warp_group), stages, own_tile.k_iters)
            self.consume(own_tile, operands, Output(out, row_table, num_tokens, ld_out, num_row_blocks), inbox)

    def allocate(self) -> Stages:
        """Allocates all of a CTA's shared memory."""
        cfg = self.cfg
        ring = cute.arch.alloc_smem(Uint8, cfg.ring_bytes, 1024)
        tokens = cute.recast_ptr(ring, dtype=BFloat16)
        weights = ring + cfg.num_stages * cfg.num_n * BLOCK_K * 2
        scales = cute.arch.alloc_smem(Uint8, cfg.num_m64 * MAX_K_BLOCKS * ENTRY_BYTES, 128)
        return Stages(tokens, weights, scales, Pipeline.allocate(cfg.num_stages))

    @cute.jit
    def open_inbox(self, stages: Stages, thread: Int32, cta: Int32) -> ClusterSums:
        """Makes the place where the cluster's other CTAs put sums, beside the ring or, without room, over it."""
        cfg = self.cfg
        inbox = ClusterSums(cfg.shares, cute.recast_ptr(stages.tokens, dtype=Uint8), stages.pipeline.full)
        if cutlass.const_expr(cfg.cluster_k > 1):
            sums = inbox.sums
            if cutlass.const_expr(cfg.has_inbox):
                sums = cute.arch.alloc_smem(Uint8, cfg.shares.num_bytes, 128)
            inbox = ClusterSums(cfg.shares, sums, cute.arch.alloc_smem(Int64, 1, 8))
            inbox.open(thread, cta)
        return inbox

    def announce(self) -> None:
        """Tells the cluster that this CTA's inbox is there, if it has a place of its own. Every thread."""
        if self.cfg.has_inbox:
            fp8_ptx.cluster_arrive()

    @cute.jit
    def tile(self, cta: Int32, num_row_blocks: Int32, num_k_blocks: Int32) -> CtaTile:
        """Returns a CTA's rows, tokens and share of K."""
        cfg = self.cfg
        rank = cta % cfg.cluster_k
        num_groups = (num_row_blocks + cfg.num_m64 - 1) // cfg.num_m64
        block = cta // cfg.cluster_k % num_groups * cfg.num_m64
        token0 = cta // cfg.cluster_k // num_groups * cfg.num_n
        share, rest = num_k_blocks // cfg.cluster_k, num_k_blocks % cfg.cluster_k
        k_start = rank * share + cutlass.min(rank, rest)
        k_iters = share
        if rank < rest:
            k_iters = share + 1
        return CtaTile(block, token0, k_start, k_iters, rank)

    @cute.jit
    def load_weights(
        self,
        blocks: cute.Pointer,
        scales: cute.Pointer,
        stages: Stages,
        tile: CtaTile,
        num_row_blocks: Int32,
        num_k_blocks: Int32,
    ) -> None:
        """Loads weight blocks into the ring; the scales of the whole share come with the first stage. One thread.

        Weights never change, so this does not wait for the previous kernel.
        """
        cfg = self.cfg
        ring = stages.pipeline.producer()
        for k in cutlass.range(tile.k_iters, unroll=1):
            ring.acquire()
            num_bytes = Int32(cfg.num_m64 * BLOCK_BYTES)
            if k == 0:
                num_bytes += cfg.num_m64 * ENTRY_BYTES * tile.k_iters
            ring.commit(num_bytes)
            for r in cutlass.range_constexpr(cfg.num_m64):
                row_block = cutlass.min(tile.block + r, num_row_blocks - 1)
                idx = Int64(row_block) * num_k_blocks + tile.k_start
                if k == 0:
                    ptx.load_bulk(
                        (stages.scales + r * (MAX_K_BLOCKS * ENTRY_BYTES)).toint(),
                        (scales + idx * ENTRY_BYTES).toint(), tile.k_iters * ENTRY_BYTES, ring.full, passes_once=True,
                    )  # fmt: skip
                ptx.load_bulk(
                    (stages.weights + (ring.slot * cfg.num_m64 + r) * BLOCK_BYTES).toint(),
                    (blocks + (idx + k) * BLOCK_BYTES).toint(), BLOCK_BYTES, ring.full, passes_once=True,
                )  # fmt: skip
            ring.advance()

    @cute.jit
    def load_tokens(self, descriptor: Int64, stages: Stages, tile: CtaTile) -> None:
        """Loads each stage's tokens as two boxes, zeros where there is no token or no k. One thread."""
        cfg = self.cfg
        cute.arch.griddepcontrol_wait()
        ring = stages.pipeline.producer()
        for k in cutlass.range(tile.k_iters, unroll=1):
            ring.acquire()
            ring.commit(cfg.num_n * BLOCK_K * 2)
            for half in cutlass.range_constexpr(2):
                target = stages.tokens + (ring.slot * 2 + half) * (cfg.num_n * CHUNK_K)
                ptx.load_box(target, descriptor, (tile.k_start + k) * BLOCK_K + half * CHUNK_K, tile.token0, ring.full)
            ring.advance()

    @cute.jit
    def consume(self, tile: CtaTile, operands: Operands, output: Output, inbox: ClusterSums) -> None:
        """Multiplies a warpgroup's row blocks by the tile's tokens, then reduces and stores."""
        cfg = self.cfg
        totals = [cute.make_rmem_tensor(cfg.num_n // 2, Float32) for _ in range(self.per_wg)]
        for total in totals:
            total.fill(0.0)
        if cutlass.const_expr(cfg.wgmma):
            self.multiply_wgmma(totals, operands)
        else:
            self.multiply_mma(totals, operands)
        self.reduce_and_store(totals, tile, operands, output, inbox)

    @cute.jit
    def multiply_wgmma(self, totals: list[cute.Tensor], operands: Operands) -> None:
        """Decodes one group of k16 steps while the tensor cores multiply the one before."""
        cfg, stages, thread = self.cfg, operands.stages, operands.thread
        mma = decoded_mma(cfg.num_n)
        shared = shared_operand(stages.tokens, BFloat16, cfg.num_n, 2 * cfg.num_stages, cfg.num_n * CHUNK_K)
        thr_mma = mma.get_slice(thread.idx)
        tokens = thr_mma.make_fragment_B(thr_mma.partition_B(shared))
        acc_shape = thr_mma.partition_shape_C((64, cfg.num_n))
        sums = [cute.make_rmem_tensor(acc_shape, Float32) for _ in range(self.per_wg)]
        for acc in sums:
            acc.fill(0.0)
        weights = [
            [thr_mma.make_fragment_A(thr_mma.partition_shape_A((64, 16 * self.group))) for _ in range(self.per_wg)]
            for _ in range(2)
        ]
        ring = stages.pipeline.consumer()
        last = ring.slot
        for k in cutlass.range(operands.k_iters, unroll=1):
            ring.wait()
            entries = self.load_entries(operands, k)
            words: list[tuple[Words, Words]] = []
            for part in cutlass.range_constexpr(8 // self.group):
                if cutlass.const_expr(part * self.group % 4 == 0):
                    words = self.load_words(operands, ring.slot, part * self.group // 4)
                for r in cutlass.range_constexpr(self.per_wg):
                    fragment = cute.recast_tensor(weights[part % 2][r], Uint32)
                    for kk in cutlass.range_constexpr(self.group):
                        k16 = part * self.group + kk
                        self.decode(words[r][0][k16 % 4], words[r][1][k16 % 4], entries[r][0], fragment, 4 * kk)
                warpgroup.fence()
                for kk in cutlass.range_constexpr(self.group):
                    k16 = part * self.group + kk
                    for r in cutlass.range_constexpr(self.per_wg):
                        b = tokens[None, None, k16 % 4, ring.slot * 2 + k16 // 4]
                        wgmma(mma, weights[part % 2][r][None, None, kk], b, sums[r], cfg.folded or k16 > 0)
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                if cutlass.const_expr(part == 0 and cfg.folded):
                    # Every product of the stage before is done: only this part's are in flight.
                    if k > 0:
                        ring.release(last, thread.idx)
            if cutlass.const_expr(not cfg.folded):
                warpgroup.wait_group(0)
                self.promote(totals, sums, entries)
                ring.release(ring.slot, thread.idx)
            last = ring.slot
            ring.advance()
        if cutlass.const_expr(cfg.folded):
            warpgroup.wait_group(0)
            for r in cutlass.range_constexpr(self.per_wg):
                for idx in cutlass.range_constexpr(cfg.num_n // 2):
                    totals[r][idx] = sums[r][idx]

    @cute.jit
    def multiply_mma(self, totals: list[cute.Tensor], operands: Operands) -> None:
        """Multiplies 16 rows of every row block in each warp; no warp waits for another."""
        cfg, stages, thread = self.cfg, operands.stages, operands.thread
        pieces = cfg.num_n // 8
        # ldmatrix: lane 8 i + t gives the address of token t, 16-byte unit i of four; units are exchanged by t.
        row, unit = thread.idx % 8, thread.lane // 8
        token_base = stages.tokens.toint() + row * 128
        ring = stages.pipeline.consumer()
        for k in cutlass.range(operands.k_iters, unroll=1):
            ring.wait()
            entries = self.load_entries(operands, k)
            sums = totals
            if cutlass.const_expr(not cfg.folded):
                sums = [cute.make_rmem_tensor(cfg.num_n // 2, Float32) for _ in range(self.per_wg)]
                for acc in sums:
                    acc.fill(0.0)
            for half in cutlass.range_constexpr(2):
                words = self.load_words(operands, ring.slot, half)
                chunk = token_base + (ring.slot * 2 + half) * (cfg.num_n * 128)
                for pair in cutlass.range_constexpr(2):
                    tokens = [
                        ptx.load_matrix4(chunk + j * 1024 + ((unit ^ row) ^ (4 * pair)) * 16) for j in range(pieces)
                    ]
                    for step in cutlass.range_constexpr(2):
                        for r in cutlass.range_constexpr(self.per_wg):
                            at = 2 * pair + step
                            a = self.decode_step(words[r][0][at], words[r][1][at], entries[r][0])
                            for j in cutlass.range_constexpr(pieces):
                                b = tokens[j][2 * step : 2 * step + 2]
                                old = [sums[r][4 * j + idx] for idx in range(4)]
                                new = ptx.mma_bf16(a, b, old)
                                for idx in cutlass.range_constexpr(4):
                                    sums[r][4 * j + idx] = new[idx]
            ring.release(ring.slot, thread.idx)
            if cutlass.const_expr(not cfg.folded):
                self.promote(totals, sums, entries)
            ring.advance()

    def promote(self, totals: list[cute.Tensor], sums: list[cute.Tensor], entries: list[Words]) -> None:
        """Adds scale * sums to totals, with the scale of the row block and block of K."""
        for total, acc, entry in zip(totals, sums, entries, strict=True):
            factor = ptx.as_float(entry[1])
            for idx in range(self.cfg.num_n // 2):
                total[idx] = total[idx] + factor * acc[idx]

    def load_words(self, operands: Operands, slot: Int32, half: int) -> list[tuple[Words, Words]]:
        """Loads this thread's bytes of half of each block's k: a word per k16 step, for each of rows g and g + 8."""
        thread = operands.thread
        g, q, warp = thread.row, thread.pair, thread.warp
        words = []
        for r in range(self.per_wg):
            block = slot * self.cfg.num_m64 + thread.wg_m * self.per_wg + r
            base = operands.stages.weights.toint() + block * BLOCK_BYTES + (warp * 16 + g) * 128
            unit = base + ((2 * q + half) ^ g) * 16
            words.append((ptx.load_shared_vec4(unit), ptx.load_shared_vec4(unit + 1024)))
        return words

    def load_entries(self, operands: Operands, k: Int32) -> list[Words]:
        """Loads each row block's decode multiplier and factor of the sums."""
        entries = []
        for r in range(self.per_wg):
            row = (operands.thread.wg_m * self.per_wg + r) * MAX_K_BLOCKS + k
            entries.append(ptx.load_shared_vec4(operands.stages.scales.toint() + row * ENTRY_BYTES))
        return entries

    def decode(self, upper: Uint32, lower: Uint32, multiplier: Uint32, fragment: cute.Tensor, start: int) -> None:
        """Writes ``decode_step`` into four registers of a fragment."""
        for idx, value in enumerate(self.decode_step(upper, lower, multiplier)):
            fragment[start + idx] = value

    def decode_step(self, upper: Uint32, lower: Uint32, multiplier: Uint32) -> list[Uint32]:
        """Decodes 8 weights of a k16 step to BF16 pairs: (row g, low k), (g + 8, low), (g, high), (g + 8, high)."""
        pairs = []
        for word in (upper, lower):
            odd = (word & Uint32(0x80008000)) | ((word >> 4) & Uint32(0x07F007F0))
            even = (ptx.mad(word, 256, 0) & Uint32(0x80008000)) | (ptx.mad(word, 16, 0) & Uint32(0x07F007F0))
            pairs.append((ptx.mul_bf16x2(odd, multiplier), ptx.mul_bf16x2(even, multiplier)))
        return [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]

    @cute.jit
    def reduce_and_store(
        self, totals: list[cute.Tensor], tile: CtaTile, operands: Operands, output: Output, inbox: ClusterSums
    ) -> None:
        """Adds the cluster's sums in rank order, each CTA a share of the pieces, and writes BF16."""
        cfg, thread = self.cfg, operands.thread
        pieces = cfg.num_n // 8
        idx_of_cta = thread.wg_m * WG + thread.idx
        if cutlass.const_expr(cfg.cluster_k > 1):
            if cutlass.const_expr(cfg.has_inbox):
                fp8_ptx.cluster_wait()
            else:
                ptx.named_barrier(1, cfg.consumers * WG)  # every stage is read before sums overwrite the ring
                ptx.cluster_barrier()
            for part in cutlass.range_constexpr(cfg.shares.num_parts):
                values = tuple(totals[part // pieces][4 * (part % pieces) + idx] for idx in range(4))
                inbox.send(part, values, tile.rank, idx_of_cta)
            inbox.wait()
        for r in cutlass.range_constexpr(self.per_wg):
            rows = output.rows(tile.block + thread.wg_m * self.per_wg + r)
            for j in cutlass.range_constexpr(pieces):
                if cutlass.const_expr(cfg.cluster_k == 1):
                    self.store([totals[r][4 * j + idx] for idx in range(4)], rows, j, tile, thread, output)
                else:
                    part = r * pieces + j
                    if tile.rank == cfg.shares.owner(part):
                        own = [totals[r][4 * j + idx] for idx in range(4)]
                        self.store(inbox.add(part, own, idx_of_cta), rows, j, tile, thread, output)

    @cute.jit
    def store(
        self, values: list[Float32], rows: RowBlock, j: int, tile: CtaTile, thread: Thread, output: Output
    ) -> None:
        """Writes features 2g and 2g + 1 of a warp's 16 for tokens 2q and 2q + 1 of a piece of 8."""
        g, q, warp = thread.row, thread.pair, thread.warp
        feature = warp * 16 + 2 * g
        for odd in cutlass.range_constexpr(2):
            token = tile.token0 + 8 * j + 2 * q + odd
            if token < output.num_tokens and feature < rows.num_valid:
                offset = Int64(token) * output.ld_out + (rows.first + feature)
                if cutlass.const_expr(self.cfg.ragged):
                    line = cute.make_tensor(output.out + offset, cute.make_layout(2))
                    line[0] = BFloat16(values[odd])
                    if feature + 1 < rows.num_valid:
                        line[1] = BFloat16(values[2 + odd])
                else:
                    pair = cute.make_tensor(cute.recast_ptr(output.out + offset, dtype=Uint32), cute.make_layout(1))
                    pair[0] = ptx.pack_bf16x2(values[odd], values[2 + odd])


def compile_w8a16(config: W8A16Config) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    one = Int32(1)
    return cute.compile(
        W8A16(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=16),
        ptr(Int32, 1024, space, assumed_align=8),
        ptr(BFloat16, 1024, space, assumed_align=2 if config.ragged else 4),
        Int32(8), Int32(64), one, one, one,
    )  # fmt: skip
