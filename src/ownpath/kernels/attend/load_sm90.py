"""Loads of the attention kernel: keys by the third warpgroup, queries by the multiplying ones."""

import cutlass
from cutlass import Float32, Int32, Int64, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    HEAD_DIM,
    NUM_ROTARY,
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


class AttendLoads(AttendParts):
    """Fills shared memory."""

    @cute.jit
    def key_row(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int32:
        """Returns a key's row of the entries; -1 - row for one of the window, whose first stands for missing keys."""
        cfg = self.cfg
        row = Int32(-1)
        if key < share.num_window:
            row = -1 - key
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

    @cute.jit
    def key_address(self, inputs: AttendReads, share: AttendShare, key: Int32) -> Int64:
        """Returns the address of a BF16 key."""
        row = self.key_row(inputs, share, key)
        address = inputs.window.toint() + (Int64(share.slot) * WINDOW - 1 - row) * (HEAD_DIM * 2)
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
    def load_queries(self, inputs: AttendReads, share: AttendShare, memory: AttendMemory, thread: Int32) -> None:
        """Norms and rotates the queries into shared memory: a head to a warp, 8 heads one after the other."""
        warp, lane = thread // 32, thread % 32
        head0 = share.head0 + warp * 8
        line = inputs.q.toint() + (Int64(share.row) * inputs.q_row + head0 * inputs.q_head) * 2 + lane * 16
        words = []
        for h in cutlass.range_constexpr(8):
            inside = Int32(0)
            if head0 + h < inputs.num_heads:
                inside = Int32(1)
            address = line + h * inputs.q_head * 2
            words.append(
                (
                    *attend_ptx.load_words_or_zero(address, inside),
                    *attend_ptx.load_words_or_zero(address + HALF * 2, inside),
                )
            )
        # The last 8 lanes' second units have the rotary channels: four pairs each. Others read what they do not use.
        angles = (Int64(share.row) * (NUM_ROTARY // 2) + lane % 8 * 4) * 4
        cos = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.cos.toint() + angles)]
        sin = [ptx.as_float(word) for word in ptx.load_global_vec4(inputs.sin.toint() + angles)]
        rotates = Int32(0)
        if lane >= 24:
            rotates = Int32(1)
        base = memory.q.toint() + lane // 8 * CHUNK_BYTES + warp * 8 * 128
        for h in cutlass.range_constexpr(8):
            total = Float32(0.0)
            for word in words[h]:
                low, high = ptx.widen_bf16(word, False), ptx.widen_bf16(word, True)
                total = attend_ptx.fma(high, high, attend_ptx.fma(low, low, total))
            for power in cutlass.range_constexpr(5):
                total = total + cute.arch.shuffle_sync_bfly(total, 1 << power)
            factor = attend_ptx.rsqrt(attend_ptx.fma(total, 1.0 / HEAD_DIM, inputs.eps))
            normed = [
                ptx.pack_bf16x2(ptx.widen_bf16(word, False) * factor, ptx.widen_bf16(word, True) * factor)
                for word in words[h]
            ]
            for idx in cutlass.range_constexpr(4):
                x0, x1 = ptx.widen_bf16(normed[4 + idx], False), ptx.widen_bf16(normed[4 + idx], True)
                turned = ptx.pack_bf16x2(
                    attend_ptx.fma(x0, cos[idx], -(x1 * sin[idx])), attend_ptx.fma(x0, sin[idx], x1 * cos[idx])
                )
                normed[4 + idx] = attend_ptx.pick(rotates, turned, normed[4 + idx])
            address = base + h * 128 + ((lane % 8) ^ h) * 16
            attend_ptx.store_shared_words(address, tuple(normed[:4]))
            attend_ptx.store_shared_words(address + 4 * CHUNK_BYTES, tuple(normed[4:]))
        attend_ptx.fence_async()
        attend_ptx.barrier_sync(Q_READY, CONSUMERS)
