"""Parts that the products share: a thread's position in its warpgroup, and operands of the ``wgmma`` instruction.

A warpgroup multiplies 64 rows at a time. Operand B comes from shared memory, operand A from there or from registers.
"""

from dataclasses import dataclass

from cutlass import BFloat16, Float32, Int32, Numeric, cute
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from ownpath.kernels.dsl.pipeline import Stages


@dataclass(frozen=True)
class Thread:
    """A thread of a warpgroup. idx: 0 to 127. wg_m, wg_k: the warpgroup's place among those along M and along K."""

    idx: Int32
    wg_m: Int32
    wg_k: Int32 | int = 0

    @property
    def warp(self) -> Int32:
        """Of the warpgroup: 0 to 3. Each has 16 of an instruction's 64 rows."""
        return self.idx // 32

    @property
    def lane(self) -> Int32:
        """0 to 31."""
        return self.idx % 32

    @property
    def row(self) -> Int32:
        """Of the eight rows of a core matrix, and of those eight below: 0 to 7."""
        return self.idx % 32 // 4

    @property
    def pair(self) -> Int32:
        """Of the four pairs of columns of a core matrix: 0 to 3."""
        return self.idx % 4


@dataclass(frozen=True)
class Operands:
    """The operands of a warpgroup: its rows of the next ``k_iters`` stages."""

    thread: Thread
    stages: Stages
    k_iters: Int32


def shared_operand(
    smem: cute.Pointer, dtype: type[Numeric], num_rows: int, num_blocks: int, stride: int
) -> cute.Tensor:
    """Makes [rows, 128 bytes of K, blocks], K contiguous, with the 128-byte swizzle of ``wgmma`` and TMA.

    stride: elements from block to block.
    """
    width = 1024 // dtype.width
    outer = cute.make_layout(((8, num_rows // 8), width, num_blocks), stride=((width, 8 * width), 1, stride))
    layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, outer)
    return cute.make_tensor(cute.recast_ptr(smem, layout.inner, dtype), layout.outer)


def decoded_mma(num_n: int) -> cute.TiledMma:
    """Makes the 64 x ``num_n`` x 16 BF16 MMA with float32 sums and operand A, decoded weights, from registers."""
    major = cute.nvgpu.OperandMajorMode.K
    source = warpgroup.OperandSource.RMEM
    return make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (1, 1, 1), (64, num_n), a_source=source)


def wgmma(mma: cute.TiledMma, a: cute.Tensor, b: cute.Tensor, sums: cute.Tensor, accumulate: bool = True) -> None:
    """Issues sums = a b, plus the sums that were there if ``accumulate``."""
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    cute.gemm(atom, sums, a, b, sums)
