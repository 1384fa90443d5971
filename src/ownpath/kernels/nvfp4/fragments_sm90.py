"""A thread's share of a stage's NVFP4 weights: codes and scales, as ``kernels.nvfp4.layout`` puts them there.

A 16-byte load brings the codes of four k16 steps of a 64-row block, an 8-byte load their scales. Left to itself, the
compiler computes their addresses again in every stage, 10 to 16 instructions of 320; with ``per_block`` it cannot.
Roofline: shared memory, 24 bytes a thread for 64 columns. Limits: as ``gemm_sm90``.
"""

from dataclasses import dataclass

from cutlass import Int32, Uint32

from ownpath.kernels.dsl import ptx
from ownpath.kernels.dsl.pipeline import Stages
from ownpath.kernels.dsl.warpgroup import Thread
from ownpath.kernels.nvfp4.config import WG, GemmConfig


@dataclass(frozen=True)
class Half:
    """Words of 64 columns for each 64-row block: four of codes, one to a k16 step, and two of scales, one to two."""

    codes: list[tuple[Uint32, ...]]
    scales: list[tuple[Uint32, ...]]


@dataclass(frozen=True)
class Fragments:
    """The place of a thread's words. codes, scales: byte addresses of its first ones, in the first stage."""

    cfg: GemmConfig
    codes: Int32
    scales: Int32

    @classmethod
    def of(cls, cfg: GemmConfig, stages: Stages, thread: Thread) -> "Fragments":
        """Returns the share of a thread."""
        block = thread.wg_m * (cfg.num_m64 * cfg.warpgroups_k) + thread.wg_k
        codes = stages.weights.toint() + block * cfg.code_bytes + thread.idx * 16
        scales = stages.scales.toint() + block * cfg.scale_bytes + thread.warp * 64 + thread.row * 8
        if cfg.per_block:
            codes, scales = ptx.once(codes), ptx.once(scales)
        return cls(cfg, Int32(codes), Int32(scales))

    def load(self, halves: list[Half], slot: Int32, turn: int) -> None:
        """Appends the 64 columns that group ``turn`` of a stage is the first to need: all of the stage, or half."""
        cfg = self.cfg
        part, first_block = cfg.group_at(turn)
        if cfg.per_block:
            wanted = 1 if first_block == 0 and part * cfg.group % 4 == 0 else 0
        else:
            wanted = cfg.stage_k // 64 if turn == 0 else 0
        for _ in range(wanted):
            halves.append(self._half(slot, len(halves)))

    def _half(self, slot: Int32, half: int) -> Half:
        cfg = self.cfg
        blocks = cfg.m64_per_tile * cfg.warpgroups_k
        codes, scales = self.codes + slot * (blocks * cfg.code_bytes), self.scales + slot * (blocks * cfg.scale_bytes)
        half_of_codes, half_of_scales = [], []
        for block in range(0, blocks // cfg.warpgroups_m, cfg.warpgroups_k):
            half_of_codes.append(ptx.load_shared_vec4(codes + (block * cfg.code_bytes + half * (WG * 16))))
            half_of_scales.append(ptx.load_shared_vec2(scales + (block * cfg.scale_bytes + half * 256)))
        return Half(half_of_codes, half_of_scales)

    @staticmethod
    def words(halves: list[Half], block: int, k16: int) -> tuple[Uint32, Uint32]:
        """Returns the codes of a block's k16 step and its scales, where ``decode`` wants them."""
        half = halves[k16 // 4]
        scales = half.scales[block][k16 % 4 // 2]
        return half.codes[block][k16 % 4], ptx.rotate_right(scales, 8) if k16 % 2 else scales
