"""Both products of routed experts in one launch: gate_up's tiles, then down's, through one ring of stages.

How it works. Weights depend on nothing but the experts' ids, so that the copies of down's first tile follow those of
gate_up's last without a gap: memory stays busy while the hidden rows are finished, announced and read back. A CTA that
has one tile less of gate_up begins with two of down, which are half as long. Up to 64 (token, slot) pairs every CTA
sorts the pairs itself, in one warp, and the last warp to finish 16 features of down sums them over the slots, in their
order: the call is one launch. With more pairs ``Align`` comes before and ``Combine`` behind.

All CTAs are resident at once (the grid is no larger), so that waiting for another CTA's rows always ends. The counters
of a kernel that aligns belong to the experts and are zero between calls: calls of one operand must not overlap.

Roofline: bytes of the weights at 4.41 TB/s. Limits: as ``gemm_sm90``.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import cpasync

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Stages
from ownpath.kernels.nvfp4.config import BLOCK_K, CHUNK_K, FEW_PAIRS, WG, FusedConfig, GemmConfig
from ownpath.kernels.nvfp4.epilogue_sm90 import Epilogue
from ownpath.kernels.nvfp4.gemm_sm90 import Gemm, PartialSums
from ownpath.kernels.nvfp4.handover import announce, await_rows, draw, is_last, pass_on
from ownpath.kernels.nvfp4.moe_sm90 import Align, Pairs
from ownpath.kernels.nvfp4.schedule import Schedule, element
from ownpath.kernels.nvfp4.tile_sm90 import Tile, TileScheduler


@dataclass(frozen=True)
class Turns:
    """The tiles of down that a worker takes, so that all workers have the same work.

    The ``light`` workers have one tile of gate_up less than the others and take ``extra`` tiles first; the rest goes
    round. first: of this worker's extra tiles; then: of its others; count, num_extra: of all, and of the extra ones.
    """

    first: Int32
    light: Int32
    then: Int32
    num_workers: Int32
    num_extra: Int32
    count: Int32

    @cute.jit
    def tile(self, turn: Int32) -> Int32:
        """Returns the number of the worker's tile in this turn."""
        extra = self.first + turn * self.light
        other = self.then + (turn - self.num_extra) * self.num_workers
        return extra if turn < self.num_extra else other


