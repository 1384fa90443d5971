"""Device code of exchanged rows, of few words: each word says of which exchange it is, as ``tagged`` explains.

Nothing is pushed to a rank itself: what is its own is read where it is. Program 0 has words for every rank in every
exchange, and waits for all others', so that the argument of ``tagged`` holds here too.
"""

import triton
import triton.language as tl

from ownpath.kernels.exchange.device import tell
from ownpath.kernels.exchange.tagged import await_words, high_of, low_of, paired, raise_unread, tags_of


@triton.jit
def _gathered_at(at, first, num_words, width, start, source, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns where words of a rank's tensor, which begins at ``first``, lie among those of all ranks."""
    if COLUMNS:
        return at // width * (width * RANKS) + source * width + at % width
    else:  # noqa: RET505 (one of the two branches is compiled)
        return start + source * num_words + (at - first)


@triton.jit
def _store_gathered(
    out_ptr, pairs, at, inside, source, num0, num1, num2, first1, first2, start1, start2, width,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Stores a rank's words where its tensors lie."""
    tl.store(out_ptr + _gathered_at(at, 0, num0, width, 0, source, RANKS, COLUMNS), pairs, mask=inside & (at < num0))
    if PARTS > 1:
        to = _gathered_at(at, first1, num1, width, start1, source, RANKS, COLUMNS)
        tl.store(out_ptr + to, pairs, mask=inside & (at >= first1) & (at < first1 + num1))
    if PARTS > 2:
        to = _gathered_at(at, first2, num2, width, start2, source, RANKS, COLUMNS)
        tl.store(out_ptr + to, pairs, mask=inside & (at >= first2) & (at < first2 + num2))


@triton.jit
def _load_given(x0_ptr, x1_ptr, x2_ptr, at, inside, num0, num1, num2, first1, first2, PARTS: tl.constexpr):
    """Returns words of the tensors that lie behind each other; between them 0."""
    pairs = tl.load(x0_ptr + at, mask=inside & (at < num0), other=0)
    if PARTS > 1:
        pairs |= tl.load(x1_ptr + (at - first1), mask=inside & (at >= first1) & (at < first1 + num1), other=0)
    if PARTS > 2:
        pairs |= tl.load(x2_ptr + (at - first2), mask=inside & (at >= first2) & (at < first2 + num2), other=0)
    return pairs


@triton.jit(do_not_specialize=["rank", "num1", "num2"])
def gather_words(
    x0_ptr, x1_ptr, x2_ptr, out_ptr, window_ptr, peers_ptr, record_ptr, rank,
    num0, num1, num2, first1, first2, start1, start2, width, num_words, share, max_words,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, PUSHES: tl.constexpr, TAKES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, TAGS_AT: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr,
    ABORT_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes up to three tensors, or stores all ranks' where they are read, or both.

    num: int32 words of each; first: where they begin among the ``num_words`` that travel; start: where all ranks' rows
    begin in the output. width: words of a row, by columns. Words between tensors travel too, so that none is masked
    by itself. Columns of a lost rank are NaN; rows are left as they were.
    """
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
        for begin in range(0, share, BLOCK):
            at = first + begin + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            pairs = _load_given(x0_ptr, x1_ptr, x2_ptr, at, inside, num0, num1, num2, first1, first2, PARTS)
            words = (epoch.to(tl.int64) << 32) | (pairs.to(tl.int64) & 0xFFFFFFFF)
            for step in tl.static_range(1, RANKS):
                window = tl.load(peers_ptr + (rank + step) % RANKS).to(tl.pointer_type(tl.int32))
                tl.store(tags_of(window, TAGS_AT) + place + at, words, mask=inside & is_alive)
            _store_gathered(
                out_ptr, pairs, at, inside, rank, num0, num1, num2, first1, first2, start1, start2, width,
                PARTS, COLUMNS, RANKS,
            )  # fmt: skip
        raise_unread(peers_ptr, rank, epoch, is_alive, RANKS, LANES, PROGRAMS)
    if TAKES:
        lost = tl.max(tl.zeros((32,), tl.int32) + cell, axis=0)  # threads may have read different values
        for begin in range(0, share, BLOCK):
            at = first + begin + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            places = tags_of(window_ptr, TAGS_AT) + (epoch & 1) * RANKS * max_words + at
            for step in range(1, RANKS):  # not unrolled: for eight ranks there are too few registers
                source = (rank + step) % RANKS
                words, lost = await_words(
                    places, inside, epoch, source, lost, rank, window_ptr, max_words,
                    RANKS, ABORT_AT, LOOKS, INTERPRETED,
                )  # fmt: skip
                pairs = words.to(tl.int32)
                is_stored = inside
                if COLUMNS:
                    pairs = tl.where(lost == 0, pairs, 0x7FC07FC0)  # NaN as bfloat16, and as float32
                else:
                    is_stored = inside & (lost == 0)
                _store_gathered(
                    out_ptr, pairs, at, is_stored, source, num0, num1, num2, first1, first2, start1, start2, width,
                    PARTS, COLUMNS, RANKS,
                )  # fmt: skip
        if lost != 0:
            tell(peers_ptr, record_ptr, epoch, lost, RANKS, LANES, ABORT_AT)
    if PUSHES:
        tl.debug_barrier()  # all threads have read it
        tl.store(window_ptr + RANKS * PROGRAMS + program, epoch)


@triton.jit(do_not_specialize=["rank"])
def scatter_words(
    y_ptr, other_ptr, out_ptr, window_ptr, peers_ptr, record_ptr, rank, num_words, share, max_words,
    HAS_OTHER: tl.constexpr, PUSHES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, TAGS_AT: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr,
    ABORT_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes each rank's rows of y to that rank, or adds what was pushed last to this rank's own, or both.

    num_words: of one rank's rows, of two elements each. other: added to the rounded sum.
    """
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
        for begin in range(0, share, BLOCK):
            at = first + begin + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            for step in tl.static_range(1, RANKS):
                to = (rank + step) % RANKS
                pairs = tl.load(y_ptr + to * num_words + at, mask=inside, other=0)
                words = (epoch.to(tl.int64) << 32) | (pairs.to(tl.int64) & 0xFFFFFFFF)
                window = tl.load(peers_ptr + to).to(tl.pointer_type(tl.int32))
                tl.store(tags_of(window, TAGS_AT) + place + at, words, mask=inside & is_alive)
        raise_unread(peers_ptr, rank, epoch, is_alive, RANKS, LANES, PROGRAMS)
    if SUMS:
        lost = tl.max(tl.zeros((32,), tl.int32) + cell, axis=0)  # threads may have read different values
        for begin in range(0, share, BLOCK):
            at = first + begin + tl.arange(0, BLOCK)
            inside = (at < num_words) & (at < first + share)
            places = tags_of(window_ptr, TAGS_AT) + (epoch & 1) * RANKS * max_words + at
            own = tl.load(y_ptr + rank * num_words + at, mask=inside, other=0)
            low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(RANKS):
                pairs = own
                if source != rank:
                    words, lost = await_words(
                        places, inside, epoch, source, lost, rank, window_ptr, max_words,
                        RANKS, ABORT_AT, LOOKS, INTERPRETED,
                    )  # fmt: skip
                    pairs = words.to(tl.int32)
                low = low_of(pairs) if source == 0 else low + low_of(pairs)
                high = high_of(pairs) if source == 0 else high + high_of(pairs)
            nothing = float("nan")
            sums = paired(tl.where(lost == 0, low, nothing), tl.where(lost == 0, high, nothing))
            if HAS_OTHER:
                others = tl.load(other_ptr + at, mask=inside, other=0)
                sums = paired(low_of(sums) + low_of(others), high_of(sums) + high_of(others))
            tl.store(out_ptr + at, sums, mask=inside)
        if lost != 0:
            tell(peers_ptr, record_ptr, epoch, lost, RANKS, LANES, ABORT_AT)
    if PUSHES:
        tl.debug_barrier()  # all threads have read it
        tl.store(window_ptr + RANKS * PROGRAMS + program, epoch)
