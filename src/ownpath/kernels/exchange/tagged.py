"""Device code of a sum over ranks of few rows in one launch, whose words say themselves of which exchange they are.

A word is 64 bits, stored at once: two elements, and the epoch. A reader polls the words that it adds, until all have
its epoch, so that nothing is ordered by a release: a trip over the link is all that it takes, for twice the bytes.
Nothing is cleared, as an epoch comes once.

A program's epoch is read by its threads at the start and counted up at the end. Two buffers are enough by the argument
of ``layout``: program 0 has rows in every exchange, waits for all ranks' words, and ends before its rank pushes again.
"""

import triton
import triton.language as tl

from ownpath.kernels.exchange.device import clock_us, tell


@triton.jit
def tags_of(window, TAGS_AT: tl.constexpr):
    """Returns the tagged words behind a window's words, at a multiple of 16 bytes."""
    return tl.multiple_of(window + TAGS_AT, 16).to(tl.pointer_type(tl.int64))


@triton.jit
def low_of(pairs):
    """Returns the first of each two elements, as float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_of(pairs):
    """Returns the second of each two elements, as float32."""
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def paired(low, high):
    """Rounds both to bfloat16, and returns them as one int32."""
    low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _is_late(words, inside, epoch):
    """Returns 1 if one of these words is of another exchange, the same in all threads."""
    return tl.max(tl.where(inside & ((words >> 32).to(tl.int32) != epoch), 1, 0), axis=0)


@triton.jit
def raise_unread(peers_ptr, rank, epoch, is_alive, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Sets a program's flag on all ranks. Nobody reads this one, but flags never lag by half a turn of the epoch."""
    to = tl.arange(0, LANES)
    windows = tl.load(peers_ptr + to, mask=to < RANKS, other=0).to(tl.pointer_type(tl.int32))
    tl.store(windows + rank * PROGRAMS + tl.program_id(0), epoch, mask=(to < RANKS) & is_alive)


@triton.jit
def _late_ranks(places, inside, epoch, rank, max_words, RANKS: tl.constexpr):
    """Returns the other ranks, as bits, of which words are not there. places: of rank 0's words."""
    late = 0
    for source in range(RANKS):  # not unrolled, as it is seldom run
        words = tl.load(places + source * max_words, mask=inside, other=0, volatile=True)
        late |= tl.where(source == rank, 0, _is_late(words, inside, epoch)) << source
    return late


@triton.jit
def await_words(
    places, inside, epoch, source, lost, rank, window_ptr, max_words,
    RANKS: tl.constexpr, ABORT_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Returns a rank's words once they are there, and the ranks that are lost, as bits. places: of rank 0's words."""
    words = tl.load(places + source * max_words, mask=inside, other=0, volatile=True)
    late = _is_late(words, inside, epoch)
    if (late != 0) & (lost == 0):
        polls, limit, start = 0, tl.load(window_ptr + ABORT_AT + 1), clock_us(0, INTERPRETED)
        while (late != 0) & (lost == 0):
            polls += 1
            words = tl.load(places + source * max_words, mask=inside, other=0, volatile=True)
            late = _is_late(words, inside, epoch)
            if (late != 0) & (polls % LOOKS == 0):
                # Threads' clocks differ. The atomic takes one thread's word for it, and tells all.
                named, waited = 0, tl.max(tl.full((32,), 0, tl.int32) + clock_us(polls, INTERPRETED) - start, axis=0)
                if waited > limit:
                    missing = _late_ranks(places, inside, epoch, rank, max_words, RANKS)
                    is_one = (missing & (missing - 1)) == 0
                    named = tl.where(waited > tl.where(is_one, limit, limit + limit // 16), missing, 0)
                lost = tl.atomic_or(window_ptr + ABORT_AT, named, sem="relaxed", scope="sys")
    return words, lost


@triton.jit(do_not_specialize=["rank"])
def exchange_words(
    y_ptr,
    other_ptr,
    out_ptr,
    window_ptr,
    peers_ptr,
    record_ptr,
    rank,
    num_words,
    share,
    max_words,
    HAS_OTHER: tl.constexpr,
    PUSHES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    TAGS_AT: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ABORT_AT: tl.constexpr,
    LOOKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Pushes, or adds what was pushed last, or both. y, other, out: int32, of two elements each. out may be y."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    first = program * share
    epoch = tl.load(window_ptr + RANKS * PROGRAMS + program, volatile=True)
    cell = tl.load(window_ptr + ABORT_AT, volatile=True)
    if PUSHES:
        epoch += 1
        is_alive = cell == 0
        place = ((epoch & 1) * RANKS + rank) * max_words
        for start in range(0, share, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            pairs = tl.load(y_ptr + at, mask=inside, other=0)
            if HAS_OTHER:
                others = tl.load(other_ptr + at, mask=inside, other=0)
                pairs = paired(low_of(pairs) + low_of(others), high_of(pairs) + high_of(others))
            words = (epoch.to(tl.int64) << 32) | (pairs.to(tl.int64) & 0xFFFFFFFF)
            for to in tl.static_range(RANKS):
                window = tl.load(peers_ptr + to).to(tl.pointer_type(tl.int32))
                tl.store(tags_of(window, TAGS_AT) + place + at, words, mask=inside & is_alive)
        raise_unread(peers_ptr, rank, epoch, is_alive, RANKS, LANES, PROGRAMS)
    if SUMS:
        lost = tl.max(tl.zeros((32,), tl.int32) + cell, axis=0)  # threads may have read different values
        for start in range(0, share, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            places = tags_of(window_ptr, TAGS_AT) + (epoch & 1) * RANKS * max_words + at
            low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(RANKS):
                words, lost = await_words(
                    places, inside, epoch, source, lost, rank, window_ptr, max_words,
                    RANKS, ABORT_AT, LOOKS, INTERPRETED,
                )  # fmt: skip
                pairs = words.to(tl.int32)
                low = low_of(pairs) if source == 0 else low + low_of(pairs)
                high = high_of(pairs) if source == 0 else high + high_of(pairs)
            nothing = float("nan")
            sums = paired(tl.where(lost == 0, low, nothing), tl.where(lost == 0, high, nothing))
            tl.store(out_ptr + at, sums, mask=inside)
        if lost != 0:
            tell(peers_ptr, record_ptr, epoch, lost, RANKS, LANES, ABORT_AT)
    if PUSHES:
        tl.debug_barrier()  # all threads have read it
        tl.store(window_ptr + RANKS * PROGRAMS + program, epoch)
