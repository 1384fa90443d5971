"""Compile-time configurations of the NVFP4 kernels. Importable without the DSL, for launchers and the cache."""

import math
from dataclasses import dataclass
from typing import ClassVar

BLOCK_K = 128
CHUNK_K = 64
UNSCALE = 2.0**19
WG = 128
ALIGN_THREADS = 1024
COPY_THREADS = 256
MAX_SHARED_BYTES = 232448
DSL_SOURCES = ("dsl/pipeline.py", "dsl/warpgroup.py", "dsl/ptx.py", "dsl/build.py")


@dataclass(frozen=True)
class GemmConfig:
    """The shape of one compiled kernel.

    num_m64: 64-row blocks per consumer warpgroup. warpgroups_m, warpgroups_k: consumer warpgroups along weight rows
        and along K; those along K work on different 128-wide blocks and are summed in a fixed order.
    n_sizes: token counts of a tile for which ``wgmma`` code exists, ascending.
    cluster_k: CTAs of a cluster that share a tile along K and are summed through distributed shared memory.
    grouped: tiles come from a device-side schedule of experts; otherwise from the token count.
    swiglu: rows are gate/up pairs, the output is silu(gate) * up.
    depth: register buffers of decoded weights; that many less one ``wgmma`` groups run while the next is decoded.
    group: k16 steps of a buffer. cluster_m: CTAs of a cluster that share the tokens of neighbouring tiles.
    stage_k: columns of a stage, 128 or 64: half as much makes more and finer stages for wide tiles.
    wide: the output is float32, for sums that are still to be added up.
    gather: token rows are looked up one by one, in an index behind the schedule, instead of following each other.
    per_sm: CTAs that share an SM, its registers and its shared memory.
    box: token rows of one TMA copy at most.
    per_block: a group of products is one 64-row block's, and codes are read 64 columns at a time: fewest registers.
    """

    num_m64: int
    warpgroups_m: int
    warpgroups_k: int
    n_sizes: tuple[int, ...]
    num_stages: int
    cluster_k: int = 1
    grouped: bool = False
    swiglu: bool = False
    gather: bool = False
    depth: int = 4
    group: int = 1
    cluster_m: int = 1
    stage_k: int = BLOCK_K
    wide: bool = False
    per_sm: int = 1
    box: int = 64
    per_block: bool = False
    compiler: ClassVar[str] = "nvfp4.gemm_sm90:compile_gemm"

    def __post_init__(self) -> None:
        if self.smem_bytes > self.max_smem_bytes:
            raise ValueError(f"{self.name} needs {self.smem_bytes} bytes of shared memory, has {self.max_smem_bytes}")
        if self.reduces and self.warpgroups_m > 1:
            raise ValueError(f"{self.name}: warpgroups along K need tiles of one warpgroup along M")
        if self.cluster_m > 1 and (self.gather or self.cluster_k > 1):
            raise ValueError(f"{self.name}: tokens are shared as boxes, in clusters along M only")
        if self.depth < 2 or self.depth - 2 >= self.num_groups:
            raise ValueError(f"{self.name}: a stage has {self.num_groups} groups, its release needs {self.depth - 1}")

    @property
    def name(self) -> str:
        sizes = "_".join(map(str, self.n_sizes))
        kind = (
            ("moe" if self.grouped else "linear")
            + ("_swiglu" if self.swiglu else "")
            + ("_gather" if self.gather else "")
            + ("_wide" if self.wide else "")
        )
        shape = f"r{self.num_m64}m{self.warpgroups_m}k{self.warpgroups_k}c{self.cluster_k}"
        shape += f"s{self.num_stages}d{self.depth}g{self.group}x{self.cluster_m}b{self.stage_k}"
        shape += f"p{self.per_sm}t{self.box_rows}" + ("o" if self.per_block else "")
        return f"nvfp4_{kind}_{shape}_n{sizes}"

    @property
    def sources(self) -> tuple[str, ...]:
        modules = ("gemm_sm90", "decode_sm90", "tile_sm90", "epilogue_sm90", "fragments_sm90")
        shared = ("schedule", "handover", "config")
        return (*(f"nvfp4/{name}.py" for name in (*modules, *shared)), *DSL_SOURCES)

    @property
    def hands_over(self) -> bool:
        """True for the experts' first product, whose tiles the second one takes as they are finished."""
        return self.grouped and self.swiglu

    @property
    def follows(self) -> bool:
        """True for the experts' second product."""
        return self.grouped and not self.swiglu

    @property
    def num_steps(self) -> int:
        return self.stage_k // 16

    @property
    def blocks_of_a_group(self) -> int:
        """64-row blocks that a group of products multiplies."""
        return 1 if self.per_block else self.num_m64

    @property
    def num_groups(self) -> int:
        """Groups of products of a stage."""
        return self.num_steps // self.group * (self.num_m64 // self.blocks_of_a_group)

    def group_at(self, turn: int) -> tuple[int, int]:
        """Returns a group's place among the k16 steps of a stage, in groups, and its first 64-row block."""
        rounds = self.num_m64 // self.blocks_of_a_group
        return turn // rounds, turn % rounds * self.blocks_of_a_group

    @property
    def code_bytes(self) -> int:
        """Codes of 64 rows in a stage."""
        return 64 * self.stage_k // 2

    @property
    def scale_bytes(self) -> int:
        """Scales of 64 rows in a stage."""
        return 64 * self.stage_k // 16

    @property
    def m64_per_tile(self) -> int:
        return self.num_m64 * self.warpgroups_m

    @property
    def cluster(self) -> int:
        return self.cluster_k * self.cluster_m

    @property
    def num_threads(self) -> int:
        return WG * (self.num_consumers + 1)

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread after the producers have released theirs; 0 where it needs no more."""
        if self.num_m64 == 1 and self.n_sizes[-1] < 64:
            return 0
        # The CTA has only the registers that it was launched with; a request for more would wait forever.
        return min(240, (self._register_pool - 24) // self.num_consumers // 8 * 8)

    @property
    def producer_registers(self) -> int:
        """Registers per producer thread: 24, or more where the pool does not divide evenly."""
        return min(56, (self._register_pool - self.num_consumers * self.consumer_registers) // 8 * 8)

    @property
    def num_consumers(self) -> int:
        return self.warpgroups_m * self.warpgroups_k

    @property
    def _register_pool(self) -> int:
        """Registers per thread, summed over the CTA's warpgroups."""
        return 65536 // self.per_sm // self.num_threads // 8 * 8 * self.num_threads // WG

    @property
    def box_rows(self) -> int:
        return 1 if self.gather else math.gcd(self.box, self.n_sizes[-1])

    @property
    def reuses_weights(self) -> bool:
        """True if several tiles of tokens read the same weights, so that keeping them in L2 pays."""
        return self.n_sizes[-1] > 64

    @property
    def reduces(self) -> bool:
        return self.warpgroups_k * self.cluster_k > 1

    @property
    def stage_bytes(self) -> int:
        blocks = self.m64_per_tile * self.warpgroups_k
        tokens = self.n_sizes[-1] * self.stage_k * 2 * self.warpgroups_k
        return blocks * (self.code_bytes + self.scale_bytes) + tokens

    @property
    def reduce_bytes(self) -> int:
        buffers = 1 if self.cluster_k > 1 else 2
        return buffers * self.warpgroups_k * self.num_m64 * self.n_sizes[-1] // 8 * WG * 16 if self.reduces else 0

    @property
    def max_smem_bytes(self) -> int:
        """Shared memory that a CTA may allocate, with ``per_sm`` CTAs on an SM; each also costs 1 KiB."""
        return (MAX_SHARED_BYTES + 1024) // self.per_sm - 1024

    @property
    def smem_bytes(self) -> int:
        return self.num_stages * (self.stage_bytes + 16) + self.reduce_bytes


