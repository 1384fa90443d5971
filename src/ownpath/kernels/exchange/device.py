"""Device code of pushed exchanges; ``layout`` explains windows and the protocol.

Flags and the abort cell are read and written by atomics. Of a scalar or a tensor, each element is done by one thread,
and its result is given to all through shared memory: all threads of a program see the same, so loops end for all of
them at once, and what one thread has acquired is visible to all. N ranks, P pushing programs.
"""

import triton
import triton.language as tl


@triton.jit
def clock_us(polls, INTERPRETED: tl.constexpr):
    """Returns microseconds; the interpreter, which has no clock, counts polls."""
    if INTERPRETED:
        return polls
    else:  # noqa: RET505 (one of the two branches is compiled)
        return (tl.extra.cuda.globaltimer() // 1000).to(tl.int32)


@triton.jit
def look(cell_ptr):
    """Reads the abort cell: the same value in all threads."""
    return tl.atomic_or(cell_ptr, 0, sem="relaxed", scope="sys")


@triton.jit
def inbox_of(window, INBOX_AT: tl.constexpr):
    """Returns the inbox behind a window's words: at a multiple of 16 bytes, which an address from a table does not
    tell."""
    return tl.multiple_of(window + INBOX_AT, 16).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def count_up(window_ptr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Begins a program's next exchange, and returns its epoch."""
    # By an atomic: threads that read for themselves could read what another has counted up already.
    return tl.atomic_add(window_ptr + RANKS * PROGRAMS + tl.program_id(0), 1, sem="relaxed", scope="gpu") + 1


@triton.jit
def raise_flags(
    window_ptr, peers_ptr, rank, epoch, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sets a program's flag on all ranks, behind what all its threads have stored."""
    # All threads' rows are in front of the one thread's release, which makes them visible too.
    tl.debug_barrier()
    to = tl.arange(0, LANES)
    windows = tl.load(peers_ptr + to, mask=to < RANKS, other=0).to(tl.pointer_type(tl.int32))
    flags = windows + rank * PROGRAMS + tl.program_id(0)
    tl.atomic_xchg(flags, tl.full((LANES,), 0, tl.int32) + epoch, mask=to < RANKS, sem="release", scope="sys")


@triton.jit
def push(
    y_ptr, other_ptr, window_ptr, peers_ptr, rank, num_elements, share, max_elements,
    HAS_OTHER: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr,
    ABORT_AT: tl.constexpr, INBOX_AT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a program's share of y, or of y + other as it would be stored, into all inboxes, and then its flag."""
    program = tl.program_id(0)
    epoch = count_up(window_ptr, RANKS, PROGRAMS)
    if look(window_ptr + ABORT_AT) == 0:
        first = program.to(tl.int64) * share
        place = ((epoch & 1) * RANKS + rank).to(tl.int64) * max_elements
        for start in range(0, share, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = (at < num_elements) & (at < first + share)
            y = tl.load(y_ptr + at, mask=inside, other=0.0)
            if HAS_OTHER:
                other = tl.load(other_ptr + at, mask=inside, other=0.0)
                y = (y.to(tl.float32) + other.to(tl.float32)).to(tl.bfloat16)
            for to in tl.static_range(RANKS):
                window = tl.load(peers_ptr + to).to(tl.pointer_type(tl.int32))
                tl.store(inbox_of(window, INBOX_AT) + place + at, y, mask=inside)
        raise_flags(window_ptr, peers_ptr, rank, epoch, RANKS, LANES, PROGRAMS)
    return epoch


@triton.jit
def _missing(window_ptr, epoch, programs, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Returns the ranks, as bits, of which a program's flag is not there. programs: [W] of the flags to look at."""
    source = tl.arange(0, LANES)
    flags = window_ptr + source[:, None] * PROGRAMS + programs[None, :]
    mask = (source[:, None] < RANKS) & (programs[None, :] >= 0)
    found = tl.atomic_or(flags, 0, mask=mask, sem="acquire", scope="sys")
    late = tl.where(mask & (found - epoch < 0), 1, 0)
    return tl.sum(tl.max(late, axis=1) << source, axis=0)


@triton.jit
def await_rows(
    window_ptr, peers_ptr, record_ptr, epoch, programs,
    RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Waits for flags of all ranks. Returns False if the wait was given up: what it waited for must not be used."""
    cell = window_ptr + ABORT_AT
    polls, lost = 0, look(cell)
    missing = _missing(window_ptr, epoch, programs, RANKS, LANES, PROGRAMS)
    if (missing != 0) & (lost == 0):
        limit, start = tl.load(window_ptr + ABORT_AT + 1), clock_us(polls, INTERPRETED)
        while (missing != 0) & (lost == 0):
            polls += 1
            missing = _missing(window_ptr, epoch, programs, RANKS, LANES, PROGRAMS)
            if (missing != 0) & (polls % LOOKS == 0):
                is_one = (missing & (missing - 1)) == 0
                longest = tl.where(is_one, limit, limit + limit // 16)
                is_over = clock_us(polls, INTERPRETED) - start > longest
                # Threads' clocks differ. The atomic takes one thread's word for it, and tells all.
                lost = tl.atomic_or(cell, tl.where(is_over, missing, 0), sem="relaxed", scope="sys")
        # The atomic returned what was there before: who sets the cell sees it at the next look.
    if lost != 0:
        tell(peers_ptr, record_ptr, epoch, lost, RANKS, LANES, ABORT_AT)
    return lost == 0


@triton.jit
def tell(peers_ptr, record_ptr, epoch, lost, RANKS: tl.constexpr, LANES: tl.constexpr, ABORT_AT: tl.constexpr):
    """Sets all abort cells, and writes {epoch, ranks} for the host in one store, which cannot be torn."""
    to = tl.arange(0, LANES)
    windows = tl.load(peers_ptr + to, mask=to < RANKS, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_or(windows + ABORT_AT, tl.full((LANES,), 0, tl.int32) + lost, mask=to < RANKS, sem="relaxed", scope="sys")
    tl.store(record_ptr, (epoch.to(tl.int64) << 32) | lost.to(tl.int64))


@triton.jit
def add_rows(inbox, epoch, at, inside, arrived, max_elements, RANKS: tl.constexpr):
    """Adds all ranks' elements in the order of ranks in float32, and rounds once; NaN if they have not arrived."""
    inbox += ((epoch & 1) * RANKS).to(tl.int64) * max_elements
    total = tl.load(inbox + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    for source in tl.static_range(1, RANKS):
        part = tl.load(inbox + source * max_elements + at, mask=inside, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    return tl.where(arrived, total, float("nan")).to(tl.bfloat16)
