"""Both products of routed experts in one launch, for up to 64 (token, slot) pairs: by slices of an expert's width.

How it works. Down is a sum over the expert's width, so a slice of 64 or 128 of its features can go all the way: gate
and up of the slice, SwiGLU, and the columns of the down weight that read the slice. What a slice adds to each pair's
output goes to memory as float32, and ``sliced_sum_sm90`` adds the slices up in a fixed order. No CTA waits for another
one's expert, and nothing stops the stream of weights between the products: the ring holds the down weight's first
blocks before the slice's activations are there. A cluster shares a slice: each CTA computes 32 or 64 of its features
from all columns of x, writes them into every CTA's shared memory, and multiplies its part of the down weight's rows.

Each CTA finds its tile of tokens itself, from the ids: one warp counts which pairs name the same expert (experts come
in the order in which pairs first name them). That is sooner done than a launch that writes a schedule.

Products. ``mma.sync`` with 16 rows for each of eight warps, because warps then need not wait for each other: two groups
of four warps take neighbouring 64 x 128 blocks, and their sums of gate and up are added in shared memory. Tokens beyond
the tile's repeat its last one, and nothing of them is stored.

Roofline: bytes, 0.5625 per weight at 4.41 TB/s; the sums are 4 * hidden * inter / width bytes a pair, through L2.
Limits: at most 64 pairs; hidden a multiple of 256, inter of the slice; sm_90a only. The activations of a slice are
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
from ownpath.kernels.nvfp4.pairs_sm90 import Pairs, warp_sum
from ownpath.kernels.nvfp4.schedule import Schedule, element
from ownpath.kernels.nvfp4.sliced_config import (
    CONSUMER_WARPS,
    STAGE_CODES,
    STAGE_COLUMNS,
    STAGE_SCALES,
    TOKEN_BYTES,
    WARP,
    SlicedConfig,
)

GROUP_WARPS = 4
CONSUMERS = CONSUMER_WARPS * WARP
TILE_WORDS = 16


@dataclass(frozen=True)
class TileInfo:
    """A CTA's tile in shared memory: [expert, rows, first rank, two masks of pairs, ...], then the tokens' pairs."""

    memory: cute.Pointer

    def write(self, idx: Int32 | int, value: Int32) -> None:
        """Writes a word."""
        element(self.memory, idx)[0] = value

    def read(self, idx: Int32 | int) -> Int32:
        """Reads a word."""
        return element(self.memory, idx)[0]

    def pair(self, token: Int32) -> Int32:
        """Returns the pair of a token of the tile."""
        return self.read(8 + token)


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
    """A stack of packed experts: codes and scales, and the global scales, two to an expert. columns: of a matrix."""

    codes: cute.Pointer
    scales: cute.Pointer
    global_scale: cute.Pointer
    columns: Int32

    def factors(self, expert: Int32) -> tuple[Float32, Float32]:
        """Returns the multipliers of sums in rows g and g + 8."""
        first, second = (element(self.global_scale, 2 * expert + idx)[0] for idx in range(2))
        return first * Float32(UNSCALE), second * Float32(UNSCALE)


@dataclass(frozen=True)
class SliceShare:
    """A CTA's share: rows of one expert's tile, features of slice ``idx`` of ``num_slices``, as ``rank`` of its
    cluster. hidden, inter: the experts' sizes."""

    expert: Int32
    rows: Int32
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


@cute.jit
def first_rank(value: Int32, lane: Int32) -> Int32:
    """Returns the number of set bits below this lane's."""
    return Int32(cute.arch.popc(value & ((Int32(1) << lane) - 1)))


@cute.jit
def same_as(mine: Int32, others: Int32) -> Int32:
    """Returns the lanes whose ``others`` equals this lane's ``mine``, a bit each."""
    found = Int32(0)
    for lane in cutlass.range_constexpr(WARP):
        bit = Int32((1 << lane) - (1 << 32 if lane == 31 else 0))
        found = found | (bit if cute.arch.shuffle_sync(others, lane) == mine else Int32(0))
    return found