@cute.jit
def share_out(worker: Int32, num_workers: Int32, num_before: Int32, num_tiles: Int32, extra: Int32) -> Turns:
    """Returns the share of a worker. num_before: tiles of gate_up; extra: tiles of down that take as long as one."""
    left = num_before % num_workers
    light = Int32(0)
    if left > 0:
        light = num_workers - left
    num_extra = Int32(0)
    if light > 0 and worker >= left:
        num_extra = cutlass.min(extra, cutlass.max(0, (num_tiles - (worker - left) + light - 1) // light))
    then = extra * light + worker
    others = cutlass.max(0, (num_tiles - then + num_workers - 1) // num_workers)
    return Turns(worker - left, light, then, num_workers, num_extra, num_extra + others)


@dataclass(frozen=True)
class Sums:
    """The operands of the sums over a token's slots. rows: float32 [P, width]; out: bfloat16 [T, width]."""

    schedule: Schedule
    rows: cute.Pointer
    weights: cute.Pointer
    out: cute.Pointer
    num_tokens: Int32
    top_k: Int32
    width: Int32


@dataclass(frozen=True)
class DrawnTiles:
    """The numbers of the tiles that a CTA draws, from the warp that draws to the others.

    Nobody is more than a ring of stages behind the warp that draws. A ring is shorter than three tiles: ``choose`` sees
    to it. So each of the four slots is read by all before it is written again.
    """

    numbers: cute.Pointer
    full: cute.Pointer

    @classmethod
    def allocate(cls) -> "DrawnTiles":
        """Allocates shared memory."""
        return cls(cute.arch.alloc_smem(Int32, NUM_SLOTS, 16), cute.arch.alloc_smem(Int64, NUM_SLOTS, 8))

    def init(self) -> None:
        """Initialises the barriers, in one thread."""
        for slot in range(NUM_SLOTS):
            cute.arch.mbarrier_init(self.full + slot, 1)

    def write(self, turn: Int32, number: Int32) -> None:
        """Writes the number of a turn's tile. One thread."""
        element(self.numbers, turn % NUM_SLOTS)[0] = number
        cute.arch.mbarrier_arrive(self.full + turn % NUM_SLOTS)

    def read(self, turn: Int32) -> Int32:
        """Waits for the number of a turn's tile and returns it."""
        cute.arch.mbarrier_wait(self.full + turn % NUM_SLOTS, turn // NUM_SLOTS % 2)
        return cute.arch.make_warp_uniform(element(self.numbers, turn % NUM_SLOTS)[0])


NUM_SLOTS = 4


class Fused:
    """Builds the kernel of one ``FusedConfig``."""

    def __init__(self, config: FusedConfig) -> None:
        self.cfg = config
        self.first, self.second = Gemm(config.gate_up), Gemm(config.down)

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        hidden_map: cute.Pointer,
        w13: tuple[cute.Pointer, cute.Pointer, cute.Pointer],
        w2: tuple[cute.Pointer, cute.Pointer, cute.Pointer],
        hidden: cute.Pointer,
        rows: cute.Pointer,
        schedule: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        tickets: cute.Pointer,
        sizes: tuple[Int32, ...],
        swiglu_limit: Float32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only: the launcher passes the same arguments with its own tensor maps."""
        box = cute.make_layout((8, CHUNK_K), stride=(CHUNK_K, 1))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atoms = []
        for source in (x, hidden_map):
            tokens = cute.make_tensor(source, cute.make_layout((sizes[0], sizes[1]), stride=(sizes[1], 1)))
            atoms.append(cpasync.make_tiled_tma_atom(op, tokens, box, (8, CHUNK_K))[0])
        self.kernel(
            atoms[0],
            atoms[1],
            *w13,
            *w2,
            hidden,
            rows,
            schedule,
            ids,
            expert_map,
            weights,
            out,
            tickets,
            *sizes,
            swiglu_limit,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        tma_hidden: cute.CopyAtom,
        codes_13: cute.Pointer,
        scales_13: cute.Pointer,
        global_13: cute.Pointer,
        codes_2: cute.Pointer,
        scales_2: cute.Pointer,
        global_2: cute.Pointer,
        hidden: cute.Pointer,
        rows: cute.Pointer,
        schedule: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        weights: cute.Pointer,
        out: cute.Pointer,
        tickets: cute.Pointer,
        num_tokens: Int32,
        width: Int32,
        inter: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Sorts the pairs, then loads or multiplies, by warpgroup. schedule: counters, where the kernel aligns."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp_group = cute.arch.make_warp_uniform(thread // WG)
        stages, _ = self.first.allocate()
        plan, counters = Schedule(schedule), schedule
        if cutlass.const_expr(cfg.max_pairs):
            plan = Schedule(cute.arch.alloc_smem(Int32, cfg.schedule_bytes // 4, 16))
        slots = self.allocate_drawn(thread) if cfg.dynamic else None
        if thread == 0:
            cpasync.prefetch_descriptor(tma_x)
            cpasync.prefetch_descriptor(tma_hidden)
            stages.pipeline.init(3, 4 * self.first.num_consumers)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(cfg.max_pairs):
            if thread < 32:
                per_token = top_k + cfg.num_shared
                pairs = Pairs(
                    cfg.align, ids, expert_map, top_k, num_ids, num_experts, per_token, num_tokens * per_token,
                    Int32(cfg.n_sizes[-1]), Int32(4 + 4 * cfg.max_pairs),
                )  # fmt: skip
                self.align(pairs, plan, thread)
        cute.arch.sync_threads()
        before = self.scheduler(cfg.gate_up, plan, cta, grid, 2 * inter, width)
        after = self.scheduler(cfg.down, plan, cta, grid, width, inter)
        turns = None
        if cutlass.const_expr(not cfg.dynamic):
            turns = share_out(cta, grid, before.num_tiles, after.num_tiles, (width + inter // 2) // inter)
        if warp_group == self.first.num_consumers:
            if cutlass.const_expr(cfg.gate_up.consumer_registers):
                cute.arch.setmaxregister_decrease(cfg.gate_up.producer_registers)
            warp = cute.arch.make_warp_uniform(thread % WG // 32)
            if warp < 2:
                if thread % 32 == 0:
                    source_13, source_2, target, num_bytes = codes_13, codes_2, stages.weights, cfg.gate_up.code_bytes
                    if warp == 1:
                        source_13, source_2, target = scales_13, scales_2, stages.scales
                        num_bytes = cfg.gate_up.scale_bytes
                    sources, both = (source_13, source_2), (before, after)
                    if cutlass.const_expr(slots is None):
                        self.load_weights(sources, target, Int32(num_bytes), stages, both, turns)
                    else:
                        self.load_drawn(sources, target, Int32(num_bytes), stages, both, slots, warp, tickets)
            elif warp == 2:
                maps = ptx.descriptor_address(tma_x), ptx.descriptor_address(tma_hidden)
                if cutlass.const_expr(slots is None):
                    self.load_tokens(maps, thread % 32, stages, (before, after), turns, counters)
                else:
                    self.load_drawn_tokens(maps, thread % 32, stages, (before, after), slots, counters)
        else:
            if cutlass.const_expr(cfg.gate_up.consumer_registers):
                cute.arch.setmaxregister_increase(cfg.gate_up.consumer_registers)
            epilogues = (
                Epilogue(cfg.gate_up, global_13, hidden, inter, swiglu_limit),
                Epilogue(cfg.down, global_2, rows, width, swiglu_limit),
            )
            sums = Sums(plan, rows, weights, out, num_tokens, top_k, width)
            if cutlass.const_expr(cfg.max_pairs):
                if before.num_tiles == 0:
                    self.store_zeros(sums, cta * (WG * self.first.num_consumers) + thread, grid)
            if cutlass.const_expr(slots is None):
                self.multiply(stages, (before, after), turns, epilogues, (thread, warp_group), counters, sums)
            else:
                self.multiply_drawn(stages, (before, after), slots, epilogues, (thread, warp_group), counters, sums)

    @cute.jit
    def allocate_drawn(self, thread: Int32) -> DrawnTiles:
        """Allocates the drawn tiles' numbers; every thread may use them after the CTA's next barrier."""
        slots = DrawnTiles.allocate()
        if thread == 0:
            slots.init()
        return slots

    @cute.jit
    def load_drawn(
        self,
        sources: tuple[cute.Pointer, cute.Pointer],
        target: cute.Pointer,
        num_bytes: Int32,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        slots: DrawnTiles,
        warp: Int32,
        tickets: cute.Pointer,
    ) -> None:
        """Loads the codes (or the scales) of the tiles that this CTA draws; the warp of the codes draws them."""
        before, after = schedulers
        total = before.num_tiles + after.num_tiles
        num_draws = cutlass.max(total, before.num_workers)
        ring, idx, turn = stages.pipeline.producer(), before.worker, Int32(0)
        drawn = Int32(0)
        if warp == 0:
            slots.write(turn, idx)
            if idx >= total:
                drawn = draw(tickets, num_draws)
        # A tile is drawn as late as may be: when all but a ring's worth of the last one is on its way.
        split = cutlass.max(before.k_iters - self.cfg.num_stages, 0)
        while idx < before.num_tiles:
            tile = before.tile(idx)
            ring = self.first.load_weight_tile(sources[0], target, num_bytes, ring, before, tile, (Int32(0), split))
            if warp == 0:
                drawn = draw(tickets, num_draws)
            span = split, before.k_iters
            ring = self.first.load_weight_tile(sources[0], target, num_bytes, ring, before, tile, span)
            turn += 1
            if warp == 0:
                slots.write(turn, drawn + before.num_workers)
            idx = slots.read(turn)
        split = cutlass.max(after.k_iters - self.cfg.num_stages, 0)
        while idx < total:
            tile = after.tile(idx - before.num_tiles)
            ring = self.second.load_weight_tile(sources[1], target, num_bytes, ring, after, tile, (Int32(0), split))
            if warp == 0:
                drawn = draw(tickets, num_draws)
            span = split, after.k_iters
            ring = self.second.load_weight_tile(sources[1], target, num_bytes, ring, after, tile, span)
            turn += 1
            if warp == 0:
                slots.write(turn, drawn + before.num_workers)
            idx = slots.read(turn)

    @cute.jit
    def load_drawn_tokens(
        self,
        maps: tuple[Int64, Int64],
        lane: Int32,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        slots: DrawnTiles,
        counters: cute.Pointer,
    ) -> None:
        """Loads the tokens of the tiles that this CTA draws. One warp."""
        before, after = schedulers
        ring, turn = stages.pipeline.producer(), Int32(0)
        idx = slots.read(turn)
        while idx < before.num_tiles:
            ring = self.first.load_token_tile(maps[0], lane, ring, stages, before, before.tile(idx))
            turn += 1
            idx = slots.read(turn)
        while idx < before.num_tiles + after.num_tiles:
            tile = after.tile(idx - before.num_tiles)
            counter, num_rows = self.counter(counters, after, tile.n_tile), self.second.rows_before(after)
            await_rows(counter, num_rows)
            ring = self.second.load_token_tile(maps[1], lane, ring, stages, after, tile)
            if cutlass.const_expr(self.cfg.max_pairs):
                if lane == 0:
                    pass_on(counter, num_rows, after.m_per_worker)
            turn += 1
            idx = slots.read(turn)

    @cute.jit
    def multiply_drawn(
        self,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        slots: DrawnTiles,
        epilogues: tuple[Epilogue, Epilogue],
        thread: tuple[Int32, Int32],
        counters: cute.Pointer,
        sums: Sums,
    ) -> None:
        """Multiplies a warpgroup's part of the tiles that this CTA draws."""
        before, after = schedulers
        step, turn, config = Int32(0), Int32(0), self.cfg.gate_up
        partial = PartialSums(stages.weights, Int32(0), Int32(0))
        idx = slots.read(turn)
        while idx < before.num_tiles:
            tile = before.tile(idx)
            self.first.multiply_tile(tile, stages, before.k_iters, step, partial, epilogues[0], thread)
            announce(self.counter(counters, before, tile.n_tile), thread[0], 16 * config.num_m64)
            step += before.k_iters
            turn += 1
            idx = slots.read(turn)
        while idx < before.num_tiles + after.num_tiles:
            tile = after.tile(idx - before.num_tiles)
            self.second.multiply_tile(tile, stages, after.k_iters, step, partial, epilogues[1], thread)
            step += after.k_iters
            if cutlass.const_expr(self.cfg.max_pairs):
                self.finish(tile, thread, counters + FEW_PAIRS, after.num_n_tiles, sums)
            turn += 1
            idx = slots.read(turn)

    @cute.jit
    def align(self, pairs: Pairs, plan: Schedule, lane: Int32) -> None:
        """Sorts the pairs. One warp."""
        aligning = Align(self.cfg.align)
        if cutlass.const_expr(self.cfg.max_pairs > 32):
            aligning.align_two(pairs, plan, lane)
        else:
            aligning.align_few(pairs, plan, lane)

    def scheduler(
        self, config: GemmConfig, plan: Schedule, worker: Int32, num_workers: Int32, num_rows: Int32, num_cols: Int32
    ) -> TileScheduler:
        """Returns the tiles of one product."""
        m_tiles, num_n_tiles = num_rows // (64 * config.m64_per_tile), plan.num_tiles()
        zero = Int32(0)
        return TileScheduler(
            cfg=config,
            schedule=plan,
            num_rows=zero,
            rows_per_tile=zero,
            worker=worker,
            num_workers=num_workers,
            m_per_worker=m_tiles,
            num_n_tiles=num_n_tiles,
            num_tiles=num_n_tiles * m_tiles,
            k_units=num_cols // BLOCK_K,
            k_iters=num_cols // BLOCK_K,
            rank=zero,
            rank_m=zero,
        )

    def counter(self, counters: cute.Pointer, scheduler: TileScheduler, n_tile: Int32) -> cute.Pointer:
        """Returns the counter of a tile's finished hidden rows."""
        return counters + n_tile if self.cfg.max_pairs else scheduler.schedule.counter(n_tile)

    @cute.jit
    def load_weights(
        self,
        sources: tuple[cute.Pointer, cute.Pointer],
        target: cute.Pointer,
        num_bytes: Int32,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        turns: Turns,
    ) -> None:
        """Loads the codes (or the scales) of all tiles. One thread."""
        before, after = schedulers
        ring = stages.pipeline.producer()
        for idx in cutlass.range(before.worker, before.num_tiles, before.num_workers, unroll=1):
            ring = self.first.load_weight_tile(sources[0], target, num_bytes, ring, before, before.tile(idx))
        for turn in cutlass.range(turns.count, unroll=1):
            tile = after.tile(turns.tile(turn))
            ring = self.second.load_weight_tile(sources[1], target, num_bytes, ring, after, tile)

    @cute.jit
    def load_tokens(
        self,
        maps: tuple[Int64, Int64],
        lane: Int32,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        turns: Turns,
        counters: cute.Pointer,
    ) -> None:
        """Loads the tokens of all tiles, down's when gate_up has written them. One warp."""
        before, after = schedulers
        ring = stages.pipeline.producer()
        for idx in cutlass.range(before.worker, before.num_tiles, before.num_workers, unroll=1):
            ring = self.first.load_token_tile(maps[0], lane, ring, stages, before, before.tile(idx))
        for turn in cutlass.range(turns.count, unroll=1):
            tile = after.tile(turns.tile(turn))
            counter, num_rows = self.counter(counters, after, tile.n_tile), self.second.rows_before(after)
            await_rows(counter, num_rows)
            ring = self.second.load_token_tile(maps[1], lane, ring, stages, after, tile)
            if cutlass.const_expr(self.cfg.max_pairs):
                if lane == 0:
                    pass_on(counter, num_rows, after.m_per_worker)

    @cute.jit
    def multiply(
        self,
        stages: Stages,
        schedulers: tuple[TileScheduler, TileScheduler],
        turns: Turns,
        epilogues: tuple[Epilogue, Epilogue],
        thread: tuple[Int32, Int32],
        counters: cute.Pointer,
        sums: Sums,
    ) -> None:
        """Multiplies a warpgroup's part of all tiles."""
        before, after = schedulers
        step, config = Int32(0), self.cfg.gate_up
        partial = PartialSums(stages.weights, Int32(0), Int32(0))
        for idx in cutlass.range(before.worker, before.num_tiles, before.num_workers, unroll=1):
            tile = before.tile(idx)
            self.first.multiply_tile(tile, stages, before.k_iters, step, partial, epilogues[0], thread)
            announce(self.counter(counters, before, tile.n_tile), thread[0], 16 * config.num_m64)
            step += before.k_iters
        for turn in cutlass.range(turns.count, unroll=1):
            tile = after.tile(turns.tile(turn))
            self.second.multiply_tile(tile, stages, after.k_iters, step, partial, epilogues[1], thread)
            step += after.k_iters
            if cutlass.const_expr(self.cfg.max_pairs):
                self.finish(tile, thread, counters + FEW_PAIRS, after.num_n_tiles, sums)

    @cute.jit
    def finish(
        self, tile: Tile, thread: tuple[Int32, Int32], counters: cute.Pointer, num_n_tiles: Int32, sums: Sums
    ) -> None:
        """Counts this warp's features of a tile; sums them over the slots when every tile has them."""
        config = self.cfg.down
        lane, warp = thread[0] % 32, thread[0] % WG // 32
        block = (tile.m_tile * config.warpgroups_m + thread[1]) * config.num_m64
        if is_last(counters + (block // config.num_m64 * 4 + warp), lane, num_n_tiles) == 1:
            features = 16 * config.num_m64
            for unit in cutlass.range(lane, features // 4 * sums.num_tokens, 32, unroll=1):
                within = unit % (features // 4) * 4
                self.sum_four(sums, unit // (features // 4), (block + within // 16) * 64 + warp * 16 + within % 16)

    @cute.jit
    def sum_four(self, sums: Sums, token: Int32, feature: Int32) -> None:
        """Sums four features of a token over its slots, in their order."""
        slots = sums.top_k + self.cfg.num_shared
        place = sums.schedule.sorted_rows(sums.num_tokens, slots)
        total = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        total.fill(0.0)
        for start in cutlass.range(0, slots, 8, unroll=1):
            # Eight slots' loads are in flight; those of slots and rows that are not there are not used.
            for turn in cutlass.range_constexpr(8):
                slot, row, weight = start + turn, Int32(-1), Float32(1.0)
                if slot < slots:
                    row = element(place, token * slots + slot)[0]
                if slot < sums.top_k:
                    weight = element(sums.weights, token * sums.top_k + slot)[0]
                from_ = sums.rows.toint() + (Int64(cutlass.max(row, 0)) * sums.width + feature) * 4
                values = [ptx.as_float(word) for word in ptx.load_global_vec4(from_)]
                for idx in cutlass.range_constexpr(4):
                    term = weight * values[idx]
                    total[idx] = total[idx] + (term if row >= 0 else Float32(0.0))
        target = sums.out.toint() + (Int64(token) * sums.width + feature) * 2
        ptx.store_global(target, ptx.pack_bf16x2(total[0], total[1]))
        ptx.store_global(target + 4, ptx.pack_bf16x2(total[2], total[3]))

    @cute.jit
    def store_zeros(self, sums: Sums, worker: Int32, num_ctas: Int32) -> None:
        """Writes zeros for all tokens: none has an expert here."""
        for pair in cutlass.range(
            worker, sums.num_tokens * (sums.width // 2), num_ctas * (WG * self.first.num_consumers), unroll=1
        ):
            ptx.store_global(sums.out.toint() + Int64(pair) * 4, Int32(0))


def compile_fused(config: FusedConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""

    def pointer(dtype: Any, align: int = 16) -> Any:
        return cute.runtime.make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=align)

    weight = pointer(Uint8, 128), pointer(Uint8, 128), pointer(Float32, 4)
    ids = pointer(Int64 if config.wide_ids else Int32, 4)
    wide = Int32(64)
    return cute.compile(
        Fused(config), pointer(BFloat16), pointer(BFloat16), weight, weight,
        pointer(BFloat16, 4), pointer(Float32, 4), pointer(Int32), ids, pointer(Int32, 4), pointer(Float32, 4),
        pointer(BFloat16), pointer(Int32, 4), (wide, wide, wide, wide, wide, wide), Float32(0.0), Int32(1),
    )  # fmt: skip
