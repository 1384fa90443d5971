"""Arguments of the cache writes of a decode step.

A request has one row in a step, or several: then they follow each other, at consecutive positions, and rings are longer
by ``spare`` rows. A padded row has position 0, slot 0 and blocks of zeros, so that it writes where nobody reads.

Legend: T rows, H head dim, P compressor width (2H where windows overlap, else H), L ratio, F rotary pairs, B blocks.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.formats import KeyFormat
from ownpath.kernels.contract import Kernel, NormWeights, Operand

BLOCK_TOKENS = 256
"""Tokens of a block of the paged caches: a block holds ``BLOCK_TOKENS // ratio`` entries."""
OVERLAPPING_RATIO = 4
"""The ratio whose entries average two windows."""
LONG_RATIO = 128
"""The ratio of layers that attend to all their entries."""


class KeyRounding(StrEnum):
    """The rounding of keys before they are written. A pool of bfloat16 holds the rounded values."""

    NONE = "none"
    FP8 = "fp8"
    """E4M3 with a power-of-two scale per 64 channels; rotary channels as they are."""
    FP4 = "fp4"
    """Multiplied by the Hadamard matrix, then E2M1 with a power-of-two scale per 32 channels."""


@dataclass(frozen=True)
class CompressorWeights:
    """One compressor. ape: float32 [L, P], added to the scores by place in the window. norm: of its entries."""

    ratio: int
    ape_LP: Tensor
    norm: NormWeights

    @property
    def num_windows(self) -> int:
        """Windows that an entry averages."""
        return 2 if self.ratio == OVERLAPPING_RATIO else 1

    @property
    def num_rows(self) -> int:
        """Raw rows that an entry averages."""
        return self.num_windows * self.ratio

    @property
    def head_dim(self) -> int:
        return self.ape_LP.shape[1] // self.num_windows

    @property
    def per_block(self) -> int:
        """Entries of a block."""
        return BLOCK_TOKENS // self.ratio


@dataclass(frozen=True)
class EntriesWeights:
    """One layer's weights. main, index: its compressors, ``None`` where it has none.

    window: tokens that a row sees. spare: rows of every ring beyond those that one row of a request needs; in a step a
    request has up to 1 + spare rows. keys: the rounding of keys and main entries; index_keys: of index entries.
    """

    kv_norm: NormWeights
    main: CompressorWeights | None = None
    index: CompressorWeights | None = None
    window: int = 128
    keys: KeyRounding = KeyRounding.NONE
    index_keys: KeyRounding = KeyRounding.NONE
    spare: int = 0

    @property
    def window_rows(self) -> int:
        """Rows of one slot of the ring of keys."""
        return self.window + self.spare

    def state_rows(self, compressor: CompressorWeights) -> int:
        """Returns the rows of one slot of a compressor's ring of raw rows."""
        return compressor.num_rows + self.spare


class RawRows(NamedTuple):
    """A layer's projections of a step's rows: key before its norm [T, H], raw (kv, score) rows [T, 2P]."""

    kv_TH: Tensor
    main_TP2: Tensor | None = None
    index_TP2: Tensor | None = None


class EntryAngles(NamedTuple):
    """cos and sin float32 [T, F] of the layer's frequencies: at each row's position, and at ``position + 1 - ratio``,
    the first position of the window that ends there. The latter are ``None`` in layers without a compressor."""

    cos_TF: Tensor
    sin_TF: Tensor
    first_cos_TF: Tensor | None = None
    first_sin_TF: Tensor | None = None


class RowPlaces(NamedTuple):
    """int32: each row's position and slot [T], and its block table [T, B]."""

    positions_T: Tensor
    slots_T: Tensor
    blocks_TB: Tensor


class StepAngles(NamedTuple):
    """The angles of a step's rows, by kind of layer."""

    sliding: EntryAngles
    csa: EntryAngles
    hca: EntryAngles

    def of(self, ratio: int) -> EntryAngles:
        """Returns the angles of layers of a compress ratio, 0 for none."""
        return {0: self.sliding, OVERLAPPING_RATIO: self.csa, LONG_RATIO: self.hca}[ratio]


class LayerPools(NamedTuple):
    """One layer's pools: keys [slots * window_rows, H]; for each compressor its state [slots * state_rows, 2P], float32
    or wider, and its entries [blocks * per_block, H].

    Instead, window and main entries, both or neither, may be FP8 pages uint8 [slots or blocks, R * 584] of R keys: R *
    576 bytes, of each key 448 E4M3 and 64 BF16 channels; then R * 8 bytes, of each key 7 E8M0 scales of 64 channels
    and a pad byte. Index entries may be FP8 pages uint8 [blocks, R * (H + 4)]: R * H bytes of E4M3, then a float32
    scale of each key, a power of two. Or they are FP4 pages uint8 [blocks, R * (H / 2 + H / 32)]: R * H / 2 bytes of
    E2M1, two to a byte, the even channel in the low half, then of each key H / 32 E8M0 scales of 32 channels. Keys in
    pages are rounded as the pages need; a rounding to FP4 comes before.
    """

    window: Tensor
    main_state: Tensor | None = None
    main_entries: Tensor | None = None
    index_state: Tensor | None = None
    index_entries: Tensor | None = None

    @property
    def has_key_pages(self) -> bool:
        """True if window and main entries are FP8 pages."""
        return self.window.itemsize == 1

    @property
    def has_index_pages(self) -> bool:
        """True if index entries are pages."""
        return self.index_entries is not None and self.index_entries.itemsize == 1

    def index_format(self, width: int) -> KeyFormat:
        """Returns the format of index entries of ``width`` channels; of pages that are not FP4, FP8."""
        if self.index_entries is None or not self.has_index_pages:
            return KeyFormat.BF16
        page_bytes = BLOCK_TOKENS // OVERLAPPING_RATIO * (width // 2 + width // 32)
        return KeyFormat.FP4 if self.index_entries.shape[-1] == page_bytes else KeyFormat.FP8


class EntriesKernel(Kernel[Operand], Protocol[Operand]):
    """The cache writes of one layer, in place."""

    def prepare(self, weights: EntriesWeights) -> Operand:
        """Makes the operand. Calls on one operand must not overlap."""

    def variant(self, raw: RawRows, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, operand: Operand) -> None:
        """Writes keys, raw rows and the entries whose windows end. Errors: ValueError naming the operand."""
