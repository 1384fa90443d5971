"""Compile-time configurations of the Hopper kernels of decode attention. Importable without the DSL."""

from dataclasses import dataclass

WG = 128
HEAD_DIM, NUM_ROTARY = 512, 64
TILE_HEADS, TILE_KEYS = 64, 64
NUM_THREADS = 3 * WG
COMBINE_THREADS = HEAD_DIM // 4
MAX_SPLITS = 64
"""The combine kernel has two splits' statistics in a lane."""
REGISTERS = (64, 208, 232)
"""Registers of the threads that load, that multiply, and that compute the softmax too.

Together they may have 504, three times the 168 that a launch gives to each of 384 threads: a warpgroup that asks for
more than the others leave waits for ever.
"""
MAX_SMEM = 232448
BLOCK_TOKENS = 256

_SHARED_SOURCES = (
    *(f"attend/{name}.py" for name in ("ptx", "config_sm90")),
    *(f"dsl/{name}.py" for name in ("pipeline", "warpgroup", "ptx")),
)


@dataclass(frozen=True)
class AttendConfig:
    """One compiled attention kernel.

    per_block: entries of a block of 256 tokens; 0 without entries. selected: a row's entries come as a list of rows;
    otherwise they are the first ones of its block table. split: CTAs share a row's keys and write partial sums.
    Errors: ValueError naming the field.
    """

    per_block: int = 0
    selected: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        if self.per_block < 0 or self.per_block & (self.per_block - 1) or self.per_block > BLOCK_TOKENS:
            raise ValueError(f"per_block={self.per_block}: 0 or a power of two up to {BLOCK_TOKENS}")
        if self.selected and not self.per_block:
            raise ValueError("selected=True: without entries there is nothing to select")

    @property
    def name(self) -> str:
        entries = f"_{'select' if self.selected else 'table'}{self.per_block}" if self.per_block else ""
        return f"attend_bf16{entries}{'_split' if self.split else ''}"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("attend/attend_sm90.py", *_SHARED_SOURCES)

    @property
    def num_threads(self) -> int:
        return NUM_THREADS

    @property
    def cluster(self) -> int:
        return 1


@dataclass(frozen=True)
class AttendCombineConfig:
    """The kernel that merges the partial sums of a row's splits."""

    @property
    def name(self) -> str:
        return "attend_combine"

    @property
    def sources(self) -> tuple[str, ...]:
        return ("attend/combine_sm90.py", *_SHARED_SOURCES)

    @property
    def num_threads(self) -> int:
        return COMBINE_THREADS

    @property
    def cluster(self) -> int:
        return 1


def num_splits(num_rows: int, num_groups: int, max_keys: int, num_sms: int) -> int:
    """Returns the number of CTAs that share a row's keys: as many as fill the SMs once, at most one for each tile.

    num_groups: of 64 heads. max_keys: most keys a row of the call's tables can have. Two tiles are not worth merging.
    """
    tiles = -(-max_keys // TILE_KEYS)
    if tiles <= 2:
        return 1
    wanted = max(1, min(tiles, MAX_SPLITS, num_sms // (num_rows * num_groups)))
    return -(-tiles // -(-tiles // wanted))
