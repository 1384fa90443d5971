"""The output of the FP8 products: the table of a packed weight's row blocks, the output matrix, and sums of a split K.

Packing cuts a weight into blocks of 64 rows; the table has each block's first output feature and number of valid rows.

A cluster that splits K divides its sums: each CTA sends the others their parts, straight from registers into their
shared memory, where a barrier counts the bytes. A CTA leaves when all of its bytes have come, so nobody writes to one
that has left, and the sums are added in the order of ranks.

Roofline: the bytes of the output. Limits: as the products.
"""

from dataclasses import dataclass

from cutlass import Float32, Int32, cute

from ownpath.kernels.dsl import ptx
from ownpath.kernels.fp8 import ptx as fp8_ptx
from ownpath.kernels.fp8.config import Shares


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


@dataclass(frozen=True)
class ClusterSums:
    """The place where a CTA gets its parts of the other CTAs' sums. barrier: counts their bytes; for one use."""

    shares: Shares
    sums: cute.Pointer
    barrier: cute.Pointer

    @cute.jit
    def open(self, thread: Int32, cta: Int32) -> None:
        """Initialises the barrier, for the bytes that the others send to this CTA. thread: of it; cta: its number."""
        if thread == 0:
            cute.arch.mbarrier_init(self.barrier, 1)
            cute.arch.mbarrier_init_fence()
            self.expect(cta % self.shares.cluster_k)

    @cute.jit
    def expect(self, rank: Int32) -> None:
        """Announces the bytes that the others send to the CTA ``rank``. One thread, once the barrier is initialised."""
        shares = self.shares
        step = shares.width * shares.cluster_k
        turns = (shares.num_parts - 1 - rank * shares.width) // step + 1
        if rank * shares.width >= shares.num_parts:
            turns = Int32(0)
        part_bytes = shares.width * shares.num_threads * 16
        cute.arch.mbarrier_arrive_and_expect_tx(self.barrier, turns * ((shares.cluster_k - 1) * part_bytes))

    @cute.jit
    def send(self, part: int, values: tuple[Float32, ...], rank: Int32, thread: Int32) -> None:
        """Sends a part of the CTA ``rank``'s sums to its owner, unless it is its own. thread: of the CTA."""
        owner = self.shares.owner(part)
        if rank != owner:
            slot = rank - (1 if rank > owner else 0)
            place = self.sums.toint() + (slot * self.shares.slot_bytes + thread * 16) + self.shares.place(part)
            fp8_ptx.send_vec4(place, self.barrier.toint(), Int32(owner), values)

    def wait(self) -> None:
        """Waits until all have come."""
        cute.arch.mbarrier_wait(self.barrier, 0)

    def add(self, part: int, own: list[Float32], thread: Int32) -> list[Float32]:
        """Adds up a part that this CTA owns, in rank order."""
        owner = self.shares.owner(part)
        values: list[Float32] = []
        for rank in range(self.shares.cluster_k):
            terms = own
            if rank != owner:
                slot = rank - (rank > owner)
                place = self.sums.toint() + (thread * 16 + (slot * self.shares.slot_bytes + self.shares.place(part)))
                terms = [ptx.as_float(word) for word in ptx.load_shared_vec4(place)]
            values = [a + b for a, b in zip(values, terms, strict=True)] if values else terms
        return values
