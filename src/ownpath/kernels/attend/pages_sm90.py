"""Keys in FP8 pages: the third warpgroup loads them into registers and decodes them into shared memory."""

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint32, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import KEY_BYTES, KEY_DATA, TILE_KEYS
from ownpath.kernels.attend.load_sm90 import AttendLoads
from ownpath.kernels.attend.parts_sm90 import (
    CHUNK,
    CHUNK_BYTES,
    HALF,
    STAGE_BYTES,
    WINDOW,
    AttendMemory,
    AttendReads,
    AttendShare,
)
from ownpath.kernels.dsl import ptx

WARP_KEYS = 16
HALF_CHUNKS = HALF // CHUNK
HALF_LOADS = 2 * HALF_CHUNKS, 2 * HALF_CHUNKS + 2
"""16-byte loads of a thread: two of a chunk's codes, four of the rotary channels, which are the last chunk."""


@dataclass(frozen=True)
class PagePlace:
    """A lane's part of a stage: the key's line of the first chunk, of which it has units ``side``, ``side`` + 2, ..;
    units of a line are exchanged by ``swap``."""

    line: Int32
    swap: Int32
    side: Int32

    def unit(self, idx: int, width: int) -> Int32:
        """Returns the address of BF16 unit ``idx`` from the lane's first on, which is unit ``side`` x ``width``."""
        return (self.line + ((self.side * width) ^ self.swap) * 16) ^ (idx * 16)


