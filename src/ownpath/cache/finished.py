"""Places of the entries that a step finishes, and of the rows that they average.

Legend: C entries.
"""

from dataclasses import dataclass

import torch

from ownpath.cache.layout import BLOCK_TOKENS, first_row
from ownpath.cache.tables import StepTables


@dataclass(frozen=True)
class EntryWrites:
    """The entries of one compress ratio that are finished by some rows of one request.

    windows: theirs. state_rows, new_rows: what they average, oldest first: rows of the pool's state, then rows of the
    step. finished_rows: rows of the pool that they are written to.
    """

    windows: range
    state_rows: torch.Tensor
    new_rows: slice
    finished_rows: torch.Tensor

    @classmethod
    def of_positions(cls, tables: StepTables, number: int, ratio: int, positions: range) -> "EntryWrites":
        """Returns those of a request's rows at these positions."""
        windows = range(positions.start // ratio, positions.stop // ratio)
        oldest = first_row(windows.start, ratio)
        state_rows = ring_rows(tables, number, oldest, tables.pool.spec.state_rows(ratio))
        new_rows = rows_at(tables, number, range(oldest, positions.stop))
        return cls(windows, state_rows, new_rows, entry_rows(tables, number, ratio, windows))


def rows_at(tables: StepTables, number: int, positions: range) -> slice:
    """Returns the rows of the step that a request has at these positions; what lies before the step is left out."""
    before = tables.rows[number].start - tables.starts[number]
    return slice(before + max(positions.start, tables.starts[number]), before + positions.stop)


def ring_rows(tables: StepTables, number: int, oldest: int, num_rows: int) -> torch.Tensor:
    """Returns the rows of a ring that hold a request's positions from ``oldest`` to where the step begins."""
    older = torch.arange(oldest, max(oldest, tables.starts[number]), device=tables.positions_T.device)
    return tables.slots[number] * num_rows + older % num_rows


def entry_rows(tables: StepTables, number: int, ratio: int, windows: range) -> torch.Tensor:
    """Returns the rows of the pool that hold a request's entries of these windows."""
    entries_C = torch.arange(windows.start, windows.stop, device=tables.positions_T.device)
    per_block = BLOCK_TOKENS // ratio
    return tables.blocks_RB[number, entries_C // per_block] * per_block + entries_C % per_block
