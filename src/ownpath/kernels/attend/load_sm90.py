"""Loads of the attention kernel: keys by the third warpgroup, queries by the multiplying ones."""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    HEAD_DIM,
    NUM_ROTARY,
    TILE_HEADS,
    TILE_KEYS,
)
from ownpath.kernels.attend.parts_sm90 import (
    CHUNK_BYTES,
    CONSUMERS,
    HALF,
    Q_READY,
    STAGE_BYTES,
    WINDOW,
    AttendMemory,
    AttendParts,
    AttendReads,
    AttendShare,
)
from ownpath.kernels.dsl import ptx

HEADS_AT_ONCE = 4
"""Heads that a warp norms together."""


class AttendLoads(AttendParts):
    """Fills shared memory."""

    @cute.jit
    def key_row(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int32:
        """Returns a key's row of the entries; -1 - row for one of the window. A missing key has `own_place`."""
        cfg = self.cfg
        row = -1 - self.own_place(share)
        if key < share.num_window:
            row = -1 - self.ring_place(share, key)
        if cutlass.const_expr(cfg.per_block):
            if key >= share.num_window and key < share.num_keys:
                entry = key - share.num_window
                line = inputs.table.toint() + Int64(share.row) * inputs.width * 4
                if cutlass.const_expr(cfg.selected):
                    row = attend_ptx.load_word(line + entry * 4)
                else:
                    block = attend_ptx.load_word(line + entry // cfg.per_block * 4)
                    row = block * cfg.per_block + entry % cfg.per_block
        return row

    def own_place(self, share: AttendShare) -> Int32:
        """Returns a row of the ring that the share's row sees in any case: the ring's first, or in a longer ring, whose
        first may lie behind the window, its own."""
        return share.position % (WINDOW + self.cfg.spare) if self.cfg.spare else Int32(0)

    @cute.jit
    def ring_place(self, share: AttendShare, key: Int32) -> Int32:
        """Returns the row of the ring that holds a key of the window: of the position, among the last 128, that is its
        number modulo 128. So the keys' order does not depend on the length of the ring."""
        place = key
        if cutlass.const_expr(self.cfg.spare):
            ring = WINDOW + self.cfg.spare
            place = share.position % ring - ((share.position - key) & (WINDOW - 1))
            if place < 0:
                place += ring
        return place

    @cute.jit
    def key_address(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int64:
        """Returns the address of a BF16 key."""
        row = self.key_row(inputs, share, key)
        address = inputs.window.toint() + (Int64(share.slot) * (WINDOW + self.cfg.spare) - 1 - row) * (HEAD_DIM * 2)
        if cutlass.const_expr(self.cfg.per_block):
            if row >= 0:
                address = inputs.entries.toint() + Int64(row) * (HEAD_DIM * 2)
        return address

    @cute.jit
    def load_keys(self, inputs: AttendReads, share: AttendShare, memory: AttendMemory, idx: Int32) -> None:
        """Gathers the keys of every tile, the left half of the channels first. A warp has 16 keys, one to a copy."""
        warp, lane = idx // 32, idx % 32
        # Lane l copies 16-byte unit l of a half: unit l % 8 of chunk l // 8, exchanged within a line by the key.
        base = memory.keys.toint() + lane // 8 * CHUNK_BYTES + warp * (16 * 128)
        first = share.first_tile * TILE_KEYS + warp * 16
        mine = self.key_address(inputs, share, first + lane % 16)
        cute.arch.griddepcontrol_wait()
        for i in cutlass.range(share.num_tiles, unroll=1):
            key0 = first + i * TILE_KEYS
            phase = ((i >> 1) & 1) ^ 1
            for half in cutlass.range_constexpr(2):
                stage = (i & 1) * 2 + half
                cute.arch.mbarrier_wait(memory.pipeline.empty + stage, phase)
                for j in cutlass.range_constexpr(16):
                    source = Int64(cute.arch.shuffle_sync(mine, j)) + (half * (HALF * 2) + lane * 16)
                    num_bytes = Int32(0)
                    if key0 + j < share.num_keys:
                        num_bytes = Int32(16)
                    target = base + stage * STAGE_BYTES + j * 128 + ((lane % 8) ^ (j % 8)) * 16
                    attend_ptx.copy16(target, source, num_bytes)
                attend_ptx.arrive_after_copies(memory.pipeline.full + stage)
            mine = self.key_address(inputs, share, key0 + TILE_KEYS + lane % 16)

    @cute.jit
    def copy_queries(self, inputs: AttendReads, memory: AttendMemory, thread: Int32) -> None:
        """Starts copying this CTA's queries, 8 heads to a warp: two units of a head to a thread; zeros for none."""
        _, group, row = cute.arch.block_idx()
        warp, lane = thread // 32, thread % 32
        head0 = group * TILE_HEADS + warp * 8
        line = inputs.q.toint() + (Int64(row) * inputs.q_row + head0 * inputs.q_head) * 2 + lane * 16
        base = memory.q.toint() + lane // 8 * CHUNK_BYTES + warp * 8 * 128
        for h in cutlass.range_constexpr(8):
            num_bytes = Int32(0)
            if head0 + h < inputs.num_heads:
                num_bytes = Int32(16)
            for half in cutlass.range_constexpr(2):
                target = base + h * 128 + ((lane % 8) ^ h) * 16 + half * (4 * CHUNK_BYTES)
                attend_ptx.copy16(target, line + h * inputs.q_head * 2 + half * (HALF * 2), num_bytes)
            if cutlass.const_expr(h % HEADS_AT_ONCE == HEADS_AT_ONCE - 1):
                cute.arch.cp_async_commit_group()

    @cute.jit
    def load_queries(self, inputs: AttendReads, share: AttendShare, memory: AttendMemory, thread: Int32) -> None:
        """Norms and rotates the queries in shared memory once their copies are there, some heads at a time.

        A thread has what it copied, and nobody else touches that before it is done.
        """
        warp, lane = thread // 32, thread % 32
        base = memory.q.toint() + lane // 8 * CHUNK_BYTES + warp * 8 * 128
        # Of the rotary channels, a lane has a unit of two heads: four pairs.
        angles = (Int64(share.row) * (NUM_ROTARY // 2) + lane % 8 * 4) * 4
        cos = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.cos.toint() + angles)]
        sin = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.sin.toint() + angles)]
        for h in cutlass.range_constexpr(0, 8, HEADS_AT_ONCE):
            cute.arch.cp_async_wait_group((7 - h) // HEADS_AT_ONCE)
            self.norm_heads(
                [base + head * 128 + ((lane % 8) ^ head) * 16 for head in range(h, h + HEADS_AT_ONCE)], inputs.eps
            )
        cute.arch.sync_warp()
        for turn in cutlass.range_constexpr(2):
            head = lane // 8 + 4 * turn
            place = memory.q.toint() + 7 * CHUNK_BYTES + (warp * 8 + head) * 128 + ((lane % 8) ^ head) * 16
            words = ptx.load_shared_vec4(place)
            attend_ptx.store_shared_words(place, self.rotated(words, cos, sin))
        attend_ptx.fence_async()
        attend_ptx.barrier_sync(Q_READY, CONSUMERS)

    def norm_heads(self, places: list[Int32], eps: Float32) -> None:
        """Norms a warp's heads in place, one step of all after the other. places: of a lane's first unit; its second
        one is half the channels on."""
        heads = [(*ptx.load_shared_vec4(place), *ptx.load_shared_vec4(place + 4 * CHUNK_BYTES)) for place in places]
        totals = []
        for words in heads:
            total = Float32(0.0)
            for word in words:
                low, high = ptx.widen_bf16(word, False), ptx.widen_bf16(word, True)
                total = attend_ptx.fma(high, high, attend_ptx.fma(low, low, total))
            totals.append(total)
        for power in range(5):
            totals = [total + cute.arch.shuffle_sync_bfly(total, 1 << power) for total in totals]
        for place, words, total in zip(places, heads, totals, strict=True):
            factor = attend_ptx.rsqrt(attend_ptx.fma(total, 1.0 / HEAD_DIM, eps))
            normed = [
                ptx.pack_bf16x2(ptx.widen_bf16(word, False) * factor, ptx.widen_bf16(word, True) * factor)
                for word in words
            ]
            attend_ptx.store_shared_words(place, tuple(normed[:4]))
            attend_ptx.store_shared_words(place + 4 * CHUNK_BYTES, tuple(normed[4:]))

    def rotated(self, words: tuple[Uint32, ...], cos: list[Float32], sin: list[Float32]) -> tuple[Uint32, ...]:
        """Rotates pairs of channels."""
        turned = []
        for word, c, s in zip(words, cos, sin, strict=True):
            x0, x1 = ptx.widen_bf16(word, False), ptx.widen_bf16(word, True)
            turned.append(ptx.pack_bf16x2(attend_ptx.fma(x0, c, -(x1 * s)), attend_ptx.fma(x0, s, x1 * c)))
        return tuple(turned)