class AttendPages(AttendLoads):
    """Fills the keys' stages from FP8 pages.

    A warp has 16 keys of a tile, a lane half of each chunk of one key: its codes have the same scale, and eight lanes
    write eight different banks. A tile waits in registers until its stages are free; as soon as half of it is written,
    half of the next one is on its way.
    """

    @cute.jit
    def table_word(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int32:
        """Loads what the table has for a key: its row of the entries, or its block. 0 for one of the window."""
        cfg = self.cfg
        word = Int32(0)
        if cutlass.const_expr(cfg.per_block):
            if key >= share.num_window and key < share.num_keys:
                line = inputs.table.toint() + Int64(share.row) * inputs.width * 4
                entry = key - share.num_window
                if cutlass.const_expr(not cfg.selected):
                    entry = entry // cfg.per_block
                word = attend_ptx.load_word(line + entry * 4)
        return word

    @cute.jit
    def page_address(self, inputs: AttendReads, share: AttendShare, key: Int32, word: Int32) -> tuple[Int64, Int64]:
        """Returns the addresses of a key and of its scales. The window's first stands for one that is not there."""
        per_block = self.cfg.per_block
        place = Int32(0)
        if key < share.num_window:
            place = key
        page = inputs.window.toint() + Int64(share.slot) * (WINDOW * KEY_BYTES)
        scales = page + WINDOW * KEY_DATA
        if cutlass.const_expr(per_block):
            if key >= share.num_window and key < share.num_keys:
                block = word
                place = (key - share.num_window) % per_block
                if cutlass.const_expr(self.cfg.selected):
                    block, place = word // per_block, word % per_block
                page = inputs.entries.toint() + Int64(block) * (per_block * KEY_BYTES)
                scales = page + per_block * KEY_DATA
        return page + place * KEY_DATA, scales + place * (KEY_BYTES - KEY_DATA)

    @cute.jit
    def load_pages(self, inputs: AttendReads, share: AttendShare, memory: AttendMemory, idx: Int32) -> None:
        """Loads and decodes the keys of every tile, the left half of the channels first."""
        warp, lane = idx // 32, idx % 32
        row, side = warp * WARP_KEYS + lane % WARP_KEYS, lane // WARP_KEYS
        key = share.first_tile * TILE_KEYS + row
        raw = cute.make_rmem_tensor(sum(HALF_LOADS) * 4, Uint32)
        scales = cute.make_rmem_tensor(3, Uint32)
        sixteen = attend_ptx.unknown_sixteen()
        word = self.table_word(inputs, share, key)
        cute.arch.griddepcontrol_wait()
        address, place = self.page_address(inputs, share, key, word)
        if share.num_tiles > 0:
            for half in cutlass.range_constexpr(2):
                self.start_half(raw, scales, address + side * 16, place, half)
        scales[1] = scales[2]
        word = self.table_word(inputs, share, key + TILE_KEYS)
        line = memory.keys.toint() + row * 128
        for i in cutlass.range(share.num_tiles, unroll=1):
            key += TILE_KEYS
            for half in cutlass.range_constexpr(2):
                stage = (i & 1) * 2 + half
                cute.arch.mbarrier_wait(memory.pipeline.empty + stage, ((i >> 1) & 1) ^ 1)
                target = PagePlace(line + stage * STAGE_BYTES, row % 8, side)
                self.decode_half(raw, scales[half], target, sixteen, half)
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(memory.pipeline.full + stage)
                if i + 1 < share.num_tiles:
                    address, place = self.page_address(inputs, share, key, word)
                    self.start_half(raw, scales, address + side * 16, place, half)
            scales[1] = scales[2]
            word = self.table_word(inputs, share, key + TILE_KEYS)

    def start_half(self, raw: cute.Tensor, scales: cute.Tensor, address: Int64, place: Int64, half: int) -> None:
        """Starts loading half of a lane's key; all its scales come with the first half."""
        if half == 0:
            scales[0], scales[2] = attend_ptx.load_words2(place)
        start = half * HALF_LOADS[0] * 4
        for turn in range(HALF_LOADS[half]):
            # The rotary channels follow the codes, and take 128 bytes instead of 64.
            words = attend_ptx.load_once(address + (half * HALF + turn * 32))
            for at in range(4):
                raw[start + turn * 4 + at] = words[at]

    @cute.jit
    def decode_half(
        self, raw: cute.Tensor, scales: Uint32, place: PagePlace, sixteen: Uint32, half: cutlass.Constexpr
    ) -> None:
        """Decodes half a key into a stage."""
        words = [
            tuple(raw[(half * HALF_LOADS[0] + turn) * 4 + at] for at in range(4)) for turn in range(HALF_LOADS[half])
        ]
        for chunk in cutlass.range_constexpr(HALF_CHUNKS - half):
            factor = attend_ptx.scale_pair(scales, chunk)
            for turn in cutlass.range_constexpr(2):
                codes = words[2 * chunk + turn]
                pairs = [
                    attend_ptx.decode_pair(code, is_high, factor, sixteen) for code in codes for is_high in (False, True)
                ]
                for unit in cutlass.range_constexpr(2):
                    address = place.unit(turn * 4 + unit, 2) + chunk * CHUNK_BYTES
                    attend_ptx.store_shared_words(address, tuple(pairs[4 * unit : 4 * unit + 4]))
        if cutlass.const_expr(half == 1):
            for turn in cutlass.range_constexpr(4):
                address = place.unit(2 * turn, 1) + (HALF_CHUNKS - 1) * CHUNK_BYTES
                attend_ptx.store_shared_words(address, words[2 * (HALF_CHUNKS - 1) + turn])
        if attend_ptx.any_scale_above(scales) != 0:
            self.scale_more(scales, place, half)

    @cute.jit
    def scale_more(self, scales: Uint32, place: PagePlace, half: cutlass.Constexpr) -> None:
        """Multiplies what this lane decoded by what is left of the scales: those above 2^7 take two steps."""
        for chunk in cutlass.range(HALF_CHUNKS - half, unroll=1):
            factor = attend_ptx.rest_of_scale(scales, chunk)
            for unit in cutlass.range_constexpr(4):
                address = place.unit(unit // 2 * 4 + unit % 2, 2) + chunk * CHUNK_BYTES
                words = ptx.load_shared_vec4(address)
                attend_ptx.store_shared_words(address, tuple([ptx.mul_bf16x2(word, factor) for word in words]))
