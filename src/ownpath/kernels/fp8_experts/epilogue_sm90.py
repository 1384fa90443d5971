"""The epilogue of the experts' FP8 products: as ``nvfp4.epilogue_sm90``, with a multiplier for every weight row.

Roofline: the bytes of the output. Limits: as ``gemm_sm90``.
"""

from dataclasses import dataclass

from cutlass import Float32, Int32, cute

from ownpath.kernels.dsl.warpgroup import Thread
from ownpath.kernels.nvfp4.epilogue_sm90 import Epilogue


@dataclass(frozen=True)
class RowScaledEpilogue(Epilogue):
    """The output of a call. global_scale: float32, one per packed weight row of every expert, ``num_rows`` of each."""

    num_rows: Int32 = 0

    def factors(self, expert: Int32, block: Int32, thread: Thread) -> tuple[Float32, Float32]:
        """Returns the multipliers of this thread's sums of rows g and g + 8."""
        row = expert * self.num_rows + block * 64 + thread.warp * 16 + thread.row
        table = cute.make_tensor(self.global_scale + row, cute.make_layout(16))
        return table[0], table[8]