@dataclass(frozen=True)
class PairRanks:
    """This lane's pair of each half: its expert, the pairs of the same expert, and how many of those come before."""

    experts: list[Int32]
    masks: list[tuple[Int32, Int32]]
    earlier: list[Int32]


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
        schedule: cute.Pointer,
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
            x, ids, expert_map, schedule, up_codes, up_scales, up_global, down_codes, down_scales, down_global, sums,
            num_tokens, top_k, num_ids, num_experts, x_pitch, hidden, inter, swiglu_limit,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            cluster=[self.cfg.cluster, 1, 1],
            min_blocks_per_mp=self.cfg.per_sm,
            preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        x: cute.Pointer,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        schedule: cute.Pointer,
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
        """Finds the CTA's tile, then loads or multiplies, by warp. Grid: a cluster for each slice of each pair."""
        cfg = self.cfg
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        memory = self.allocate()
        if thread == 0:
            cute.arch.mbarrier_init(memory.arrived, 1)
            memory.ring.init(1, CONSUMER_WARPS)
            cute.arch.mbarrier_arrive_and_expect_tx(memory.arrived, 8 * 2 * cfg.width)
        cute.arch.sync_warp()
        cute.arch.cluster_arrive_relaxed()
        num_slices = inter // cfg.width
        unit, rank = cta // cfg.cluster, cta % cfg.cluster
        slots = top_k + cfg.num_shared
        if warp == CONSUMER_WARPS:
            pairs = Pairs(
                cfg.routing, ids, expert_map, top_k, num_ids, num_experts, slots, num_tokens * slots,
                Int32(cfg.tokens), Int32(0),
            )  # fmt: skip
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
            if cutlass.const_expr(cfg.scheduled):
                self.read_tile(Schedule(schedule), unit // num_slices, memory.tile, thread % WARP)
            else:
                self.find_tile(pairs, unit // num_slices, memory.tile, thread % WARP)
        cute.arch.sync_threads()
        tile = memory.tile
        part = SliceShare(tile.read(0), tile.read(1), unit % num_slices, num_slices, rank, hidden, inter)
        up = PackedStack(up_codes, up_scales, up_global, hidden)
        down = PackedStack(down_codes, down_scales, down_global, inter)
        # Everyone in the cluster runs: their shared memory may be written.
        cute.arch.cluster_wait()
        if part.rows > 0:
            if warp == CONSUMER_WARPS:
                place = tile.pair(cutlass.min(thread % WARP, part.rows - 1))
                if cutlass.const_expr(cfg.scheduled):
                    token = element(Schedule(schedule).tokens(), place)[0]
                else:
                    token = place // slots
                row = x.toint() + Int64(token) * x_pitch * 2
                self.load(up, down, row, memory, part, thread % WARP)
            else:
                self.multiply(up, down, sums, memory, part, SliceLane(thread), swiglu_limit)

    def allocate(self) -> SliceMemory:
        """Allocates all of a CTA's shared memory."""
        cfg, alloc = self.cfg, cute.arch.alloc_smem
        stages = cfg.num_stages
        codes = alloc(Uint8, stages * STAGE_CODES, 128)
        scales = alloc(Uint8, stages * STAGE_SCALES, 128)
        tokens = alloc(Uint8, stages * cfg.tokens * TOKEN_BYTES, 128)
        hidden = alloc(Uint8, 8 * cfg.hidden_pitch, 128)
        partial = alloc(Uint8, cfg.blocks * GROUP_WARPS * WARP * 16, 128)
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
        """Writes tile number ``wanted``, with no rows where there is none. One warp, a pair or two per lane.

        A tile has pairs of one expert, in their order.
        """
        cfg = self.cfg
        if lane == 0:
            tile.write(1, Int32(0))
        cute.arch.sync_warp()
        ranks = self.rank(pairs, lane)
        before = Int32(0)
        for half in cutlass.range_constexpr(cfg.halves):
            low, high = ranks.masks[half]
            count, tiles = Int32(0), Int32(0)
            if ranks.experts[half] >= 0 and ranks.earlier[half] == 0:
                count = Int32(cute.arch.popc(low)) + Int32(cute.arch.popc(high))
                tiles = pairs.num_tiles(count)
            running = warp_sum(tiles, lane) + before
            before = cute.arch.shuffle_sync(running, 31)
            offset = wanted - (running - tiles)
            if offset >= 0 and offset < tiles:
                first = offset * cfg.tokens
                tile.write(0, ranks.experts[half])
                tile.write(1, cutlass.min(count - first, Int32(cfg.tokens)))
                tile.write(2, first)
                tile.write(3, low)
                tile.write(4, high)
        cute.arch.sync_warp()
        if tile.read(1) > 0:
            low, high, first = tile.read(3), tile.read(4), tile.read(2)
            place = first_rank(low, lane) - first
            if (low >> lane) & 1 != 0 and place >= 0 and place < cfg.tokens:
                tile.write(8 + place, lane)
            place = Int32(cute.arch.popc(low)) + first_rank(high, lane) - first
            if (high >> lane) & 1 != 0 and place >= 0 and place < cfg.tokens:
                tile.write(8 + place, lane + WARP)
        cute.arch.sync_warp()

    @cute.jit
    def read_tile(self, schedule: Schedule, wanted: Int32, tile: TileInfo, lane: Int32) -> None:
        """Reads tile number ``wanted`` from the schedule: instead of pairs it has sorted rows."""
        if lane == 0:
            tile.write(1, Int32(0))
        cute.arch.sync_warp()
        if wanted < schedule.num_tiles():
            row0, rows = schedule.rows(wanted)
            if lane == 0:
                tile.write(0, schedule.expert(wanted))
                tile.write(1, rows)
            if lane < rows:
                tile.write(8 + lane, row0 + lane)
        cute.arch.sync_warp()

    def rank(self, pairs: Pairs, lane: Int32) -> PairRanks:
        """Compares the pairs with each other."""
        experts = [self.named(pairs, lane + WARP * half) for half in range(self.cfg.halves)]
        own = [Int32(cute.arch.match_sync(0xFFFFFFFF, expert)) for expert in experts]
        if self.cfg.halves == 1:
            return PairRanks(experts, [(own[0], Int32(0))], [first_rank(own[0], lane)])
        later, former = same_as(experts[0], experts[1]), same_as(experts[1], experts[0])
        ahead = Int32(cute.arch.popc(former)) + first_rank(own[1], lane)
        return PairRanks(experts, [(own[0], later), (former, own[1])], [first_rank(own[0], lane), ahead])

    @cute.jit
    def named(self, pairs: Pairs, idx: Int32) -> Int32:
        """Returns a pair's expert, or -1, also beyond the last pair."""
        expert = Int32(-1)
        if idx < pairs.total:
            expert = pairs.expert(idx)
        return expert

    @cute.jit
    def load(
        self, up: PackedStack, down: PackedStack, row: Int64, memory: SliceMemory, part: SliceShare, lane: Int32
    ) -> None:
        """Fills the ring. One warp. row: address of this lane's token of x."""
        cfg = self.cfg
        ring = memory.ring.producer()
        for block in cutlass.range_constexpr(cfg.blocks):
            first = part.expert * (part.inter // 32) + part.idx * (cfg.width // 32) + part.rank * cfg.blocks + block
            codes = up.codes.toint() + Int64(first) * part.hidden * 32
            scales = up.scales.toint() + Int64(first) * part.hidden * 4
            source = row
            for _ in cutlass.range(part.hidden // STAGE_COLUMNS, unroll=1):
                ring.acquire()
                if lane == 0:
                    ring.commit(part.rows * (2 * STAGE_COLUMNS) + (STAGE_CODES + STAGE_SCALES))
                    ptx.load_bulk(memory.codes + ring.slot * STAGE_CODES, codes, STAGE_CODES, ring.full, True)
                    ptx.load_bulk(memory.scales + ring.slot * STAGE_SCALES, scales, STAGE_SCALES, ring.full, True)
                if lane < part.rows:
                    place = memory.tokens + (ring.slot * cfg.tokens + lane) * TOKEN_BYTES
                    ptx.load_bulk(place, source, 2 * STAGE_COLUMNS, ring.full)
                codes += STAGE_CODES
                scales += STAGE_SCALES
                source += 2 * STAGE_COLUMNS
                ring.advance()
        # Rows of the down weight are part.inter columns apart; this lane loads one block of each stage.
        block = part.expert * (part.hidden // 64) + part.rank * (part.hidden // (64 * cfg.cluster)) + lane
        column = part.idx * cfg.width
        offset = Int64(block) * part.inter * 32 + column // 128 * 4096 + column % 128 * 32
        codes = down.codes.toint() + offset
        scales = down.scales.toint() + offset // 8
        step = Int64(part.inter) * (32 * cfg.pieces)
        for _ in cutlass.range(part.hidden // (64 * cfg.pieces * cfg.cluster), unroll=1):
            for turn in cutlass.range_constexpr(cfg.width // cfg.columns):
                ring.acquire()
                if lane == 0:
                    ring.commit(STAGE_CODES + STAGE_SCALES)
                if lane < cfg.pieces:
                    place = memory.codes + ring.slot * STAGE_CODES + lane * cfg.piece_codes
                    ptx.load_bulk(place, codes + turn * cfg.piece_codes, cfg.piece_codes, ring.full, True)
                    place = memory.scales + ring.slot * STAGE_SCALES + lane * (cfg.piece_codes // 8)
                    ptx.load_bulk(place, scales + turn * (cfg.piece_codes // 8), cfg.piece_codes // 8, ring.full, True)
                ring.advance()
            codes += step
            scales += step // 8

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
        cfg = self.cfg
        # The assembler must not recognise this as a constant: it would load it again for every use.
        scale_bits = Uint32(0x0FF00FF0) | Uint32(part.inter >> 31)
        for block in cutlass.range_constexpr(cfg.blocks):
            total = self.gate_and_up(block, memory, part, lane, scale_bits)
            place = memory.partial + ((block * GROUP_WARPS + lane.warp) * WARP + lane.lane) * 16
            if lane.group == 1:
                ptx.store_shared_vec4(place, tuple(total[idx] for idx in range(4)))
            ptx.named_barrier(1, CONSUMERS)
            if lane.group == 0:
                others = ptx.load_shared_vec4(place)
                both = [total[idx] + ptx.as_float(others[idx]) for idx in range(4)]
                feature = (part.rank * cfg.blocks + block) * 32 + 8 * lane.warp
                self.activate(both, up.factors(part.expert), swiglu_limit, memory, lane, feature)
        cute.arch.mbarrier_wait(memory.arrived, 0)
        self.multiply_down(down, sums, memory, part, lane, scale_bits)

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
        cfg = self.cfg
        even = swiglu(total[0] * factors[0], total[2] * factors[1], swiglu_limit)
        odd = swiglu(total[1] * factors[0], total[3] * factors[1], swiglu_limit)
        # Neighbours in g exchange values, so that each has two features of one token.
        is_odd = lane.row % 2
        given = even if is_odd == 1 else odd
        taken = cute.arch.shuffle_sync_bfly(given, offset=4)
        low = taken if is_odd == 1 else even
        high = odd if is_odd == 1 else taken
        token = 2 * lane.pair + is_odd
        place = memory.hidden + token * cfg.hidden_pitch + 2 * (feature + lane.row // 2 * 2)
        word = ptx.pack_bf16x2(low, high)
        for peer in cutlass.range_constexpr(cfg.cluster):
            ptx.store_async(place, memory.arrived.toint(), Int32(peer), word)

    @cute.jit
    def gate_and_up(
        self, block: int, memory: SliceMemory, part: SliceShare, lane: SliceLane, scale_bits: Uint32
    ) -> cute.Tensor:
        """Returns this group's sums of a 64-row block of gate and up: rows (g, g, g + 8, g + 8) of two tokens."""
        cfg = self.cfg
        # A position in the ring does not outlive the function that moves it.
        ring = memory.ring.consumer_at(block * (part.hidden // STAGE_COLUMNS))
        sums = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        sums.fill(0.0)
        token = cutlass.min(lane.lane % 8, part.rows - 1)
        token_at = memory.tokens + token * TOKEN_BYTES + lane.group * STAGE_COLUMNS + lane.lane // 8 * 16
        for _ in cutlass.range(part.hidden // STAGE_COLUMNS, unroll=1):
            ring.wait()
            words, scales = self.load_block(memory, ring.slot, lane.group, 2, lane)
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
        cfg = self.cfg
        ring = memory.ring.consumer_at(cfg.blocks * (part.hidden // STAGE_COLUMNS))
        start = memory.hidden + lane.lane % 8 * cfg.hidden_pitch + lane.lane // 8 * 16
        tokens = [ptx.load_matrix4(start + 64 * idx) for idx in range(cfg.columns // 32)]
        factors = down.factors(part.expert)
        group_pieces = cfg.pieces // 2
        feature = part.rank * (part.hidden // cfg.cluster) + lane.group * (64 * group_pieces) + lane.warp * 16
        feature += 2 * lane.row
        targets = []
        for idx in cutlass.range_constexpr(2 if cfg.tokens > 1 else 1):
            token = cutlass.min(2 * lane.pair + idx, part.rows - 1)
            place = memory.tile.pair(token) * part.num_slices + part.idx
            targets.append(sums.toint() + (Int64(place) * part.hidden + feature) * 4)
        offset = Int64(0)
        turns = cfg.width // cfg.columns
        for _ in cutlass.range(part.hidden // (64 * cfg.pieces * cfg.cluster), unroll=1):
            totals = [cute.make_rmem_tensor(cute.make_layout(4), Float32) for _ in range(group_pieces)]
            for turn in cutlass.range_constexpr(turns):
                ring.wait()
                if cutlass.const_expr(turns > 1):
                    # Kept in registers, all of a wide slice would leave too few.
                    tokens = [ptx.load_matrix4(start + 64 * (4 * turn + idx)) for idx in range(4)]
                for piece in cutlass.range_constexpr(group_pieces):
                    block, total = lane.group * group_pieces + piece, totals[piece]
                    words, scales = self.load_block(memory, ring.slot, block, cfg.columns // 64, lane)
                    if cutlass.const_expr(turn == 0):
                        total.fill(0.0)
                    for step in cutlass.range_constexpr(cfg.columns // 16):
                        self.step(words, scales, tokens, step, total, 0, scale_bits)
                ring.release(ring.slot, lane.thread)
                ring.advance()
            for piece in cutlass.range_constexpr(group_pieces):
                for idx in cutlass.range_constexpr(len(targets)):
                    if 2 * lane.pair + idx < part.rows:
                        both = (totals[piece][idx] * factors[0], totals[piece][2 + idx] * factors[1])
                        ptx.store_global_vec2(targets[idx] + (offset + 256 * piece), both)
            offset += 256 * cfg.pieces

    def load_block(
        self, memory: SliceMemory, slot: Int32, block: Int32, halves: int, lane: SliceLane
    ) -> tuple[list[Uint32], list[Uint32]]:
        """Loads this thread's codes (a word per k16 step) and scales (a word per two steps) of a block of a stage."""
        code_bytes = halves * 2048
        codes = memory.codes + slot * STAGE_CODES + block * code_bytes + lane.warp * 512 + lane.lane * 16
        scales = memory.scales + slot * STAGE_SCALES + block * (code_bytes // 8) + lane.warp * 64 + lane.row * 8
        words = [word for half in range(halves) for word in ptx.load_shared_vec4(codes + half * 2048)]
        return words, [word for half in range(halves) for word in ptx.load_shared_vec2(scales + half * 256)]

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

    ids = pointer(Int64 if config.wide_ids else Int32, 4)
    weight = (pointer(Uint8, 128), pointer(Uint8, 128), pointer(Float32, 4))
    tokens = (pointer(BFloat16, 16), ids, pointer(Int32, 4), pointer(Int32, 16))
    pointers = (*tokens, *weight, *weight, pointer(Float32, 16))
    return cute.compile(SlicedExperts(config), *pointers, *[Int32(1)] * 7, Float32(0.0), Int32(1))
