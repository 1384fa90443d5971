"""Arguments of what a step with chunks writes: before it attends, and to the rings.

Near keys, in one array [W, H]: of each request the keys of its ring that its first row sees, oldest first, then those
of its own rows. The rows of a request follow each other, at consecutive positions.

Legend: T rows, E rows that end a window, R requests, B blocks of a request, F rotary pairs, W near keys, H head dim.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from ownpath.kernels.contract import Kernel, Operand
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows


class EndingRows(NamedTuple):
    """The rows that end a window of the layer's ratio, ascending, int32, or -1 where there is none; float32 cos and sin
    [E, F] of the first position of each window. ``None`` in layers without a compressor."""

    rows_E: Tensor | None = None
    cos_EF: Tensor | None = None
    sin_EF: Tensor | None = None


class ChunkPlaces(NamedTuple):
    """int32: each row's position and request; each request's slot and block table; the source of each near key: a row t
    of the step, or -1 - r for row r of the window's pool."""

    positions_T: Tensor
    requests_T: Tensor
    slots_R: Tensor
    blocks_RB: Tensor
    sources_W: Tensor


class ChunkEntriesKernel(Kernel[Operand], Protocol[Operand]):
    """Near keys, and the entries of one layer whose windows end, which are written in place. Rings are read alone.

    ``raw.kv_TH``: keys that are normed and turned. A near key is what a later step reads of it. An entry is computed as
    ``EntriesKernel`` does, step by step. What is written depends neither on other requests nor on how many rows of its
    request a step has.
    """

    def prepare(self, weights: EntriesWeights) -> Operand:
        """Makes the operand; ``kv_norm`` is not read. Calls on one operand must not overlap."""

    def variant(self, raw: RawRows, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, operand: Operand) -> Tensor:
        """Writes entries and returns near keys [W, H], in the dtype of kv. Errors: ValueError naming the operand."""


class ChunkRingsKernel(Kernel[Operand], Protocol[Operand]):
    """The rows of a step that later steps read: of each request the last, as many as a ring has, written to the
    window's pool and to the compressors' states. A row of position p goes to row ``p % rows`` of its slot's ring.

    ``raw.kv_TH``: keys that are normed and turned. Entries are neither read nor written.
    """

    def prepare(self, weights: EntriesWeights) -> Operand:
        """Makes the operand, of which the sizes of rings are read alone."""

    def variant(self, raw: RawRows, operand: Operand) -> str | None:
        """Returns the name of the variant that a call launches; ``None`` for a kernel without variants."""

    def run(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools, operand: Operand) -> None:
        """Writes to the pools. Errors: ValueError naming the operand."""
