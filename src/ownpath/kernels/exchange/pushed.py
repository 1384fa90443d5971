"""Device code of a sum over ranks in one launch: each program pushes its share, waits for the others', and adds.

All programs of a rank run at once, as they are fewer than SMs, so that no program waits for one that has no room. The
next kernel may start early (programmatic dependent launch) only once all of them have started.
"""

import triton
import triton.language as tl

from ownpath.kernels.exchange.device import add_rows, await_rows, inbox_of, push


@triton.jit(do_not_specialize=["rank"])
def exchange_rows(
    y_ptr,
    other_ptr,
    out_ptr,
    window_ptr,
    peers_ptr,
    record_ptr,
    rank,
    num_elements,
    share,
    max_elements,
    HAS_OTHER: tl.constexpr,
    PUSHES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ABORT_AT: tl.constexpr,
    INBOX_AT: tl.constexpr,
    LOOKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Pushes, or adds what was pushed last, or both. out may be y: a program reads and writes its own share alone."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if PUSHES:
        epoch = push(
            y_ptr, other_ptr, window_ptr, peers_ptr, rank, num_elements, share, max_elements,
            HAS_OTHER, RANKS, LANES, PROGRAMS, ABORT_AT, INBOX_AT, BLOCK,
        )  # fmt: skip
    else:
        epoch = tl.load(window_ptr + RANKS * PROGRAMS + program)
    if SUMS:
        mine = tl.full((1,), 0, tl.int32) + program
        arrived = await_rows(
            window_ptr, peers_ptr, record_ptr, epoch, mine, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED
        )
        first = program.to(tl.int64) * share
        for start in range(0, share, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = (at < num_elements) & (at < first + share)
            inbox = inbox_of(window_ptr, INBOX_AT)
            y = add_rows(inbox, epoch, at, inside, arrived, max_elements, RANKS)
            tl.store(out_ptr + at, y, mask=inside)
