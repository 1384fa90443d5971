"""Both products of routed experts in one launch, for up to 32 (token, slot) pairs: by slices of an expert's width.

How it works. Down is a sum over the expert's width, so a slice of 64 of its features can go all the way: gate and up of
the slice, SwiGLU, and the columns of the down weight that read the slice. What a slice adds to each pair's output goes
to memory as float32, and ``sliced_sum_sm90`` adds the slices up in a fixed order. No CTA waits for another one's
expert, and nothing stops the stream of weights between the products: the ring holds the down weight's first blocks
before the slice's activations are there. Two CTAs, a cluster, share a slice: each computes 32 of its features from all
columns of x, writes them into the shared memory of both, and multiplies half of the down weight's rows.

Each CTA finds its tile of tokens itself, from the ids: one warp counts which pairs name the same expert (experts come
in the order in which pairs first name them). That is sooner done than a launch that writes a schedule.

Products. ``mma.sync`` with 16 rows for each of eight warps, because warps then need not wait for each other: two groups
of four warps take neighbouring 64 x 128 blocks, and their sums of gate and up are added in shared memory. Tokens beyond
the tile's repeat its last one, and nothing of them is stored.

Roofline: bytes, 0.5625 per weight at 4.41 TB/s; the sums are hidden * inter / 16 bytes a pair, through L2. It streams
at 3.6 TB/s, where ``gemm_sm90`` with large tiles does 4: it wins where launches and first bytes count, at one and two
tokens. Limits: at most 32 pairs; hidden a multiple of 512, inter of 64; sm_90a only. The activations of a slice are
rounded to BF16 as in ``gemm_sm90``, all sums are float32.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Pipeline
from ownpath.kernels.nvfp4.config import UNSCALE
from ownpath.kernels.nvfp4.decode_sm90 import decode
from ownpath.kernels.nvfp4.epilogue_sm90 import swiglu
from ownpath.kernels.nvfp4.pairs_sm90 import Pairs, rank_pairs, warp_sum
from ownpath.kernels.nvfp4.schedule import element
from ownpath.kernels.nvfp4.sliced_config import (
    CLUSTER,
    CONSUMER_WARPS,
    HIDDEN_PITCH,
    STAGE_BLOCKS,
    STAGE_CODES,
    STAGE_COLUMNS,
    STAGE_SCALES,
    TOKEN_BYTES,
    WARP,
    WIDTH,
    SlicedConfig,
)

GROUP_WARPS = 4
CONSUMERS = CONSUMER_WARPS * WARP
GROUP_BLOCKS = STAGE_BLOCKS // 2
BLOCK_CODES = STAGE_CODES // STAGE_BLOCKS
BLOCK_SCALES = STAGE_SCALES // STAGE_BLOCKS
TILE_WORDS = 12


@dataclass(frozen=True)
class TileInfo:
    """A CTA's tile in shared memory: [expert, rows, number of its first pair, mask of the expert's], then its pairs."""

    memory: cute.Pointer

    def write(self, idx: Int32 | int, value: Int32) -> None:
        """Writes a word."""
        element(self.memory, idx)[0] = value

    def read(self, idx: Int32 | int) -> Int32:
        """Reads a word."""
        return element(self.memory, idx)[0]

    def pair(self, token: Int32) -> Int32:
        """Returns the pair of a token of the tile."""
        return self.read(4 + token)


@dataclass(frozen=True)
class SliceMemory:
    """A CTA's shared memory.

    codes, scales, tokens: byte addresses of the ring's stages; hidden: of the slice's activations, whose bytes
    ``arrived`` counts; partial: of the second group's sums.
    """

    codes: Int32
    scales: Int32
    tokens: Int32
    hidden: Int32
    partial: Int32
    arrived: cute.Pointer
    tile: TileInfo
    ring: Pipeline


@dataclass(frozen=True)
class PackedStack:
    """A stack of packed experts: codes and scales, and the global scales, two to an expert."""

    codes: cute.Pointer
    scales: cute.Pointer
    global_scale: cute.Pointer

    def factors(self, expert: Int32) -> tuple[Float32, Float32]:
        """Returns the multipliers of sums in rows g and g + 8."""
        first, second = (element(self.global_scale, 2 * expert + idx)[0] for idx in range(2))
        return first * Float32(UNSCALE), second * Float32(UNSCALE)


@dataclass(frozen=True)
class SliceShare:
    """A CTA's share: slice ``idx`` of ``num_slices``, as ``rank`` of its cluster. hidden, inter: the experts' sizes."""

    idx: Int32
    num_slices: Int32
    rank: Int32
    hidden: Int32
    inter: Int32


@dataclass(frozen=True)
class SliceLane:
    """A consumer thread: its warp's group and rows in a 64-row block, and its place in the warp."""

    thread: Int32

    @property
    def group(self) -> Int32:
        return self.thread // (GROUP_WARPS * WARP)

    @property
    def warp(self) -> Int32:
        return self.thread // WARP % GROUP_WARPS

    @property
    def lane(self) -> Int32:
        return self.thread % WARP

    @property
    def row(self) -> Int32:
        return self.thread % WARP // 4

    @property
    def pair(self) -> Int32:
        return self.thread % 4


