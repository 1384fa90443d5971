"""W4A16 matrix products on Hopper: NVFP4 weights decoded exactly in registers, fed to the tensor cores as operand A.

How it works. The product is taken transposed, y.T = W x.T: weight rows are the M of ``wgmma`` (64 per instruction)
and tokens its N (any multiple of 8), so that one token costs 8 columns rather than 64 rows. Operand A may come from
registers; the packed weights (``kernels.packing``) put the 4-bit codes of each thread's share of A behind each other,
so that a thread gets 32 codes with one 16-byte load and needs no exchange with others. A producer thread fills a ring
of shared-memory stages: weights and block scales by plain bulk copies (each 64 x 128 block is contiguous), tokens by
a TMA box with the 128-byte swizzle that ``wgmma`` reads. Consumer warpgroups decode two or four k16 steps into one of
two register buffers while the tensor cores work on the other.

Decode. E2M1's sign, exponent and mantissa bits are moved to the sign, low exponent and top mantissa bits of BF16,
which is the value times 2**-126 (subnormals included); the block scale, stored as a byte with a 5-bit exponent, is
expanded to BF16 times 2**107. One BF16 multiply gives code * scale * 2**-19: 2 + 4 significant bits, exact. The
epilogue multiplies the float32 sum by global_scale * 2**19.

Why it is fast. Per k16 step and thread: 10 logic operations, 5 multiply-adds and 4 BF16 multiplies for 8 weights.
Logic runs at half rate on Hopper, so this is what keeps one from streaming weights at memory speed, and the reason
for the odd bit layout. All weight bytes move as 4 KiB bulk copies, many in flight.

Roofline. Below about 150 tokens per expert: bytes, 0.5625 per weight at 4.41 TB/s. Above: ``wgmma``, 781 TFLOP/s
(measured with cuBLAS). Limits: K a multiple of 128, rows a multiple of 64 times the tile; sm_90a only.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.cute import ptx
from ownpath.kernels.cute.config import BLOCK_K, CHUNK_K, CODE_BYTES, SCALE_BYTES, UNSCALE, WG, GemmConfig

class Gemm:
    """Builds the kernel of one ``GemmConfig``."""

    def __init__(self, config: GemmConfig) -> None:
        self.cfg = config
        self.num_consumers = config.warpgroups_m * config.warpgroups_k
        self.group = 4 if config.num_m64 == 1 else 2
        self.max_n = config.n_sizes[-1]
        self.num_chunks = 2 * config.warpgroups_k

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        codes: cute.Pointer,
        scales: cute.Pointer,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_rows: Int32,
        num_cols: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        rows_per_tile: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor map."""
        tokens = cute.make_tensor(x, cute.make_layout((num_rows, num_cols), stride=(num_cols, 1)))
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atom, _ = cpasync.make_tiled_tma_atom(op, tokens, box, (8, CHUNK_K))
        self.kernel(
            atom, codes, scales, global_scale, out, schedule,
            num_rows, num_m_tiles, num_k_blocks, rows_per_tile, ld_out, swiglu_limit,
        ).launch(grid=[grid, 1, 1], block=[self.cfg.num_threads, 1, 1], cluster=[self.cfg.cluster_k, 1, 1])  # fmt: skip

    def chunk_layout(self, num_rows: int, num_chunks: Any) -> Any:
        """[rows, 64, chunks] of BF16, K contiguous, 128-byte swizzle; chunks are ``max_n`` rows apart."""
        stride = self.max_n * CHUNK_K
        outer = cute.make_layout(
            ((8, num_rows // 8), CHUNK_K, num_chunks), stride=((CHUNK_K, 8 * CHUNK_K), 1, stride)
        )
        return cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        codes: cute.Pointer,
        scales: cute.Pointer,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        schedule: cute.Pointer,
        num_rows: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        rows_per_tile: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)

        smem_x = cute.arch.alloc_smem(BFloat16, cfg.num_stages * self.num_chunks * self.max_n * CHUNK_K, 1024)
        blocks = cfg.m64_per_tile * cfg.warpgroups_k
        smem_codes = cute.arch.alloc_smem(Uint8, cfg.num_stages * blocks * CODE_BYTES, 128)
        smem_scales = cute.arch.alloc_smem(Uint8, cfg.num_stages * blocks * SCALE_BYTES, 128)
        smem_sums = smem_codes
        if cutlass.const_expr(cfg.reduces):
            smem_sums = cute.arch.alloc_smem(Uint8, cfg.reduce_bytes, 128)
        full = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        empty = cute.arch.alloc_smem(Int64, cfg.num_stages, 8)
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            for stage in cutlass.range_constexpr(cfg.num_stages):
                cute.arch.mbarrier_init(full + stage, 1)
                cute.arch.mbarrier_init(empty + stage, self.num_consumers)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        rank = Int32(0)
        worker, num_workers = cta, grid
        if cutlass.const_expr(cfg.cluster_k > 1):
            rank = cute.arch.block_idx_in_cluster()
            worker, num_workers = cta // cfg.cluster_k, grid // cfg.cluster_k
        if cutlass.const_expr(cfg.grouped and cfg.swiglu):
            cute.arch.griddepcontrol_wait()
        num_n_tiles = Int32(0)
        if cutlass.const_expr(cfg.grouped):
            num_n_tiles = self.read(schedule, 0)
        else:
            num_n_tiles = (num_rows + rows_per_tile - 1) // rows_per_tile
        num_tiles = num_n_tiles * num_m_tiles
        k_iters = num_k_blocks // (cfg.warpgroups_k * cfg.cluster_k)

        if warp_group == self.num_consumers:
            if cutlass.const_expr(self.max_n >= 64):
                cute.arch.setmaxregister_decrease(24)
            # Single rows are loaded by all lanes of a warp, boxes by one thread.
            if thread - self.num_consumers * WG < (32 if cfg.gather else 1):
                self.produce(
                    ptx.descriptor_address(tma_x), thread % 32, codes, scales, schedule, smem_x, smem_codes, smem_scales,
                    full, empty, worker, num_workers, num_tiles, num_m_tiles, num_k_blocks, k_iters, rank, num_rows, rows_per_tile,
                )  # fmt: skip
        else:
            if cutlass.const_expr(self.max_n >= 64):
                cute.arch.setmaxregister_increase(240)
            step = Int32(0)
            parity = Int32(0)
            for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
                expert, row0, rows = self.tile_rows(schedule, tile // num_m_tiles, num_rows, rows_per_tile)
                for idx in cutlass.range_constexpr(len(cfg.n_sizes)):
                    below = cfg.n_sizes[idx - 1] if idx else 0
                    if rows > below and rows <= cfg.n_sizes[idx]:
                        self.consume(
                            cfg.n_sizes[idx], global_scale, out, smem_x, smem_codes, smem_scales, smem_sums, full,
                            empty, step, parity, k_iters, thread, warp_group, tile % num_m_tiles, expert, row0, rows,
                            ld_out, swiglu_limit, rank,
                        )  # fmt: skip
                step += k_iters
                parity = parity ^ 1

    def read(self, schedule: cute.Pointer, idx: Any) -> Int32:
        return cute.make_tensor(schedule + idx, cute.make_layout(1))[0]

    @cute.jit
    def tile_rows(
        self, schedule: cute.Pointer, n_tile: Int32, num_rows: Int32, rows_per_tile: Int32
    ) -> tuple[Int32, Int32, Int32]:
        """Expert, first row and number of rows of a tile of tokens."""
        expert, row0, rows = Int32(0), n_tile * rows_per_tile, rows_per_tile
        if cutlass.const_expr(self.cfg.grouped):
            entry = 4 + 4 * n_tile
            expert, row0 = self.read(schedule, entry), self.read(schedule, entry + 1)
            rows = self.read(schedule, entry + 2)
        else:
            rows = cutlass.min(rows_per_tile, num_rows - row0)
        return expert, row0, rows

    @cute.jit
    def produce(
        self,
        descriptor: Int64,
        lane: Int32,
        codes: cute.Pointer,
        scales: cute.Pointer,
        schedule: cute.Pointer,
        smem_x: cute.Pointer,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        worker: Int32,
        num_workers: Int32,
        num_tiles: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        k_iters: Int32,
        rank: Int32,
        num_rows: Int32,
        rows_per_tile: Int32,
    ) -> None:
        """One warp or thread: fills stages in order; the weights of the first ones do not wait for the previous kernel."""
        cfg = self.cfg
        ahead = Int32(0)
        if cutlass.const_expr(not (cfg.grouped and cfg.swiglu)):
            if worker < num_tiles:
                expert, row0, rows = self.tile_rows(schedule, worker // num_m_tiles, num_rows, rows_per_tile)
                ahead = cutlass.min(k_iters, Int32(cfg.num_stages))
                for k in cutlass.range(ahead, unroll=1):
                    self.load_weights(
                        lane, codes, scales, smem_codes, smem_scales, full, k, expert, worker % num_m_tiles, k, rows,
                        num_m_tiles, num_k_blocks, k_iters, rank,
                    )  # fmt: skip
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slot, phase = Int32(0), Int32(1)
        done = Int32(0)
        for tile in cutlass.range(worker, num_tiles, num_workers, unroll=1):
            expert, row0, rows = self.tile_rows(schedule, tile // num_m_tiles, num_rows, rows_per_tile)
            for k in cutlass.range(k_iters, unroll=1):
                if done >= ahead:
                    cute.arch.mbarrier_wait(empty + slot, phase)
                    self.load_weights(
                        lane, codes, scales, smem_codes, smem_scales, full, slot, expert, tile % num_m_tiles, k, rows,
                        num_m_tiles, num_k_blocks, k_iters, rank,
                    )  # fmt: skip
                k_block = (rank * k_iters + k) * cfg.warpgroups_k
                for chunk in cutlass.range_constexpr(self.num_chunks):
                    self.load_tokens(
                        descriptor, lane, schedule, smem_x, full, slot, chunk, row0, rows, k_block * 2 + chunk
                    )
                done += 1
                slot += 1
                if slot == cfg.num_stages:
                    slot = Int32(0)
                    phase = phase ^ 1

    @cute.jit
    def load_weights(
        self,
        lane: Int32,
        codes: cute.Pointer,
        scales: cute.Pointer,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        full: cute.Pointer,
        slot: Int32,
        expert: Int32,
        m_tile: Int32,
        k: Int32,
        rows: Int32,
        num_m_tiles: Int32,
        num_k_blocks: Int32,
        k_iters: Int32,
        rank: Int32,
    ) -> None:
        """Announces a stage's bytes and starts the copies of its weight blocks."""
        cfg = self.cfg
        m64, k_blocks = cfg.m64_per_tile, cfg.warpgroups_k
        boxes = (rows + cfg.box_rows - 1) // cfg.box_rows
        token_bytes = boxes * (cfg.box_rows * CHUNK_K * 2 * self.num_chunks)
        weight_bytes = m64 * k_blocks * (CODE_BYTES + SCALE_BYTES)
        first = (expert * num_m_tiles + m_tile) * m64
        k_block = (rank * k_iters + k) * k_blocks
        if not cfg.gather or lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, weight_bytes + token_bytes)
            for idx in cutlass.range_constexpr(m64):
                block = Int64(first + idx) * num_k_blocks + k_block
                stage = (slot * m64 + idx) * k_blocks
                ptx.load_bulk(
                    smem_codes + stage * CODE_BYTES, codes + block * CODE_BYTES, k_blocks * CODE_BYTES, full + slot
                )
                ptx.load_bulk(
                    smem_scales + stage * SCALE_BYTES, scales + block * SCALE_BYTES, k_blocks * SCALE_BYTES, full + slot
                )

    @cute.jit
    def load_tokens(
        self,
        descriptor: Int64,
        lane: Int32,
        schedule: cute.Pointer,
        smem_x: cute.Pointer,
        full: cute.Pointer,
        slot: Int32,
        chunk: int,
        row0: Int32,
        rows: Int32,
        k_chunk: Int32,
    ) -> None:
        """Starts the boxes that cover ``rows`` rows of one 64-wide chunk of K."""
        cfg = self.cfg
        boxes = (rows + cfg.box_rows - 1) // cfg.box_rows
        chunk_start = smem_x + (slot * self.num_chunks + chunk) * (self.max_n * CHUNK_K)
        if cutlass.const_expr(cfg.gather):
            index = schedule + self.read(schedule, 1)
            for row in cutlass.range(lane, rows, 32, unroll=1):
                token = self.read(index, row0 + row)
                ptx.load_box(chunk_start + row * CHUNK_K, descriptor, k_chunk * CHUNK_K, token, full + slot)
        else:
            for box in cutlass.range(boxes, unroll=1):
                row = box * cfg.box_rows
                ptx.load_box(chunk_start + row * CHUNK_K, descriptor, k_chunk * CHUNK_K, row0 + row, full + slot)

    @cute.jit
    def consume(
        self,
        num_n: int,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        smem_x: cute.Pointer,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        smem_sums: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        step: Int32,
        parity: Int32,
        k_iters: Int32,
        thread: Int32,
        warp_group: Int32,
        m_tile: Int32,
        expert: Int32,
        row0: Int32,
        rows: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
        rank: Int32,
    ) -> None:
        """One tile: the product over K, then the epilogue."""
        cfg = self.cfg
        lane = thread % WG
        wg_m, wg_k = warp_group // cfg.warpgroups_k, warp_group % cfg.warpgroups_k
        mma = make_trivial_tiled_mma(
            BFloat16, BFloat16, cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.K, Float32,
            (1, 1, 1), (64, num_n), a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        layout = self.chunk_layout(num_n, cfg.num_stages * self.num_chunks)
        shared = cute.make_tensor(cute.recast_ptr(smem_x, layout.inner, BFloat16), layout.outer)
        thr_mma = mma.get_slice(lane)
        tokens = thr_mma.make_fragment_B(thr_mma.partition_B(shared))
        sums = [
            cute.make_rmem_tensor(thr_mma.partition_shape_C((64, num_n)), Float32) for _ in range(cfg.num_m64)
        ]
        for acc in sums:
            acc.fill(0.0)
        weights = [
            [thr_mma.make_fragment_A(thr_mma.partition_shape_A((64, 16 * self.group))) for _ in range(cfg.num_m64)]
            for _ in range(2)
        ]
        slot = step % cfg.num_stages
        phase = (step // cfg.num_stages) % 2
        last = slot
        for k in cutlass.range(k_iters, unroll=1):
            cute.arch.mbarrier_wait(full + slot, phase)
            words, scale_words = self.load_fragments(smem_codes, smem_scales, slot, wg_m, wg_k, lane)
            for part in cutlass.range_constexpr(8 // self.group):
                for r in cutlass.range_constexpr(cfg.num_m64):
                    fragment = cute.recast_tensor(weights[part % 2][r], Uint32)
                    for kk in cutlass.range_constexpr(self.group):
                        k16 = part * self.group + kk
                        self.decode(words[r][k16], scale_words[r][k16 // 2], k16 % 2, fragment, 4 * kk)
                warpgroup.fence()
                for kk in cutlass.range_constexpr(self.group):
                    k16 = part * self.group + kk
                    chunk = slot * self.num_chunks + wg_k * 2 + k16 // 4
                    for r in cutlass.range_constexpr(cfg.num_m64):
                        atom = cute.make_mma_atom(mma.op)
                        atom.set(warpgroup.Field.ACCUMULATE, True)
                        a = weights[part % 2][r][None, None, kk]
                        cute.gemm(atom, sums[r], a, tokens[None, None, k16 % 4, chunk], sums[r])
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                if cutlass.const_expr(part == 0):
                    # Every product of the previous stage is done: only this part's group is in flight.
                    if k > 0 and lane == 0:
                        cute.arch.mbarrier_arrive(empty + last)
            last = slot
            slot += 1
            if slot == cfg.num_stages:
                slot = Int32(0)
                phase = phase ^ 1
        warpgroup.wait_group(0)
        if lane == 0:
            cute.arch.mbarrier_arrive(empty + last)
        if cutlass.const_expr(cfg.reduces):
            self.reduce_and_store(
                num_n, sums, smem_sums, parity, lane, wg_k, rank, global_scale, out,
                m_tile, expert, row0, rows, ld_out, swiglu_limit,
            )  # fmt: skip
        else:
            for r in cutlass.range_constexpr(cfg.num_m64):
                block = m_tile * cfg.m64_per_tile + wg_m * cfg.num_m64 + r
                factors = self.factors(global_scale, expert, block, lane)
                for j in cutlass.range_constexpr(num_n // 8):
                    values = [sums[r][4 * j + idx] for idx in range(4)]
                    self.store(values, factors, out, block, j, lane, row0, rows, ld_out, swiglu_limit)

    def load_fragments(
        self,
        smem_codes: cute.Pointer,
        smem_scales: cute.Pointer,
        slot: Int32,
        wg_m: Int32,
        wg_k: Int32,
        lane: Int32,
    ) -> tuple[list[Any], list[Any]]:
        """This thread's codes (8 words, one per k16 step) and scales (4 words, two steps each) of each 64-row block."""
        cfg = self.cfg
        words, scale_words = [], []
        for r in range(cfg.num_m64):
            block = (slot * cfg.m64_per_tile + wg_m * cfg.num_m64 + r) * cfg.warpgroups_k + wg_k
            base = smem_codes.toint() + block * CODE_BYTES + lane * 16
            low, high = ptx.load_shared_vec4(base), ptx.load_shared_vec4(base + WG * 16)
            words.append([*low, *high])
            scale_base = smem_scales.toint() + block * SCALE_BYTES + (lane // 32) * 128 + (lane % 32) // 4 * 16
            scale_words.append([*ptx.load_shared_vec4(scale_base)])
        return words, scale_words

    def decode(self, word: Any, scale_word: Any, half: int, fragment: Any, start: int) -> None:
        """Eight codes of one k16 step to BF16: registers (row g, low k), (g + 8, low), (g, high), (g + 8, high)."""
        scale_low = ptx.mad(ptx.prmt(scale_word, 0x4040 + 0x0202 * half), 16, 0x70007000)
        scale_high = ptx.mad(ptx.prmt(scale_word, 0x4141 + 0x0202 * half), 16, 0x70007000)
        mask = Uint32(0x81C081C0)
        first = word & mask
        second = ptx.mad(word, 8, 0) & mask
        third = ptx.mad(word, 64, 0) & mask
        fourth = (ptx.mad(word, 2, 0) & Uint32(0x80008000)) | ((word >> 3) & Uint32(0x01800180))
        fourth = fourth | ((word >> 7) & Uint32(0x00400040))
        fragment[start] = ptx.mul_bf16x2(first, scale_low)
        fragment[start + 1] = ptx.mul_bf16x2(second, scale_high)
        fragment[start + 2] = ptx.mul_bf16x2(third, scale_low)
        fragment[start + 3] = ptx.mul_bf16x2(fourth, scale_high)

    def factors(self, global_scale: cute.Pointer, expert: Int32, block: Int32, lane: Int32) -> tuple[Any, Any]:
        """What the sums of rows g and g + 8 of this thread are multiplied by."""
        cfg = self.cfg
        table = cute.make_tensor(global_scale, cute.make_layout(1 << 30))
        if cutlass.const_expr(cfg.grouped):
            first, second = table[2 * expert], table[2 * expert + 1]
        else:
            row = block * 64 + lane // 32 * 16 + lane % 32 // 4 * 2
            first, second = table[row], table[row + 1]
        return first * Float32(UNSCALE), second * Float32(UNSCALE)

    @cute.jit
    def store(
        self,
        values: list[Any],
        factors: tuple[Any, Any],
        out: cute.Pointer,
        block: Int32,
        j: int,
        lane: Int32,
        row0: Int32,
        rows: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Writes one 16 x 8 piece of a warp: rows (g, g + 8) of tokens (2q, 2q + 1).

        Packing puts output features 2g and 2g + 1 (or gate and up of one feature) into rows g and g + 8, so that a
        thread holds a pair of neighbouring features of each token.
        """
        g, q, warp = lane % 32 // 4, lane % 4, lane // 32
        token = 8 * j + 2 * q
        even = [values[0] * factors[0], values[2] * factors[1]]
        odd = [values[1] * factors[0], values[3] * factors[1]]
        if cutlass.const_expr(self.cfg.swiglu):
            hidden_even = self.activate(even[0], even[1], swiglu_limit)
            hidden_odd = self.activate(odd[0], odd[1], swiglu_limit)
            # Neighbours in g trade, so that each writes two features of one token.
            is_low = g % 2 == 0
            given = hidden_odd if is_low else hidden_even
            taken = cute.arch.shuffle_sync_bfly(given, offset=4)
            low = hidden_even if is_low else taken
            high = taken if is_low else hidden_odd
            token_mine = token if is_low else token + 1
            feature = block * 32 + warp * 8 + g // 2 * 2
            if token_mine < rows:
                self.write(out, row0 + token_mine, feature, ld_out, ptx.pack_bf16x2(low, high))
        else:
            feature = block * 64 + warp * 16 + 2 * g
            if token < rows:
                self.write(out, row0 + token, feature, ld_out, ptx.pack_bf16x2(even[0], even[1]))
            if token + 1 < rows:
                self.write(out, row0 + token + 1, feature, ld_out, ptx.pack_bf16x2(odd[0], odd[1]))

    def write(self, out: cute.Pointer, row: Int32, feature: Int32, ld_out: Int32, pair: Uint32) -> None:
        offset = Int64(row) * ld_out + feature
        target = cute.recast_ptr(out + offset, dtype=Uint32)
        cute.make_tensor(target, cute.make_layout(1))[0] = pair

    def activate(self, gate: Float32, up: Float32, limit: Float32) -> Float32:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        gate = ptx.minimum(gate, limit)
        up = ptx.maximum(ptx.minimum(up, limit), -limit)
        return gate * up * ptx.reciprocal(1.0 + ptx.exp2(gate * Float32(-1.4426950408889634)))

    @cute.jit
    def reduce_and_store(
        self,
        num_n: int,
        sums: list[Any],
        smem_sums: cute.Pointer,
        parity: Int32,
        lane: Int32,
        wg_k: Int32,
        rank: Int32,
        global_scale: cute.Pointer,
        out: cute.Pointer,
        m_tile: Int32,
        expert: Int32,
        row0: Int32,
        rows: Int32,
        ld_out: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Sums the partial tiles of all warpgroups (and CTAs of the cluster) in a fixed order, then the epilogue."""
        cfg = self.cfg
        pieces = num_n // 8
        part_bytes = cfg.num_m64 * pieces * WG * 16
        base = smem_sums.toint()
        if cutlass.const_expr(cfg.cluster_k == 1):
            # Two buffers in turn: a warpgroup one tile ahead must not overwrite sums that are still read.
            base += parity * (cfg.reduce_bytes // 2)
        for r in cutlass.range_constexpr(cfg.num_m64):
            for j in cutlass.range_constexpr(pieces):
                address = base + wg_k * part_bytes + (r * pieces + j) * (WG * 16) + lane * 16
                ptx.store_shared_vec4(address, tuple(sums[r][4 * j + idx] for idx in range(4)))
        if cutlass.const_expr(cfg.cluster_k > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            ptx.named_barrier(1, WG * cfg.warpgroups_k)
        for r in cutlass.range_constexpr(cfg.num_m64):
            block = m_tile * cfg.m64_per_tile + r
            for j in cutlass.range_constexpr(pieces):
                unit = r * pieces + j
                owner = unit // cfg.cluster_k % cfg.warpgroups_k
                if rank == unit % cfg.cluster_k and wg_k == owner:
                    total = [Float32(0.0)] * 4
                    for part in cutlass.range_constexpr(cfg.cluster_k * cfg.warpgroups_k):
                        address = base + part % cfg.warpgroups_k * part_bytes + unit * (WG * 16) + lane * 16
                        piece = ptx.load_cluster_vec4(address, Int32(part // cfg.warpgroups_k))
                        total = [a + b for a, b in zip(total, piece, strict=True)]
                    factors = self.factors(global_scale, expert, block, lane)
                    self.store(total, factors, out, block, j, lane, row0, rows, ld_out, swiglu_limit)
        if cutlass.const_expr(cfg.cluster_k > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()


def compile_gemm(config: GemmConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""
    ptr = cute.runtime.make_ptr
    space = cute.AddressSpace.gmem
    count = Int32(1)
    return cute.compile(
        Gemm(config),
        ptr(BFloat16, 1024, space, assumed_align=16),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Uint8, 1024, space, assumed_align=128),
        ptr(Float32, 1024, space, assumed_align=4),
        ptr(BFloat16, 1024, space, assumed_align=4),
        ptr(Int32, 1024, space, assumed_align=16),
        count, Int32(64), count, count, count, count, Float32(0.0), count,
    )  # fmt: skip

