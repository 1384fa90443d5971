"""Arguments of the selection of entries by their scores.

Legend: T rows of a step; C columns of the scores, K entries that a row attends to at most.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ownpath.kernels.contract import Kernel, Operand
from ownpath.kernels.scores.types import CSA_PAGES, EntryPages, PagedRows


@dataclass(frozen=True)
class SelectWeights:
    """topk: the most entries that a row attends to. pages: the layout of the entries."""

    topk: int
    pages: EntryPages = CSA_PAGES


class Selected(NamedTuple):
    """The entries that each row attends to.

    rows int32 [T, K]: rows of the entries' pool, in the order of the entries; 0 after the last. num int32 [T]: how many
    there are. non_finite int32 [T]: 1 where a visible score is NaN or infinite, else 0.
    """

    rows_TK: torch.Tensor
    num_T: torch.Tensor
    non_finite_T: torch.Tensor


class SelectKernel(Kernel[Operand], Protocol[Operand]):
    """The ``topk`` visible entries with the best scores; the lower index at ties, -0 equal to 0, NaN below all."""

    def prepare(self, weights: SelectWeights) -> Operand:
        """Makes the operand."""

    def variant(self, scores_TC: torch.Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def workspace(self, operand: Operand, num_rows: int, num_blocks: int, device: torch.device) -> torch.Tensor | None:
        """Allocates zeroed scratch for calls of up to ``num_rows`` rows with tables of ``num_blocks``; ``None`` if the
        kernel needs none. Calls leave it ready for the next one. One call at a time may use it."""

    def run(
        self,
        scores_TC: torch.Tensor,
        rows: PagedRows,
        operand: Operand,
        *,
        out: Selected | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Selected:
        """Selects by scores float32 [T, C], C = B * per_block. Scores that a row does not see are not read.

        Errors: ValueError naming the operand.
        """
