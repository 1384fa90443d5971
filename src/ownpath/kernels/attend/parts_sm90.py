"""The parts of the attention kernel have in common: its arguments, a CTA's memory and its place."""

from dataclasses import dataclass

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from ownpath.kernels.attend import ptx as attend_ptx
from ownpath.kernels.attend.config_sm90 import (
    BLOCK_TOKENS,
    HEAD_DIM,
    TILE_HEADS,
    TILE_KEYS,
    WG,
    AttendConfig,
)
from ownpath.kernels.dsl.pipeline import Pipeline

WINDOW = 128
HALF = HEAD_DIM // 2
CHUNK = 64
"""Channels of a swizzled line of 128 bytes."""
CHUNK_BYTES = TILE_KEYS * CHUNK * 2
STAGE_BYTES = TILE_KEYS * HALF * 2
CONSUMERS = 2 * WG
P_FULL, P_EMPTY, SUMS_READY, Q_READY, KEYS_READ = 1, 3, 5, 6, 7
"""Named barriers; the first two have one for each buffer of weights."""
P_BYTES = TILE_HEADS * TILE_KEYS * 2
LINE_BYTES = TILE_HEADS * 4
LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class AttendReads:
    """The kernel's arguments. q_row, q_head: elements from row to row and from head to head of q. table: the
    rows' blocks or selected rows, ``width`` to a row."""

    q: cute.Pointer
    cos: cute.Pointer
    sin: cute.Pointer
    window: cute.Pointer
    entries: cute.Pointer
    positions: cute.Pointer
    slots: cute.Pointer
    table: cute.Pointer
    counts: cute.Pointer
    sink: cute.Pointer
    num_heads: Int32
    q_row: Int32
    q_head: Int32
    width: Int32
    scale: Float32
    eps: Float32


@dataclass(frozen=True)
class AttendWrites:
    """The addresses of the results: o, or sums [row, split, head, 512] and statistics [row, split, head, 2]."""

    out: cute.Pointer
    sums: cute.Pointer
    stats: cute.Pointer


@dataclass(frozen=True)
class AttendMemory:
    """A CTA's shared memory. lines: float32 [4, 64], factors of each buffer of weights, then what the sums are divided
    by, or the largest scores and the sums of weights."""

    q: cute.Pointer
    keys: cute.Pointer
    p: cute.Pointer
    lines: cute.Pointer
    pipeline: Pipeline


@dataclass(frozen=True)
class AttendShare:
    """A CTA's place: a row, 64 heads from ``head0`` on, and ``num_tiles`` tiles from ``first_tile`` on of the row's
    ``num_keys`` keys, of which ``num_window`` are the window's. position: the row's."""

    row: Int32
    head0: Int32
    split: Int32
    num_splits: Int32
    slot: Int32
    position: Int32
    num_window: Int32
    num_keys: Int32
    first_tile: Int32
    num_tiles: Int32


class AttendParts:
    """A configuration's memory and places."""

    def __init__(self, config: AttendConfig) -> None:
        self.cfg = config

    def allocate(self) -> AttendMemory:
        """Allocates all of a CTA's shared memory."""
        q = cute.arch.alloc_smem(BFloat16, TILE_HEADS * HEAD_DIM, 1024)
        keys = cute.arch.alloc_smem(BFloat16, 4 * TILE_KEYS * HALF, 1024)
        p = cute.arch.alloc_smem(BFloat16, 2 * TILE_HEADS * TILE_KEYS, 1024)
        lines = cute.arch.alloc_smem(Float32, 4 * TILE_HEADS, 16)
        return AttendMemory(q, keys, p, lines, Pipeline.allocate(4))

    @cute.jit
    def row_state(self, inputs: AttendReads) -> tuple[Int32, Int32]:
        """Loads the number of tokens up to this CTA's row, and its slot."""
        _, _, row = cute.arch.block_idx()
        end = attend_ptx.load_word(inputs.positions.toint() + Int64(row) * 4) + 1
        return end, attend_ptx.load_word(inputs.slots.toint() + Int64(row) * 4)

    @cute.jit
    def share(self, inputs: AttendReads, end: Int32, slot: Int32) -> AttendShare:
        """Returns this CTA's share. end, slot: ``row_state``."""
        count = Int32(0)
        if cutlass.const_expr(self.cfg.selected):
            _, _, row = cute.arch.block_idx()
            count = attend_ptx.load_word(inputs.counts.toint() + Int64(row) * 4)
        elif cutlass.const_expr(self.cfg.per_block):
            count = end // (BLOCK_TOKENS // self.cfg.per_block)
        share: AttendShare = self.share_of(inputs, end, slot, count)
        return share

    @cute.jit
    def share_of(self, inputs: AttendReads, end: Int32, slot: Int32, count: Int32) -> AttendShare:
        """Returns this CTA's share of a row that has ``count`` entries, or as many as the table has."""
        cfg = self.cfg
        split, group, row = cute.arch.block_idx()
        num_splits, _, _ = cute.arch.grid_dim()
        num_window = cutlass.min(end, WINDOW)
        num_keys = num_window
        if cutlass.const_expr(cfg.per_block):
            most = inputs.width
            if cutlass.const_expr(not cfg.selected):
                most = inputs.width * cfg.per_block
            num_keys = num_window + cutlass.min(count, most)
        tiles = (num_keys + TILE_KEYS - 1) // TILE_KEYS
        first, num_tiles = Int32(0), tiles
        if cutlass.const_expr(cfg.split or cfg.merges):
            each = (tiles + num_splits - 1) // num_splits
            first = cutlass.min(split * each, tiles)
            num_tiles = cutlass.min(each, tiles - first)
        head0, position = group * TILE_HEADS, end - 1
        return AttendShare(row, head0, split, num_splits, slot, position, num_window, num_keys, first, num_tiles)