@dataclass(frozen=True)
class AlignConfig:
    """wide_ids: ids are int64. mapped: ids go through an expert map. num_shared: experts every token goes to, behind
    the routed ones. num_ctas: of the cluster that shares the work. few: halves of 64 pairs
    that one warp sorts; 0 for more."""

    wide_ids: bool
    mapped: bool
    num_shared: int
    num_ctas: int = 1
    few: int = 0
    compiler: ClassVar[str] = "nvfp4.moe_sm90:compile_align"

    @property
    def num_threads(self) -> int:
        return 32 if self.few else ALIGN_THREADS

    @property
    def cluster(self) -> int:
        return self.num_ctas

    @property
    def sources(self) -> tuple[str, ...]:
        return ("nvfp4/moe_sm90.py", "nvfp4/pairs_sm90.py", "nvfp4/schedule.py", "nvfp4/config.py", *DSL_SOURCES)

    @property
    def name(self) -> str:
        ids = ("i64" if self.wide_ids else "i32") + ("_mapped" if self.mapped else "")
        return f"moe_align{f'_few{self.few}' if self.few else ''}_{ids}_s{self.num_shared}c{self.num_ctas}"


@dataclass(frozen=True)
class PermuteConfig:
    """Copies token rows into the experts' order."""

    compiler: ClassVar[str] = "nvfp4.moe_sm90:compile_permute"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("nvfp4/moe_sm90.py", "nvfp4/pairs_sm90.py", "nvfp4/schedule.py", "nvfp4/config.py", *DSL_SOURCES)

    @property
    def name(self) -> str:
        return "moe_permute"

    @property
    def num_threads(self) -> int:
        return COPY_THREADS

    @property
    def cluster(self) -> int:
        return 1


@dataclass(frozen=True)
class CombineConfig:
    """Sums expert outputs per token. num_shared: slots behind the routed ones, with weight 1. wide: float32 rows."""

    num_shared: int
    wide: bool
    compiler: ClassVar[str] = "nvfp4.moe_sm90:compile_combine"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("nvfp4/moe_sm90.py", "nvfp4/pairs_sm90.py", "nvfp4/schedule.py", "nvfp4/config.py", *DSL_SOURCES)

    @property
    def name(self) -> str:
        return f"moe_combine_s{self.num_shared}{'_wide' if self.wide else ''}"

    @property
    def num_threads(self) -> int:
        return COPY_THREADS

    @property
    def cluster(self) -> int:
        return 1
