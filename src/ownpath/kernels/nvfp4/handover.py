"""Hands tiles from the first grouped product to the second while both run: a counter of finished rows per token tile.

The second product reads the first one's output. Waiting for the first to end would leave SMs idle while its last tiles
finish. Instead each warp of the first adds the weight rows it has written to the counter of its token tile, and the
second starts on a tile when all rows are there. Counters are part of the schedule, and ``Align`` sets them to zero. All
CTAs of the first product run before one of the second starts, so that waiting always ends.
"""

from cutlass import Int32, Int64, cute
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Site, Value, asm


@dsl_user_op
def _add_release(address: Value, amount: Value, *, loc: Site = None, ip: Site = None) -> None:
    """Adds to a counter with release semantics: after all writes that this thread has seen."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(amount).ir_value(loc=loc, ip=ip)]
    asm("red.release.gpu.global.add.u32 [$0], $1;", "l,r", None, operands, False, loc, ip)


@dsl_user_op
def _load_acquire(address: Value, *, loc: Site = None, ip: Site = None) -> Int32:
    """Reads a counter with acquire semantics: before all of this thread's later reads."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", T.i32(), operands, False, loc, ip))


@dsl_user_op
def _order_copies(*, loc: Site = None, ip: Site = None) -> None:
    """Makes ordinary stores visible to the copy engine."""
    asm("fence.proxy.async.global;", "", None, [], False, loc, ip)


@cute.jit
def announce(counter: cute.Pointer, lane: Int32, num_rows: int) -> None:
    """Adds a warp's finished rows to a tile's counter (int32). Called by every lane once its share is stored."""
    cute.arch.sync_warp()
    if lane % 32 == 0:
        _add_release(counter.toint(), Int32(num_rows))


@cute.jit
def await_rows(counter: cute.Pointer, num_rows: Int32) -> None:
    """Waits until ``num_rows`` rows of a tile are written. Called by the thread that loads tokens."""
    written = _load_acquire(counter.toint())
    while written < num_rows:
        written = _load_acquire(counter.toint())
    _order_copies()
