"""Keys in FP8 pages: the third warpgroup loads them into registers and decodes them into shared memory."""

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, Uint32, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import KEY_BYTES, KEY_DATA, TILE_KEYS, WG
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
"""16-byte loads of a thread: of each of two keys one of a chunk's codes, two of the rotary channels, the last chunk."""


@dataclass(frozen=True)
class PagePlace:
    """A lane's part of a stage: the line in the first chunk of its first key; the second one's is 8 lines on. ``key``:
    what a line's units are exchanged by. ``unit``: of a chunk's four units of codes."""

    line: Int32
    key: Int32
    unit: Int32

    def of(self, sub: int, unit: Int32) -> Int32:
        """Returns the address of a BF16 unit of one of two keys."""
        return self.line + sub * 1024 + (unit ^ self.key) * 16


@dataclass(frozen=True)
class PageGuess:
    """The word of a full list for a thread's first key, if the share begins at ``first_tile``."""

    first_tile: Int32
    word: Int32


def first_key(share: AttendShare, idx: Int32) -> Int32:
    """Returns the key of a loading thread in its share's first tile: of its lane modulo 16."""
    return share.first_tile * TILE_KEYS + idx // 32 * WARP_KEYS + idx % WARP_KEYS


class AttendPages(AttendLoads):
    """Fills the keys' stages from FP8 pages.

    A warp has 16 keys of a tile, a lane a fourth of each chunk of two of them: four lanes read 64 bytes of a key, and
    eight write to different banks. A tile waits in registers until its stages are free; as soon as half of it is
    written, half of the next one is on its way.
    """

    @cute.jit
    def table_word(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int32:
        """Loads what the table has for a key: its row of the entries, or its block. Its first word for other keys."""
        cfg = self.cfg
        word = Int32(0)
        if cutlass.const_expr(cfg.per_block):
            entry = Int32(0)
            if key >= share.num_window and key < share.num_keys:
                entry = key - share.num_window
            if cutlass.const_expr(not cfg.selected):
                entry = entry // cfg.per_block
            word = attend_ptx.load_word(inputs.table.toint() + (Int64(share.row) * inputs.width + entry) * 4)
        return word

    @cute.jit
    def page_address(self, inputs: AttendReads, share: AttendShare, key: Int32, word: Int32) -> tuple[Int64, Int64]:
        """Returns the addresses of a key and of its scales. ``own_place`` stands for one that is not there."""
        per_block = self.cfg.per_block
        place = self.own_place(share)
        if key < share.num_window:
            place = self.ring_place(share, key)
        ring = WINDOW + self.cfg.spare
        page = inputs.window.toint() + Int64(share.slot) * (ring * KEY_BYTES)
        scales = page + ring * KEY_DATA
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
    def guess_pages(self, inputs: AttendReads, end: Int32, slot: Int32, thread: Int32) -> PageGuess:
        """Starts a loading thread's first look into the list of selected rows as if that were full, before its length
        is known. Other threads' is for nothing: a branch would make them wait for the length first."""
        share = self.share_of(inputs, end, slot, inputs.width)
        word = self.table_word(inputs, share, first_key(share, thread % WG))
        return PageGuess(share.first_tile, word)

    @cute.jit
    def load_pages(
        self, inputs: AttendReads, share: AttendShare, memory: AttendMemory, guess: PageGuess, idx: Int32
    ) -> None:
        """Loads and decodes the keys of every tile, the left half of the channels first."""
        warp, lane = idx // 32, idx % 32
        key = first_key(share, idx)
        raw = cute.make_rmem_tensor(sum(HALF_LOADS) * 4, Uint32)
        scales = cute.make_rmem_tensor(2, Uint32)
        sixteen = attend_ptx.unknown_sixteen()
        word = guess.word
        if not self.cfg.selected or share.first_tile != guess.first_tile:
            word = self.table_word(inputs, share, key)
        cute.arch.griddepcontrol_wait()
        address, place = self.page_address(inputs, share, key, word)
        if share.num_tiles > 0:
            for half in cutlass.range_constexpr(2):
                self.start_half(raw, scales, address, place, lane, half)
        word = self.table_word(inputs, share, key + TILE_KEYS)
        line = memory.keys.toint() + (warp * WARP_KEYS + lane % 8) * 128
        for i in cutlass.range(share.num_tiles, unroll=1):
            key += TILE_KEYS
            for half in cutlass.range_constexpr(2):
                stage = (i & 1) * 2 + half
                cute.arch.mbarrier_wait(memory.pipeline.empty + stage, ((i >> 1) & 1) ^ 1)
                target = PagePlace(line + stage * STAGE_BYTES, lane % 8, lane // 8)
                self.decode_half(raw, scales[half], target, sixteen, half)
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(memory.pipeline.full + stage)
                if i + 1 < share.num_tiles:
                    address, place = self.page_address(inputs, share, key, word)
                    self.start_half(raw, scales, address, place, lane, half)
            word = self.table_word(inputs, share, key + TILE_KEYS)

    def start_half(
        self, raw: cute.Tensor, scales: cute.Tensor, address: Int64, place: Int64, lane: Int32, half: int
    ) -> None:
        """Starts loading half of a lane's keys, and that half's four scales or three of them and a byte."""
        scales[half] = Uint32(attend_ptx.load_word(place + half * 4))
        starts = [Int64(cute.arch.shuffle_sync(address, lane % 8 + 8 * sub)) + lane // 8 * 16 for sub in range(2)]
        start = half * HALF_LOADS[0] * 4
        for turn in range(HALF_LOADS[half] // 2):
            for sub in range(2):
                # The rotary channels follow the codes, and take 128 bytes instead of 64.
                words = attend_ptx.load_once(starts[sub] + (half * HALF + turn * 64))
                for at in range(4):
                    raw[start + (turn * 2 + sub) * 4 + at] = words[at]

    @cute.jit
    def decode_half(
        self, raw: cute.Tensor, scales: Uint32, place: PagePlace, sixteen: Uint32, half: cutlass.Constexpr
    ) -> None:
        """Decodes half of two keys into a stage. scales: of the warp's key ``lane % 16``."""
        words = [
            tuple(raw[(half * HALF_LOADS[0] + turn) * 4 + at] for at in range(4)) for turn in range(HALF_LOADS[half])
        ]
        for sub in cutlass.range_constexpr(2):
            own = Uint32(cute.arch.shuffle_sync(scales, place.key + 8 * sub))
            for chunk in cutlass.range_constexpr(HALF_CHUNKS - half):
                factor = attend_ptx.scale_pair(own, chunk)
                codes = words[2 * chunk + sub]
                pairs = [
                    attend_ptx.decode_pair(code, is_high, factor, sixteen)
                    for code in codes
                    for is_high in (False, True)
                ]
                for unit in cutlass.range_constexpr(2):
                    address = place.of(sub, 2 * place.unit + unit) + chunk * CHUNK_BYTES
                    attend_ptx.store_shared_words(address, tuple(pairs[4 * unit : 4 * unit + 4]))
            if cutlass.const_expr(half == 1):
                for turn in cutlass.range_constexpr(2):
                    address = place.of(sub, place.unit + 4 * turn) + (HALF_CHUNKS - 1) * CHUNK_BYTES
                    attend_ptx.store_shared_words(address, words[2 * (HALF_CHUNKS - 1 + turn) + sub])
        # The last of eight bytes is no scale.
        if attend_ptx.any_scale_above(scales & (0xFFFFFFFF, 0x00FFFFFF)[half]) != 0:
            self.scale_more(scales, place, half)

    @cute.jit
    def scale_more(self, scales: Uint32, place: PagePlace, half: cutlass.Constexpr) -> None:
        """Multiplies what this lane decoded by what is left of the scales: those above 2^7 take two steps."""
        for sub in cutlass.range_constexpr(2):
            own = Uint32(cute.arch.shuffle_sync(scales, place.key + 8 * sub))
            for chunk in cutlass.range(HALF_CHUNKS - half, unroll=1):
                factor = attend_ptx.rest_of_scale(own, chunk)
                for unit in cutlass.range_constexpr(2):
                    address = place.of(sub, 2 * place.unit + unit) + chunk * CHUNK_BYTES
                    words = ptx.load_shared_vec4(address)
                    attend_ptx.store_shared_words(address, tuple([ptx.mul_bf16x2(word, factor) for word in words]))
