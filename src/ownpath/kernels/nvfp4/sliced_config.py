"""Compile-time configurations of the experts in slices. Importable without the DSL, for launchers and the cache."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.nvfp4.config import DSL_SOURCES, MAX_SHARED_BYTES, AlignConfig

WARP = 32
MAX_SLICED_PAIRS = WARP
"""One warp finds a CTA's tile, a (token, slot) pair to a lane."""
CONSUMER_WARPS = 8
WIDTH = 64
"""Features of a slice."""
CLUSTER = 2
"""CTAs that share a slice; each has a 64-row block of gate and up, 32 features."""
STAGE_CODES = 8192
"""Bytes of codes in a stage: two blocks of 64 x 128, or four of 64 x 64."""
STAGE_SCALES = STAGE_CODES // 8
STAGE_COLUMNS = 256
"""Columns of x that go with a stage of gate and up."""
STAGE_BLOCKS = 4
"""64-row blocks of the down weight in a stage."""
TOKEN_BYTES = 2 * STAGE_COLUMNS + 16
"""A token's place in a stage; 16 bytes more than it takes, so that eight tokens would lie in different banks."""
HIDDEN_PITCH = 2 * WIDTH + 16
"""Bytes from token to token of a slice's activations."""
SUM_THREADS = 256
SUM_COLUMNS = 32
_SOURCES = tuple(f"nvfp4/{name}.py" for name in ("pairs_sm90", "schedule", "config", "sliced_config"))


@dataclass(frozen=True)
class SlicedConfig:
    """The kernel that runs both products of a slice.

    tokens: most of a tile, up to 8. per_sm: CTAs that share an SM. wide_ids, mapped, num_shared: as in ``AlignConfig``.
    """

    tokens: int
    num_stages: int
    per_sm: int
    wide_ids: bool = False
    mapped: bool = False
    num_shared: int = 0
    flags: int = 0
    compiler: ClassVar[str] = "nvfp4.sliced_sm90:compile_sliced"

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 8:
            raise ValueError(f"{self.name}: a tile has 1 to 8 tokens")
        if self.smem_bytes > self.max_smem_bytes:
            raise ValueError(f"{self.name} needs {self.smem_bytes} bytes of shared memory, has {self.max_smem_bytes}")

    @property
    def name(self) -> str:
        shape = f"n{self.tokens}s{self.num_stages}p{self.per_sm}f{self.flags}"
        return f"nvfp4_moe_sliced_{shape}_{_form(self.routing)}"

    @property
    def sources(self) -> tuple[str, ...]:
        modules = ("sliced_sm90", "decode_sm90", "epilogue_sm90", "tile_sm90")
        return (*(f"nvfp4/{name}.py" for name in modules), *_SOURCES, *DSL_SOURCES)

    @property
    def routing(self) -> AlignConfig:
        """The form of the expert ids."""
        return AlignConfig(self.wide_ids, self.mapped, self.num_shared, few=1)

    @property
    def num_threads(self) -> int:
        return WARP * (CONSUMER_WARPS + 1)

    @property
    def cluster(self) -> int:
        return CLUSTER

    @property
    def smem_bytes(self) -> int:
        stage = STAGE_CODES + STAGE_SCALES + self.tokens * TOKEN_BYTES + 16
        partial = (12 if self.flags & 4 else 4) * WARP * 16
        return self.num_stages * stage + 8 * HIDDEN_PITCH + partial + 384

    @property
    def max_smem_bytes(self) -> int:
        """Shared memory that a CTA may allocate, with ``per_sm`` CTAs on an SM; each also costs 1 KiB."""
        return (MAX_SHARED_BYTES + 1024) // self.per_sm - 1024


def fits_slices(hidden: int, inter: int) -> bool:
    """Returns True for experts whose products are made of whole stages."""
    return not (hidden % (64 * STAGE_BLOCKS * CLUSTER) or inter % WIDTH)


@dataclass(frozen=True)
class SlicedSumConfig:
    """Sums the slices' outputs of each token. Fields as in ``SlicedConfig``."""

    wide_ids: bool = False
    mapped: bool = False
    num_shared: int = 0
    compiler: ClassVar[str] = "nvfp4.sliced_sum_sm90:compile_sliced_sum"

    @property
    def name(self) -> str:
        return f"nvfp4_moe_sliced_sum_{_form(self.routing)}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("nvfp4/sliced_sum_sm90.py", *_SOURCES, *DSL_SOURCES)

    @property
    def routing(self) -> AlignConfig:
        """The form of the expert ids."""
        return AlignConfig(self.wide_ids, self.mapped, self.num_shared, few=1)

    @property
    def num_threads(self) -> int:
        return SUM_THREADS

    @property
    def cluster(self) -> int:
        return 1


def _form(routing: AlignConfig) -> str:
    return f"{'i64' if routing.wide_ids else 'i32'}{'_mapped' if routing.mapped else ''}_s{routing.num_shared}"
