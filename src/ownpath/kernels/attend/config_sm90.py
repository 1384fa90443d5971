"""Compile-time configurations of the Hopper kernels of decode attention. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

WG = 128
NUM_THREADS = 3 * WG
HEAD_DIM, NUM_ROTARY = 512, 64
TILE_HEADS, TILE_KEYS = 64, 64
COMBINE_THREADS = HEAD_DIM // 4
MAX_SPLITS = 64
"""The combine kernel has two splits' statistics in a lane."""
LAUNCH_REGISTERS = 168
"""Registers that a launch gives to each of 384 threads."""
REGISTERS, PAGES_REGISTERS = (64, 208, 232), (112, 160, 232)
"""Registers of the threads that load, that multiply, and that compute the softmax too; the second with FP8 pages, of
which a tile waits in registers.

Together they may have three times the launch's: a warpgroup that asks for more than the others leave waits for ever.
"""
MAX_SMEM = 232448
KEY_BYTES, KEY_DATA, NUM_CODES = 584, 576, 448
"""Of a key in an FP8 page: all, without its scales, and codes; 64 BF16 values follow the codes."""
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
    merges: the CTAs of a cluster, whose size comes with the launch, share a row's keys and merge their sums. fp8: keys
    lie in FP8 pages. spare: rows of a slot's ring beyond the window of 128.
    Errors: ValueError naming the field.
    """

    per_block: int = 0
    selected: bool = False
    split: bool = False
    merges: bool = False
    fp8: bool = False
    spare: int = 0
    compiler: ClassVar[str] = "attend.attend_sm90:compile_attend"

    def __post_init__(self) -> None:
        if self.per_block < 0 or self.per_block & (self.per_block - 1) or self.per_block > BLOCK_TOKENS:
            raise ValueError(f"per_block={self.per_block}: 0 or a power of two up to {BLOCK_TOKENS}")
        if self.selected and not self.per_block:
            raise ValueError("selected=True: without entries there is nothing to select")
        if self.spare < 0 or self.spare % 8:
            raise ValueError(f"spare={self.spare}: a multiple of 8, so that pages are aligned")
        if self.split and self.merges:
            raise ValueError("split=True: the sums are merged in the cluster, or written")

    @property
    def name(self) -> str:
        entries = f"_{'select' if self.selected else 'table'}{self.per_block}" if self.per_block else ""
        how = "_split" if self.split else "_cluster" if self.merges else ""
        spare = f"_spare{self.spare}" if self.spare else ""
        return f"attend_{'fp8' if self.fp8 else 'bf16'}{entries}{how}{spare}"

    @property
    def sources(self) -> tuple[str, ...]:
        return (
            *(f"attend/{name}_sm90.py" for name in ("attend", "parts", "load", "pages", "multiply", "result")),
            *_SHARED_SOURCES,
        )

    @property
    def num_threads(self) -> int:
        return NUM_THREADS

    @property
    def registers(self) -> tuple[int, int, int]:
        return PAGES_REGISTERS if self.fp8 else REGISTERS

    @property
    def num_arrivals(self) -> int:
        """Of loading threads, or of their warps, at a stage's barrier."""
        return WG // 32 if self.fp8 else WG

    @property
    def cluster(self) -> int:
        return 1


@dataclass(frozen=True)
class AttendCombineConfig:
    """The kernel that merges the partial sums of a row's splits."""

    compiler: ClassVar[str] = "attend.combine_sm90:compile_combine"

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