class SlicedExperts:
    """Builds the kernel of one ``SlicedConfig``."""

    def __init__(self, config: SlicedConfig) -> None:
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        up_codes: cute.Pointer,
        up_scales: cute.Pointer,
        up_global: cute.Pointer,
        down_codes: cute.Pointer,
        down_scales: cute.Pointer,
        down_global: cute.Pointer,
        sums: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        x_pitch: Int32,
        hidden: Int32,
        inter: Int32,
        swiglu_limit: Float32,
        grid: Int32,
    ) -> None:
        """Host side, used to compile only."""
        self.kernel(
            x, ids, expert_map, up_codes, up_scales, up_global, down_codes, down_scales, down_global, sums,
            num_tokens, top_k, num_ids, num_experts, x_pitch, hidden, inter, swiglu_limit,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[CLUSTER, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        up_codes: cute.Pointer,
        up_scales: cute.Pointer,
        up_global: cute.Pointer,
        down_codes: cute.Pointer,
        down_scales: cute.Pointer,
        down_global: cute.Pointer,
        sums: cute.Pointer,
        num_tokens: Int32,
        top_k: Int32,
        num_ids: Int32,
        num_experts: Int32,
        x_pitch: Int32,
        hidden: Int32,
        inter: Int32,
        swiglu_limit: Float32,
    ) -> None:
        """Finds the CTA's tile, then loads or multiplies, by warp. Grid: a cluster for each slice of each tile."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        memory = self.allocate()
        if thread == 0:
            cute.arch.mbarrier_init(memory.arrived, 1)
            memory.ring.init(1, CONSUMER_WARPS)
            cute.arch.mbarrier_arrive_and_expect_tx(memory.arrived, 8 * 2 * WIDTH)
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()
        num_slices = inter // WIDTH
        unit, slots = cta // CLUSTER, top_k + cfg.num_shared
        part = SliceShare(unit % num_slices, num_slices, cta % CLUSTER, hidden, inter)
        up = PackedStack(up_codes, up_scales, up_global)
        down = PackedStack(down_codes, down_scales, down_global)
        if warp == CONSUMER_WARPS:
            pairs = Pairs(
                cfg.routing, ids, expert_map, top_k, num_ids, num_experts, slots, num_tokens * slots,
                Int32(cfg.tokens), Int32(0),
            )  # fmt: skip
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
            self.find_tile(pairs, unit // num_slices, memory.tile, thread % WARP)
            rows = memory.tile.read(1)
            if rows > 0:
                token = memory.tile.pair(cutlass.min(thread % WARP, rows - 1)) // slots
                row = x.toint() + Int64(token) * x_pitch * 2
                self.load(up, down, row, memory, part, thread % WARP)
            elif thread % WARP == 0:
                cute.arch.mbarrier_arrive(memory.ring.full)
            cute.arch.sync_warp()
            cute.arch.cluster_wait()
        else:
            # Everyone in the cluster runs: their shared memory may be written.
            cute.arch.cluster_wait()
            # The tile is there before the first stage.
            cute.arch.mbarrier_wait(memory.ring.full, 0)
            if memory.tile.read(1) > 0:
                self.multiply(up, down, sums, memory, part, SliceLane(thread), swiglu_limit)

    def allocate(self) -> SliceMemory:
        """Allocates all of a CTA's shared memory."""
        cfg, alloc = self.cfg, cute.arch.alloc_smem
        stages = cfg.num_stages
        codes = alloc(Uint8, stages * STAGE_CODES, 128)
        scales = alloc(Uint8, stages * STAGE_SCALES, 128)
        tokens = alloc(Uint8, stages * cfg.tokens * TOKEN_BYTES, 16)
        hidden = alloc(Uint8, 8 * HIDDEN_PITCH, 16)
        partial = alloc(Uint8, (3 if cfg.flags & 4 else 1) * GROUP_WARPS * WARP * 16, 16)
        tile = TileInfo(alloc(Int32, TILE_WORDS, 16))
        ring = Pipeline.allocate(stages)
        full, empty = (
            cute.make_ptr(Int64, ptx.keep(part.toint()), cute.AddressSpace.smem, assumed_align=8)
            for part in (ring.full, ring.empty)
        )
        return SliceMemory(
            codes=ptx.keep(codes.toint()),
            scales=ptx.keep(scales.toint()),
            tokens=ptx.keep(tokens.toint()),
            hidden=hidden.toint(),
            partial=partial.toint(),
            arrived=alloc(Int64, 1, 8),
            tile=tile,
            ring=Pipeline(full, empty, stages),
        )

    @cute.jit
    def find_tile(self, pairs: Pairs, wanted: Int32, tile: TileInfo, lane: Int32) -> None:
        """Writes tile number ``wanted``, with no rows where there is none. One warp, a pair to a lane.

        A tile has pairs of one expert, in their order.
        """
        ranks = rank_pairs(pairs, 1, lane)
        expert, same, earlier = ranks.experts[0], ranks.masks[0][0], ranks.earlier[0]
        count, tiles = Int32(0), Int32(0)
        if expert >= 0 and earlier == 0:
            count = Int32(cute.arch.popc(same))
            tiles = pairs.num_tiles(count)
        if lane == 0:
            tile.write(1, Int32(0))
        cute.arch.sync_warp()
        offset = wanted - (warp_sum(tiles, lane) - tiles)
        if offset >= 0 and offset < tiles:
            first = offset * pairs.tile_rows
            tile.write(0, expert)
            tile.write(1, cutlass.min(count - first, pairs.tile_rows))
            tile.write(2, first)
            tile.write(3, same)
        cute.arch.sync_warp()
        place = earlier - tile.read(2)
        if same == tile.read(3) and place >= 0 and place < tile.read(1):
            tile.write(4 + place, lane)
        cute.arch.sync_warp()

    @cute.jit
    def load(
        self, up: PackedStack, down: PackedStack, row: Int64, memory: SliceMemory, part: SliceShare, lane: Int32
    ) -> None:
        """Fills the ring. One warp. row: address of this lane's token of x."""
        cfg = self.cfg
        expert, rows = memory.tile.read(0), memory.tile.read(1)
        ring = memory.ring.producer()
        once = not cfg.flags & 2
        first = expert * (part.inter // 32) + part.idx * CLUSTER + part.rank
        codes = up.codes.toint() + Int64(first) * part.hidden * 32
        scales = up.scales.toint() + Int64(first) * part.hidden * 4
        for _ in cutlass.range(part.hidden // STAGE_COLUMNS, unroll=1):
            ring.acquire()
            if lane == 0:
                ring.commit(rows * (2 * STAGE_COLUMNS) + (STAGE_CODES + STAGE_SCALES))
                ptx.load_bulk(memory.codes + ring.slot * STAGE_CODES, codes, STAGE_CODES, ring.full, once)
                ptx.load_bulk(memory.scales + ring.slot * STAGE_SCALES, scales, STAGE_SCALES, ring.full, once)
            if lane < rows:
                place = memory.tokens + (ring.slot * cfg.tokens + lane) * TOKEN_BYTES
                ptx.load_bulk(place, row, 2 * STAGE_COLUMNS, ring.full)
            codes += STAGE_CODES
            scales += STAGE_SCALES
            row += 2 * STAGE_COLUMNS
            ring.advance()
        # Rows of the down weight are part.inter columns apart; this lane loads one block of each stage.
        block = expert * (part.hidden // 64) + part.rank * (part.hidden // (64 * CLUSTER)) + lane
        offset = Int64(block) * part.inter * 32 + part.idx // 2 * 4096 + part.idx % 2 * BLOCK_CODES
        codes = down.codes.toint() + offset
        scales = down.scales.toint() + offset // 8
        step = Int64(part.inter) * (32 * STAGE_BLOCKS)
        for _ in cutlass.range(part.hidden // (64 * STAGE_BLOCKS * CLUSTER), unroll=1):
            ring.acquire()
            if lane == 0:
                ring.commit(STAGE_CODES + STAGE_SCALES)
            if lane < STAGE_BLOCKS:
                place = memory.codes + ring.slot * STAGE_CODES + lane * BLOCK_CODES
                ptx.load_bulk(place, codes, BLOCK_CODES, ring.full, once)
                place = memory.scales + ring.slot * STAGE_SCALES + lane * BLOCK_SCALES
                ptx.load_bulk(place, scales, BLOCK_SCALES, ring.full, once)
            codes += step
            scales += step // 8
            ring.advance()

    @cute.jit
    def multiply(
        self,
        up: PackedStack,
        down: PackedStack,
        sums: cute.Pointer,
        memory: SliceMemory,
        part: SliceShare,
        lane: SliceLane,
        swiglu_limit: Float32,
    ) -> None:
        """Multiplies what the ring brings: gate and up, the exchange of activations, then down."""
        # The assembler must not recognise this as a constant: it would load it again for every use.
        scale_bits = Uint32(0x0FF00FF0) | Uint32(part.inter >> 31)
        factors = up.factors(memory.tile.read(0))
        if cutlass.const_expr(self.cfg.flags & 4):
            self.tall_up(factors, memory, part, lane, swiglu_limit, scale_bits)
        else:
            total = self.multiply_up(memory, part, lane, scale_bits)
            place = memory.partial + (lane.warp * WARP + lane.lane) * 16
            if lane.group == 1:
                ptx.store_shared_vec4(place, tuple(total[idx] for idx in range(4)))
            ptx.named_barrier(1, CONSUMERS)
            if lane.group == 0:
                others = ptx.load_shared_vec4(place)
                both = [total[idx] + ptx.as_float(others[idx]) for idx in range(4)]
                feature = part.rank * 32 + 8 * lane.warp
                self.activate(both, factors, swiglu_limit, memory, lane, feature)
        cute.arch.mbarrier_wait(memory.arrived, 0)
        self.multiply_down(down, sums, memory, part, lane, scale_bits)

    @cute.jit
    def tall_up(
        self,
        factors: tuple[Float32, Float32],
        memory: SliceMemory,
        part: SliceShare,
        lane: SliceLane,
        swiglu_limit: Float32,
        scale_bits: Uint32,
    ) -> None:
        """A warp takes 32 rows and 64 columns of a stage."""
        cfg = self.cfg
        ring = memory.ring.consumer()
        sums = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        sums.fill(0.0)
        quarter, strip = lane.thread // WARP // 2, lane.thread // WARP % 2 * 2
        token = cutlass.min(lane.lane % 8, memory.tile.read(1) - 1)
        token_at = memory.tokens + token * TOKEN_BYTES + quarter * 128 + lane.lane // 8 * 16
        code_at = memory.codes + quarter * 2048 + strip * 512 + lane.lane * 16
        scale_at = memory.scales + quarter * 256 + strip * 64 + lane.row * 8
        for _ in cutlass.range(part.hidden // STAGE_COLUMNS, unroll=1):
            ring.wait()
            codes, scales = code_at + ring.slot * STAGE_CODES, scale_at + ring.slot * STAGE_SCALES
            start = token_at + ring.slot * (cfg.tokens * TOKEN_BYTES)
            if cutlass.const_expr(not cfg.flags & 8):
                words = [list(ptx.load_shared_vec4(codes + idx * 512)) for idx in range(2)]
                spread = [list(ptx.load_shared_vec2(scales + idx * 64)) for idx in range(2)]
                tokens = [ptx.load_matrix4(start + 64 * idx) for idx in range(2)]
                for step in cutlass.range_constexpr(4):
                    for idx in cutlass.range_constexpr(2):
                        self.step(words[idx], spread[idx], tokens, step, sums, idx, scale_bits)
            ring.release(ring.slot, lane.thread)
            ring.advance()
        for idx in cutlass.range_constexpr(2):
            place = memory.partial + (strip + idx) * 512 + lane.lane * 16
            if quarter > 0:
                ptx.store_shared_vec4(place + (quarter - 1) * 2048, tuple(sums[4 * idx + at] for at in range(4)))
        ptx.named_barrier(1, CONSUMERS)
        if quarter == 0:
            for idx in cutlass.range_constexpr(2):
                both = [sums[4 * idx + at] for at in range(4)]
                for other in cutlass.range_constexpr(3):
                    place = memory.partial + (strip + idx) * 512 + lane.lane * 16
                    words = ptx.load_shared_vec4(place + other * 2048)
                    both = [both[at] + ptx.as_float(words[at]) for at in range(4)]
                self.activate(both, factors, swiglu_limit, memory, lane, part.rank * 32 + 8 * (strip + idx))

    @cute.jit
    def activate(
        self,
        total: list[Float32],
        factors: tuple[Float32, Float32],
        swiglu_limit: Float32,
        memory: SliceMemory,
        lane: SliceLane,
        feature: Int32,
    ) -> None:
        """Sends a warp's activations to the whole cluster. feature: of the slice, the warp's first of eight."""
        even = swiglu(total[0] * factors[0], total[2] * factors[1], swiglu_limit)
        odd = swiglu(total[1] * factors[0], total[3] * factors[1], swiglu_limit)
        # Neighbours in g exchange values, so that each has two features of one token.
        is_odd = lane.row % 2
        given = even if is_odd == 1 else odd
        taken = cute.arch.shuffle_sync_bfly(given, offset=4)
        low = taken if is_odd == 1 else even
        high = odd if is_odd == 1 else taken
        token = 2 * lane.pair + is_odd
        place = memory.hidden + token * HIDDEN_PITCH + 2 * (feature + lane.row // 2 * 2)
        word = ptx.pack_bf16x2(low, high)
        for peer in cutlass.range_constexpr(CLUSTER):
            ptx.store_async(place, memory.arrived.toint(), Int32(peer), word)

    @cute.jit
    def multiply_up(self, memory: SliceMemory, part: SliceShare, lane: SliceLane, scale_bits: Uint32) -> cute.Tensor:
        """Returns this group's sums of the 64-row block of gate and up: rows (g, g, g + 8, g + 8) of two tokens."""
        cfg = self.cfg
        ring = memory.ring.consumer()
        sums = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        sums.fill(0.0)
        token = cutlass.min(lane.lane % 8, memory.tile.read(1) - 1)
        token_at = memory.tokens + token * TOKEN_BYTES + lane.group * STAGE_COLUMNS + lane.lane // 8 * 16
        for _ in cutlass.range(part.hidden // STAGE_COLUMNS, unroll=1):
            ring.wait()
            if cutlass.const_expr(not cfg.flags & 8):
                words, scales = self.load_block(memory, ring.slot, 2 * lane.group, 2, lane)
                start = token_at + ring.slot * (cfg.tokens * TOKEN_BYTES)
                tokens = [ptx.load_matrix4(start + 64 * idx) for idx in range(4)]
                for step in cutlass.range_constexpr(8):
                    self.step(words, scales, tokens, step, sums, step % 2, scale_bits)
            ring.release(ring.slot, lane.thread)
            ring.advance()
        for idx in cutlass.range_constexpr(4):
            sums[idx] = sums[idx] + sums[4 + idx]
        return sums

    @cute.jit
    def multiply_down(
        self,
        down: PackedStack,
        sums: cute.Pointer,
        memory: SliceMemory,
        part: SliceShare,
        lane: SliceLane,
        scale_bits: Uint32,
    ) -> None:
        """Multiplies the slice's activations by its columns of the down weight and stores the sums."""
        cfg, rows = self.cfg, memory.tile.read(1)
        # A position in the ring does not outlive the function that moves it.
        ring = memory.ring.consumer_at(part.hidden // STAGE_COLUMNS)
        start = memory.hidden + lane.lane % 8 * HIDDEN_PITCH + lane.lane // 8 * 16
        tokens = [ptx.load_matrix4(start + 64 * idx) for idx in range(WIDTH // 32)]
        factors = down.factors(memory.tile.read(0))
        feature = part.rank * (part.hidden // CLUSTER) + lane.group * (64 * GROUP_BLOCKS) + lane.warp * 16
        feature += 2 * lane.row
        targets = []
        for idx in cutlass.range_constexpr(min(cfg.tokens, 2)):
            token = cutlass.min(2 * lane.pair + idx, rows - 1)
            place = memory.tile.pair(token) * part.num_slices + part.idx
            targets.append(sums.toint() + (Int64(place) * part.hidden + feature) * 4)
        offset = Int64(0)
        for _ in cutlass.range(part.hidden // (64 * STAGE_BLOCKS * CLUSTER), unroll=1):
            ring.wait()
            for block in cutlass.range_constexpr(GROUP_BLOCKS):
                total = cute.make_rmem_tensor(cute.make_layout(4), Float32)
                total.fill(0.0)
                if cutlass.const_expr(not cfg.flags & 8):
                    words, scales = self.load_block(memory, ring.slot, lane.group * GROUP_BLOCKS + block, 1, lane)
                    for step in cutlass.range_constexpr(WIDTH // 16):
                        self.step(words, scales, tokens, step, total, 0, scale_bits)
                for idx in cutlass.range_constexpr(len(targets)):
                    if 2 * lane.pair + idx < rows:
                        both = (total[idx] * factors[0], total[2 + idx] * factors[1])
                        ptx.store_global_vec2(targets[idx] + (offset + 256 * block), both)
            ring.release(ring.slot, lane.thread)
            ring.advance()
            offset += 256 * STAGE_BLOCKS

    def load_block(
        self, memory: SliceMemory, slot: Int32, block: Int32, halves: int, lane: SliceLane
    ) -> tuple[list[Uint32], list[Uint32]]:
        """Loads this thread's codes and scales of 64 x 64 blocks of a stage: a word per k16 step, and per two steps."""
        codes = memory.codes + slot * STAGE_CODES + block * BLOCK_CODES + lane.warp * 512 + lane.lane * 16
        scales = memory.scales + slot * STAGE_SCALES + block * BLOCK_SCALES + lane.warp * 64 + lane.row * 8
        words = [word for half in range(halves) for word in ptx.load_shared_vec4(codes + half * BLOCK_CODES)]
        return words, [word for half in range(halves) for word in ptx.load_shared_vec2(scales + half * BLOCK_SCALES)]

    def step(
        self,
        words: list[Uint32],
        scales: list[Uint32],
        tokens: list[list[Uint32]],
        step: int,
        sums: cute.Tensor,
        turn: int,
        scale_bits: Uint32,
    ) -> None:
        """Adds the product of k16 step ``step`` of a block to the sums 4 * turn, 4 * turn + 1, ..."""
        spread = scales[step // 2]
        if step % 2:
            spread = ptx.rotate_right(spread, 8)
        weights = decode(words[step], spread & scale_bits)
        columns = tokens[step // 2][2 * (step % 2) : 2 * (step % 2) + 2]
        added = ptx.mma_bf16(weights, columns, [sums[4 * turn + idx] for idx in range(4)])
        for idx in range(4):
            sums[4 * turn + idx] = added[idx]


def compile_sliced(config: SlicedConfig) -> Any:
    """Compiles for sm_90a; no GPU is needed."""

    def pointer(dtype: Any, align: int) -> Any:
        return cute.runtime.make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=align)

    routed = (pointer(BFloat16, 16), pointer(Int64 if config.wide_ids else Int32, 4), pointer(Int32, 4))
    weight = (pointer(Uint8, 128), pointer(Uint8, 128), pointer(Float32, 4))
    pointers = (*routed, *weight, *weight, pointer(Float32, 16))
    return cute.compile(SlicedExperts(config), *pointers, *[Int32(1)] * 7, Float32(0.0), Int32(1))
