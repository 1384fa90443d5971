"""The schedule of the experts' products, int32 in device memory: ``moe_sm90`` writes it, ``gemm_sm90`` reads it.

[number of tiles, offset of the index, 0, 0], then (expert, first row, rows, 0) for each tile, where ``handover`` counts
in the last; at the offset, the token of each sorted row; behind it, the sorted row of each (token, slot), -1 where no
local expert has it.
"""

from dataclasses import dataclass

from cutlass import Int32, cute


def element(pointer: cute.Pointer, idx: Int32 | int) -> cute.Tensor:
    """Returns a one-element view at ``idx``."""
    return cute.make_tensor(pointer + idx, cute.make_layout(1))


@dataclass(frozen=True)
class Schedule:
    """A schedule in memory."""

    memory: cute.Pointer

    def num_tiles(self) -> Int32:
        """Returns the number of tiles of all experts."""
        return element(self.memory, 0)[0]

    def entry(self, n_tile: Int32) -> Int32:
        """Returns the offset of a tile's entry."""
        return 4 + 4 * n_tile

    def expert(self, n_tile: Int32) -> Int32:
        """Returns the expert of a tile."""
        return element(self.memory, self.entry(n_tile))[0]

    def rows(self, n_tile: Int32) -> tuple[Int32, Int32]:
        """Returns a tile's first row and number of rows."""
        entry = self.entry(n_tile)
        return element(self.memory, entry + 1)[0], element(self.memory, entry + 2)[0]

    def counter(self, n_tile: Int32) -> cute.Pointer:
        """Returns the counter of a tile's finished rows."""
        return self.memory + (self.entry(n_tile) + 3)

    def tokens(self) -> cute.Pointer:
        """Returns the token of each sorted row."""
        return self.memory + element(self.memory, 1)[0]

    def sorted_rows(self, num_tokens: Int32, slots: Int32) -> cute.Pointer:
        """Returns the sorted row of each (token, slot)."""
        return self.memory + (element(self.memory, 1)[0] + num_tokens * slots)

    def write(self, idx: Int32, value: Int32) -> None:
        """Writes an entry of the index.

        (A method, because in ``element(a, b)[0] = c`` the DSL would treat a and b as written and carry them in loops.)
        """
        element(self.memory, idx)[0] = value

    def write_head(self, num_tiles: Int32, index_offset: Int32) -> None:
        """Writes the number of tiles and the offset of the index."""
        element(self.memory, 0)[0] = num_tiles
        element(self.memory, 1)[0] = index_offset

    def write_tile(self, entry: Int32, expert: Int32, row0: Int32, rows: Int32) -> None:
        """Writes a tile's entry, with no row finished."""
        element(self.memory, entry)[0] = expert
        element(self.memory, entry + 1)[0] = row0
        element(self.memory, entry + 2)[0] = rows
        element(self.memory, entry + 3)[0] = Int32(0)
