"""The output of the FP8 products: the table of a packed weight's row blocks, the output matrix, and sums of a split K.

Packing cuts a weight into blocks of 64 rows; the table has each block's first output feature and number of valid rows.
Roofline: the bytes of the output. Limits: as the products.
"""

from dataclasses import dataclass

from cutlass import Float32, Int32, cute

from ownpath.kernels.dsl import ptx


@dataclass(frozen=True)
class RowBlock:
    """The first output feature of a row block, and the number of its rows inside the matrix."""

    first: Int32
    num_valid: Int32


@dataclass(frozen=True)
class Output:
    """The output of a call, BF16 [num_tokens, ld_out]. row_table: int32 [num_row_blocks, 2]."""

    out: cute.Pointer
    row_table: cute.Pointer
    num_tokens: Int32
    ld_out: Int32
    num_row_blocks: Int32

    @cute.jit
    def rows(self, row_block: Int32) -> RowBlock:
        """Returns the table's entry of a row block."""
        first, num_valid = Int32(0), Int32(0)
        if row_block < self.num_row_blocks:
            table = cute.make_tensor(self.row_table + 2 * row_block, cute.make_layout(2))
            first, num_valid = table[0], table[1]
        return RowBlock(first, num_valid)


def cluster_sum(address: Int32, num_ctas: int) -> list[Float32]:
    """Adds four sums of every CTA of the cluster, in rank order. address: of the sums, the same in each."""
    parts = [ptx.load_cluster_vec4(address, Int32(peer)) for peer in range(num_ctas)]
    values = list(parts[0])
    for part in parts[1:]:
        values = [a + b for a, b in zip(values, part, strict=True)]
    return values
