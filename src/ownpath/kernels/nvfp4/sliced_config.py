"""Compile-time configurations of the experts in slices. Importable without the DSL, for launchers and the cache."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.nvfp4.config import DSL_SOURCES, MAX_SHARED_BYTES, AlignConfig

CONSUMER_WARPS = 8
STAGE_CODES = 8192
"""Bytes of codes in a stage: two blocks of 64 x 128."""
STAGE_SCALES = STAGE_CODES // 8
STAGE_COLUMNS = 256
"""Columns of x that go with a stage of gate and up."""
TOKEN_BYTES = 2 * STAGE_COLUMNS + 16
"""A token's place in a stage; 16 bytes more than it takes, so that eight tokens lie in different banks."""
WARP = 32
SUM_THREADS = 256
SUM_COLUMNS = 32
_SOURCES = tuple(f"nvfp4/{name}.py" for name in ("pairs_sm90", "schedule", "config", "sliced_config"))


@dataclass(frozen=True)
class SlicedConfig:
    """The shape of the kernel that runs both products of a slice.

    tokens: most of a tile, up to 8. width: features of a slice, which ``cluster`` CTAs share. halves: of 64 (token,
    slot) pairs that a call may have; 0 for calls with more, whose tiles are in a schedule. wide_ids, mapped,
    num_shared: as in ``AlignConfig``.
    """

    tokens: int
    width: int
    cluster: int
    num_stages: int
    per_sm: int
    halves: int
    wide_ids: bool = False
    mapped: bool = False
    num_shared: int = 0
    compiler: ClassVar[str] = "nvfp4.sliced_sm90:compile_sliced"

    def __post_init__(self) -> None:
        if self.width not in (64, 128, 256) or self.width % (32 * self.cluster) or not 1 <= self.tokens <= 8:
            raise ValueError(
                f"{self.name}: slices have 64, 128 or 256 features, 32 for a CTA, and tiles up to 8 tokens"
            )
        if self.cluster < 2:
            raise ValueError(f"{self.name}: stores into a cluster's memory need a cluster")
        if self.smem_bytes > self.max_smem_bytes:
            raise ValueError(f"{self.name} needs {self.smem_bytes} bytes of shared memory, has {self.max_smem_bytes}")

    @property
    def name(self) -> str:
        shape = f"n{self.tokens}w{self.width}c{self.cluster}s{self.num_stages}p{self.per_sm}h{self.halves}"
        return f"nvfp4_moe_sliced_{shape}_{_form(self.routing, self.scheduled)}"

    @property
    def sources(self) -> tuple[str, ...]:
        modules = ("sliced_sm90", "decode_sm90", "epilogue_sm90", "tile_sm90")
        return (*(f"nvfp4/{name}.py" for name in modules), *_SOURCES, *DSL_SOURCES)

    @property
    def scheduled(self) -> bool:
        """True where ``moe_sm90`` has cut the tiles: for more pairs than a warp compares."""
        return self.halves == 0

    @property
    def routing(self) -> AlignConfig:
        """The form of the expert ids."""
        return AlignConfig(self.wide_ids, self.mapped, self.num_shared, few=True)

    @property
    def num_threads(self) -> int:
        return WARP * (CONSUMER_WARPS + 1)

    @property
    def blocks(self) -> int:
        """64-row blocks of gate and up, 32 features each, of a CTA."""
        return self.width // 32 // self.cluster

    @property
    def columns(self) -> int:
        """Columns of the down weight in a stage: all of the slice, or a part."""
        return min(self.width, 128)

    @property
    def pieces(self) -> int:
        """64-row blocks of the down weight in a stage."""
        return STAGE_CODES // self.piece_codes

    @property
    def piece_codes(self) -> int:
        """Bytes of codes of 64 rows of the down weight."""
        return 32 * self.columns

    @property
    def hidden_pitch(self) -> int:
        """Bytes from token to token of a slice's activations."""
        return 2 * self.width + 16

    @property
    def smem_bytes(self) -> int:
        stage = STAGE_CODES + STAGE_SCALES + self.tokens * TOKEN_BYTES + 16
        return self.num_stages * stage + 8 * self.hidden_pitch + self.blocks * 4 * WARP * 16 + 128 + 512

    @property
    def max_smem_bytes(self) -> int:
        """Shared memory that a CTA may allocate, with ``per_sm`` CTAs on an SM; each also costs 1 KiB."""
        return (MAX_SHARED_BYTES + 1024) // self.per_sm - 1024

    def fits(self, hidden: int, inter: int) -> bool:
        """Returns True for experts whose products are made of whole stages."""
        return not (hidden % STAGE_COLUMNS or hidden % (64 * self.pieces * self.cluster) or inter % self.width)


@dataclass(frozen=True)
class SlicedSumConfig:
    """Sums the slices' outputs of each token. Fields as in ``SlicedConfig``."""

    scheduled: bool = False
    wide_ids: bool = False
    mapped: bool = False
    num_shared: int = 0
    compiler: ClassVar[str] = "nvfp4.sliced_sum_sm90:compile_sliced_sum"

    @property
    def name(self) -> str:
        return f"nvfp4_moe_sliced_sum_{_form(self.routing, self.scheduled)}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("nvfp4/sliced_sum_sm90.py", *_SOURCES, *DSL_SOURCES)

    @property
    def routing(self) -> AlignConfig:
        """The form of the expert ids."""
        return AlignConfig(self.wide_ids, self.mapped, self.num_shared, few=True)

    @property
    def num_threads(self) -> int:
        return SUM_THREADS

    @property
    def cluster(self) -> int:
        return 1


def _form(routing: AlignConfig, scheduled: bool) -> str:
    """Names the form of the ids; kernels with a schedule do not read them."""
    if scheduled:
        return f"scheduled_s{routing.num_shared}"
    return f"{'i64' if routing.wide_ids else 'i32'}{'_mapped' if routing.mapped else ''}_s{routing.num_shared}"
