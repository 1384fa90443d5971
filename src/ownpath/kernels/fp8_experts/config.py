"""Compile-time configurations of the experts' FP8 kernels. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.nvfp4.config import BLOCK_K, DSL_SOURCES, GemmConfig

BLOCK_CODE_BYTES = 64 * BLOCK_K // 2
BLOCK_SCALE_BYTES = 64 * BLOCK_K // 32
QUANTIZE_GROUPS = 32
"""Blocks of 1 x 128 that a CTA of the quantiser takes; eight threads each."""
TABLE_BYTES = 16 * 8
SCALES_UNIT = 16
"""Tokens whose scales are stored in the order in which threads read them."""


def part_sizes(num_n: int, most: int) -> tuple[int, ...]:
    """Cuts ``num_n`` tokens into as many equal parts of whole eights as there are up to ``most``.

    (The assembler cannot place the sums of parts of several sizes in the same registers.)
    """
    count = next(count for count in range(most, 0, -1) if num_n % (8 * count) == 0)
    return (num_n // count,) * count


@dataclass(frozen=True)
class ExpertGemmConfig(GemmConfig):
    """The shape of one compiled product: as ``GemmConfig``, always of experts, with tokens in E4M3.

    parts: into how many ``wgmma`` groups of a K block a tile's tokens are cut at most; the sums of one group are beside
    the totals in registers.
    """

    parts: int = 1
    compiler: ClassVar[str] = "fp8_experts.gemm_sm90:compile_gemm"

    def __post_init__(self) -> None:
        if not self.grouped or self.gather or self.reduces or self.stage_k != BLOCK_K:
            raise ValueError(f"{self.name}: FP8 products are grouped, follow the schedule, and never split K")
        if self.smem_bytes > self.max_smem_bytes:
            raise ValueError(f"{self.name} needs {self.smem_bytes} bytes of shared memory, has {self.max_smem_bytes}")

    @property
    def name(self) -> str:
        sizes = "_".join(map(str, self.n_sizes))
        kind = ("swiglu" if self.swiglu else "plain") + ("_wide" if self.wide else "")
        shape = f"r{self.num_m64}m{self.warpgroups_m}s{self.num_stages}h{self.parts}"
        return f"fp8_experts_{kind}_{shape}x{self.cluster_m}p{self.per_sm}b{self.box_rows}_n{sizes}"

    @property
    def sources(self) -> tuple[str, ...]:
        own = ("gemm_sm90", "epilogue_sm90", "ptx", "config", "layout")
        shared = ("tile_sm90", "epilogue_sm90", "schedule", "config")
        return (*(f"fp8_experts/{name}.py" for name in own), *(f"nvfp4/{name}.py" for name in shared), *DSL_SOURCES)

    @property
    def code_bytes(self) -> int:
        return BLOCK_CODE_BYTES

    @property
    def scale_bytes(self) -> int:
        return BLOCK_SCALE_BYTES

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread after the producers have released theirs."""
        return min(240, (self._register_pool - 24) // self.num_consumers // 8 * 8)

    @property
    def token_bytes(self) -> int:
        """Tokens of a stage."""
        return self.n_sizes[-1] * BLOCK_K

    @property
    def stage_bytes(self) -> int:
        weights = self.m64_per_tile * (self.code_bytes + self.scale_bytes)
        return weights + self.token_bytes + 4 * self.padded_n

    @property
    def padded_n(self) -> int:
        """Token scales of a stage, with the last pair of eights complete."""
        return -(-self.n_sizes[-1] // SCALES_UNIT) * SCALES_UNIT

    @property
    def smem_bytes(self) -> int:
        return self.num_stages * (self.stage_bytes + 16) + TABLE_BYTES


@dataclass(frozen=True)
class QuantizeRowsConfig:
    """The kernel that quantises rows. spreads: a token's row goes to each of its places in the experts' order."""

    spreads: bool
    compiler: ClassVar[str] = "fp8_experts.quantize_sm90:compile_quantize"

    @property
    def name(self) -> str:
        return f"fp8_experts_quantize_{'spread' if self.spreads else 'rows'}"

    @property
    def sources(self) -> tuple[str, ...]:
        own = ("fp8_experts/quantize_sm90.py", "fp8_experts/config.py", "fp8/ptx.py", "fp8/quantize_sm90.py")
        return (*own, "fp8/layout.py", "fp8/config.py", "nvfp4/schedule.py", "nvfp4/config.py", *DSL_SOURCES)

    @property
    def num_threads(self) -> int:
        return 8 * QUANTIZE_GROUPS

    @property
    def cluster(self) -> int:
        return 1


def fit(config: ExpertGemmConfig, stages: int) -> ExpertGemmConfig:
    """Returns ``config``, of one stage, with as many of the wanted stages as shared memory holds."""
    most = (config.max_smem_bytes - TABLE_BYTES) // (config.stage_bytes + 16)
    return ExpertGemmConfig(**{**vars(config), "num_stages": max(1, min(stages, most))})
