"""Device code of exchanged rows: each program pushes its share of what others need, and waits for theirs.

Elements are words of 16 bits, whatever they mean; only ``scatter_rows`` computes with them. Each rank writes to the
others in an order of its own, so that no link has them all at once. N ranks, P pushing programs.
"""

import triton
import triton.language as tl

from ownpath.kernels.exchange.device import await_rows, count_up, inbox_of, look, raise_flags


@triton.jit
def _words_of(window, AT: tl.constexpr):
    """Returns what is behind a window's words, from ``AT`` on, as words of 16 bits."""
    return inbox_of(window, AT).to(tl.pointer_type(tl.int16))


@triton.jit
def _share_of(num_elements, PROGRAMS: tl.constexpr):
    """Returns a program's share of elements, as ``WindowLayout.share`` does."""
    return tl.cdiv(num_elements, PROGRAMS * 128) * 128


@triton.jit
def _part_of(start, num_elements, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the places of a step of a program's share, and which of them are in it."""
    share = _share_of(num_elements, PROGRAMS)
    first = tl.program_id(0).to(tl.int64) * share
    at = first + start + tl.arange(0, BLOCK)
    return at, (at < num_elements) & (at < first + share)


@triton.jit
def _await_own(
    window_ptr, peers_ptr, record_ptr, epoch,
    RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Waits for the program of this number of every rank. Returns False if the wait was given up."""
    mine = tl.full((1,), 0, tl.int32) + tl.program_id(0)
    return await_rows(
        window_ptr, peers_ptr, record_ptr, epoch, mine, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED
    )


@triton.jit
def _gathered_at(at, num_elements, width, source, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns where elements of a rank lie among those of all: its rows behind others', or its columns beside them."""
    if COLUMNS:
        at32 = at.to(tl.int32)
        return (at32 // width).to(tl.int64) * (width * RANKS) + source * width + at32 % width
    else:  # noqa: RET505 (one of the two branches is compiled)
        return source.to(tl.int64) * num_elements + at


@triton.jit(do_not_specialize=["rank"])
def gather_rows(
    x_ptr, out_ptr, window_ptr, peers_ptr, record_ptr, rank, num_elements, width, max_elements,
    COLUMNS: tl.constexpr, PUSHES: tl.constexpr, TAKES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    INBOX_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes x, or copies what was pushed last to the output, or both. width: elements of a row, by columns.

    A rank pushes nothing to itself: what is its own goes straight to the output.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    share = _share_of(num_elements, PROGRAMS)
    if PUSHES:
        epoch = count_up(window_ptr, RANKS, PROGRAMS)
        if look(window_ptr + ABORT_AT) == 0:
            place = ((epoch & 1) * RANKS + rank).to(tl.int64) * max_elements
            for start in range(0, share, BLOCK):
                at, inside = _part_of(start, num_elements, PROGRAMS, BLOCK)
                x = tl.load(x_ptr + at, mask=inside, other=0)
                for step in tl.static_range(1, RANKS):
                    window = tl.load(peers_ptr + (rank + step) % RANKS).to(tl.pointer_type(tl.int32))
                    tl.store(_words_of(window, INBOX_AT) + place + at, x, mask=inside)
                tl.store(out_ptr + _gathered_at(at, num_elements, width, rank, RANKS, COLUMNS), x, mask=inside)
            raise_flags(window_ptr, peers_ptr, rank, epoch, RANKS, LANES, PROGRAMS)
    else:
        epoch = tl.load(window_ptr + RANKS * PROGRAMS + tl.program_id(0))
    if TAKES:
        arrived = _await_own(
            window_ptr, peers_ptr, record_ptr, epoch, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED
        )
        inbox = _words_of(window_ptr, INBOX_AT) + ((epoch & 1) * RANKS).to(tl.int64) * max_elements
        nothing = tl.full((BLOCK,), 0x7FC0, tl.int16)  # NaN as bfloat16; two of them are one as float32
        for start in range(0, share, BLOCK):
            at, inside = _part_of(start, num_elements, PROGRAMS, BLOCK)
            for step in tl.static_range(1, RANKS):
                source = (rank + step) % RANKS
                place = source.to(tl.int64) * max_elements
                x = tl.load(inbox + place + at, mask=inside, other=0, cache_modifier=".cg")
                to = _gathered_at(at, num_elements, width, source, RANKS, COLUMNS)
                tl.store(out_ptr + to, tl.where(arrived, x, nothing), mask=inside)


@triton.jit
def _place_rows(
    x_ptr, peers_ptr, rank, place, num_elements,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, ROWS_AT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a program's share of a tensor among the rows of all ranks, on every rank."""
    for start in range(0, _share_of(num_elements, PROGRAMS), BLOCK):
        at, inside = _part_of(start, num_elements, PROGRAMS, BLOCK)
        x = tl.load(x_ptr + at, mask=inside, other=0)
        mine = place + rank.to(tl.int64) * num_elements + at
        for step in tl.static_range(RANKS):
            window = tl.load(peers_ptr + (rank + step) % RANKS).to(tl.pointer_type(tl.int32))
            tl.store(_words_of(window, ROWS_AT) + mine, x, mask=inside)


@triton.jit(do_not_specialize=["rank"])
def place_rows(
    x0_ptr, x1_ptr, x2_ptr, window_ptr, peers_ptr, record_ptr, rank, num0, num1, num2, at1, at2,
    PARTS: tl.constexpr, PUSHES: tl.constexpr, AWAITS: tl.constexpr, ROWS_AT: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    INBOX_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes up to three tensors to where they are read, or waits for what was pushed last, or both.

    num: elements of each; at1, at2: where the rows of the second and third begin.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PUSHES:
        epoch = count_up(window_ptr, RANKS, PROGRAMS)
        if look(window_ptr + ABORT_AT) == 0:
            _place_rows(x0_ptr, peers_ptr, rank, 0, num0, RANKS, PROGRAMS, ROWS_AT, BLOCK)
            if PARTS > 1:
                _place_rows(x1_ptr, peers_ptr, rank, at1, num1, RANKS, PROGRAMS, ROWS_AT, BLOCK)
            if PARTS > 2:
                _place_rows(x2_ptr, peers_ptr, rank, at2, num2, RANKS, PROGRAMS, ROWS_AT, BLOCK)
            raise_flags(window_ptr, peers_ptr, rank, epoch, RANKS, LANES, PROGRAMS)
    else:
        epoch = tl.load(window_ptr + RANKS * PROGRAMS + tl.program_id(0))
    if AWAITS:
        _await_own(window_ptr, peers_ptr, record_ptr, epoch, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED)


@triton.jit(do_not_specialize=["rank"])
def scatter_rows(
    y_ptr, other_ptr, out_ptr, window_ptr, peers_ptr, record_ptr, rank, num_elements, max_elements,
    HAS_OTHER: tl.constexpr, PUSHES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    INBOX_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes each rank's rows of y to that rank, or adds what was pushed last to this rank's own, or both.

    num_elements: of one rank's rows. other: added to the rounded sum.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    share = _share_of(num_elements, PROGRAMS)
    if PUSHES:
        epoch = count_up(window_ptr, RANKS, PROGRAMS)
        if look(window_ptr + ABORT_AT) == 0:
            place = ((epoch & 1) * RANKS + rank).to(tl.int64) * max_elements
            for start in range(0, share, BLOCK):
                at, inside = _part_of(start, num_elements, PROGRAMS, BLOCK)
                for step in tl.static_range(1, RANKS):
                    to = (rank + step) % RANKS
                    y = tl.load(y_ptr + to.to(tl.int64) * num_elements + at, mask=inside, other=0.0)
                    window = tl.load(peers_ptr + to).to(tl.pointer_type(tl.int32))
                    tl.store(inbox_of(window, INBOX_AT) + place + at, y, mask=inside)
            raise_flags(window_ptr, peers_ptr, rank, epoch, RANKS, LANES, PROGRAMS)
    else:
        epoch = tl.load(window_ptr + RANKS * PROGRAMS + tl.program_id(0))
    if SUMS:
        arrived = _await_own(
            window_ptr, peers_ptr, record_ptr, epoch, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED
        )
        inbox = inbox_of(window_ptr, INBOX_AT) + ((epoch & 1) * RANKS).to(tl.int64) * max_elements
        own = y_ptr + rank.to(tl.int64) * num_elements
        for start in range(0, share, BLOCK):
            at, inside = _part_of(start, num_elements, PROGRAMS, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(RANKS):
                if source == rank:
                    part = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
                else:
                    pushed = inbox + source * max_elements + at
                    part = tl.load(pushed, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
                total = part if source == 0 else total + part
            y = tl.where(arrived, total, float("nan")).to(tl.bfloat16)
            if HAS_OTHER:
                other = tl.load(other_ptr + at, mask=inside, other=0.0)
                y = (y.to(tl.float32) + other.to(tl.float32)).to(tl.bfloat16)
            tl.store(out_ptr + at, y, mask=inside)
