"""Tiles of an NVFP4 product, and their distribution over CTAs.

A dense product cuts its tokens itself; experts' products read their tiles from the schedule that ``moe_sm90`` writes.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute

from ownpath.kernels.nvfp4.config import GemmConfig
from ownpath.kernels.nvfp4.schedule import Schedule

BAND_TILES = 16


@dataclass(frozen=True)
class Tile:
    """One tile of a product. m_tile: among the tiles of an expert's weight rows; n_tile: among those of tokens.

    m_group: the tiles of a cluster along M, one for each of its CTAs. expert: 0 for dense weights. row0, rows: the
    tile's token rows.
    """

    m_group: Int32
    m_tile: Int32
    n_tile: Int32
    expert: Int32
    row0: Int32
    rows: Int32


@dataclass(frozen=True)
class TileScheduler:
    """The tiles of a CTA, its share of a product: every ``num_workers``-th tile, and a part of K.

    m_per_worker: tiles of weight rows (of an expert); with clusters along M a worker is a cluster, and a tile one of
    its CTAs' each. rank_m: of the CTA in such a cluster. rank: of the CTA in a cluster along K. k_units: stages' width
    of all of K; k_iters: stages of this CTA.
    """

    cfg: GemmConfig
    schedule: Schedule
    num_rows: Int32
    rows_per_tile: Int32
    worker: Int32
    num_workers: Int32
    m_per_worker: Int32
    num_n_tiles: Int32
    num_tiles: Int32
    k_units: Int32
    k_iters: Int32
    rank: Int32
    rank_m: Int32

    @cute.jit
    def tile(self, idx: Int32) -> Tile:
        """Returns the tile with this number.

        Experts go one after another. Dense products go in bands of weight rows, all tokens of a band first: a wave of
        CTAs then reads few weights and few tokens from memory, and the rest from L2.
        """
        cfg = self.cfg
        m_group, n_tile = idx % self.m_per_worker, idx // self.m_per_worker
        expert, row0, rows = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(cfg.grouped):
            expert = self.schedule.expert(n_tile)
            row0, rows = self.schedule.rows(n_tile)
        else:
            band_tiles = BAND_TILES // cfg.cluster_m
            first = idx // (band_tiles * self.num_n_tiles) * band_tiles
            in_band = idx - first * self.num_n_tiles
            height = cutlass.min(band_tiles, self.m_per_worker - first)
            m_group, n_tile = first + in_band % height, in_band // height
            row0 = n_tile * self.rows_per_tile
            rows = cutlass.min(self.rows_per_tile, self.num_rows - row0)
        return Tile(m_group, m_group * cfg.cluster_m + self.rank_m, n_tile, expert, row0, rows)
