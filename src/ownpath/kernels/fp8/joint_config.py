"""Compile-time configuration of the W8A8 product with a quantiser in the same launch. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.fp8.config import ACT_STRIDE, ENTRY_BYTES, MAX_CLUSTER, MAX_SMEM, STAGES_OF_SUMS, WG
from ownpath.kernels.fp8.layout import BLOCK_BYTES

GROUP_ROWS = 8
"""Rows that a warp quantises at a time."""
CHUNK_BLOCKS = 4
"""Blocks of K that a warp quantises at a time, and the product waits for."""
DEPTH = 3
"""Chunks that a quantising warp has asked for at a time."""
PITCH = CHUNK_BLOCKS * 256 + 16
"""Bytes from row to row of a chunk; neighbouring rows lie in other banks."""
REGISTERS = {2: (56, 224), 3: (56, 152)}
"""Registers of loading and quantising threads, and of multiplying ones, by warpgroups that multiply."""


@dataclass(frozen=True)
class JointW8A8Config:
    """The shape of one compiled kernel: fields as ``W8A8Config``."""

    warpgroups: int
    num_m64: int
    num_stages: int
    cluster_n: int = 1
    cluster_k: int = 1
    ragged: ClassVar[bool] = False
    num_n64: ClassVar[int] = 2
    compiler: ClassVar[str] = "fp8.w8a8_joint_sm90:compile_joint_w8a8"

    def __post_init__(self) -> None:
        if (self.warpgroups, self.num_m64) not in ((2, 1), (2, 2), (3, 1)):
            raise ValueError(f"warpgroups={self.warpgroups} with num_m64={self.num_m64}: 2 with 1 or 2, or 3 with 1")
        if self.cluster_n not in (1, 2):
            raise ValueError(f"cluster_n={self.cluster_n}: 1 or 2")
        if not 1 <= self.cluster_k <= MAX_CLUSTER or self.cluster > MAX_CLUSTER:
            raise ValueError(f"cluster_k={self.cluster_k}: clusters have 1 to {MAX_CLUSTER} CTAs")
        stages, fewest = joint_w8a8_stages(self.m64_per_tile), 2 if self.cluster_k == 1 else STAGES_OF_SUMS
        if not fewest <= self.num_stages <= stages:
            raise ValueError(f"num_stages={self.num_stages}: at least {fewest}, at most {stages} fit shared memory")

    @property
    def name(self) -> str:
        shape = f"w{self.warpgroups}r{self.num_m64}s{self.num_stages}c{self.cluster_n}k{self.cluster_k}"
        return f"fp8_w8a8_joint_{shape}"

    @property
    def sources(self) -> tuple[str, ...]:
        own = (
            "w8a8_joint_sm90",
            "joint_config",
            "w8a8_sm90",
            "w8a8_tiles_sm90",
            "output_sm90",
            "ptx",
            "config",
            "layout",
        )
        return (*(f"fp8/{name}.py" for name in own), *(f"dsl/{name}.py" for name in ("pipeline", "warpgroup", "ptx")))

    @property
    def num_threads(self) -> int:
        return WG * (self.warpgroups + 1)

    @property
    def cluster(self) -> int:
        return self.cluster_n * self.cluster_k

    @property
    def m64_per_tile(self) -> int:
        return self.warpgroups * self.num_m64

    def num_tiles(self, num_tokens: int, num_row_blocks: int) -> int:
        return -(-num_tokens // (64 * self.m64_per_tile)) * -(-num_row_blocks // (2 * self.cluster_n))

    def grid(self, num_tokens: int, num_row_blocks: int, num_sms: int) -> int:
        if self.cluster_k > 1:
            return self.cluster * self.num_tiles(num_tokens, num_row_blocks)
        return self.cluster_n * min(self.num_tiles(num_tokens, num_row_blocks), num_sms // self.cluster_n)


def joint_w8a8_stages(m64_per_tile: int) -> int:
    """Returns the number of stages that fit an SM's shared memory."""
    chunks = 2 * DEPTH * (GROUP_ROWS * PITCH + 8)
    return (MAX_SMEM - 2048 - chunks) // (m64_per_tile * ACT_STRIDE + 2 * (BLOCK_BYTES + ENTRY_BYTES) + 16)


def num_counters(num_tokens: int, num_k_blocks: int) -> int:
    """Returns the int32 counters of a call: ticket, finished warps, and chunks done by 64 tokens and chunk of K."""
    return 2 + -(-num_tokens // 64) * -(-num_k_blocks // CHUNK_BLOCKS)
