"""How one grouped product hands its tiles to the next while both run: a counter of finished rows per tile of tokens.

The second product reads what the first wrote. Waiting for the first to end would leave SMs idle while its last tiles
finish; instead each warp of the first adds the weight rows it has written to the counter of its tile of tokens, and
the second starts on a tile when all rows are there. Counters stand in the schedule, and ``Align`` sets them to zero.
The first product's CTAs all run before one of the second is started, so that waiting always ends.
"""

from typing import Any

from cutlass import Int32, Int64, cute
from cutlass.cutlass_dsl import T, dsl_user_op

from ownpath.kernels.dsl.ptx import Value, asm


@dsl_user_op
def _add_release(address: Value, amount: Value, *, loc: Any = None, ip: Any = None) -> None:
    """Adds to a counter after everything that this thread has seen written."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(amount).ir_value(loc=loc, ip=ip)]
    asm("red.release.gpu.global.add.u32 [$0], $1;", "l,r", None, operands, False, loc, ip)


@dsl_user_op
def _load_acquire(address: Value, *, loc: Any = None, ip: Any = None) -> Int32:
    """A counter, before everything that this thread reads next."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(asm("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", T.i32(), operands, False, loc, ip))


@dsl_user_op
def _order_copies(*, loc: Any = None, ip: Any = None) -> None:
    """Lets the copy engine see what ordinary stores wrote."""
    asm("fence.proxy.async.global;", "", None, [], False, loc, ip)


@cute.jit
def announce(counter: cute.Pointer, lane: Int32, num_rows: int) -> None:
    """By every lane of a warp, when its share of a tile is stored. counter: int32."""
    cute.arch.sync_warp()
    if lane % 32 == 0:
        _add_release(counter.toint(), Int32(num_rows))


@cute.jit
def await_rows(counter: cute.Pointer, num_rows: Int32) -> None:
    """By the thread that copies tokens in: returns when ``num_rows`` rows of a tile are written."""
    written = _load_acquire(counter.toint())
    while written < num_rows:
        written = _load_acquire(counter.toint())
    _order_copies()
