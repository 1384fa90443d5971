"""Device code of exchanged rows: each program pushes its share of what others need, waits for theirs, and copies it.

Nothing is computed: elements are words of 16 bits, whatever they mean. A rank pushes nothing to itself; what is its own
goes straight to the output. Peers are written in another order by each rank, so that no link has them all at once.
N ranks, P pushing programs.
"""

import triton
import triton.language as tl

from ownpath.kernels.exchange.device import await_rows, count_up, inbox_of, look, raise_flags


@triton.jit
def _words_of(window, INBOX_AT: tl.constexpr):
    """Returns the inbox behind a window's words, as words of 16 bits."""
    return inbox_of(window, INBOX_AT).to(tl.pointer_type(tl.int16))


@triton.jit
def _share_of(num_elements, PROGRAMS: tl.constexpr):
    """Returns a program's share of elements, as ``WindowLayout.share`` does."""
    return tl.cdiv(num_elements, PROGRAMS * 128) * 128


@triton.jit
def _gathered_at(at, num_elements, width, source, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns where elements of a rank lie among those of all: its rows behind others', or its columns beside them."""
    if COLUMNS:
        at32 = at.to(tl.int32)
        return (at32 // width).to(tl.int64) * (width * RANKS) + source * width + at32 % width
    else:  # noqa: RET505 (one of the two branches is compiled)
        return source.to(tl.int64) * num_elements + at


@triton.jit
def _push_part(
    x_ptr, out_ptr, peers_ptr, rank, place, num_elements, width,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, INBOX_AT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a program's share of one tensor into the others' inboxes at ``place``, and into this rank's output."""
    share = _share_of(num_elements, PROGRAMS)
    first = tl.program_id(0).to(tl.int64) * share
    for start in range(0, share, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = (at < num_elements) & (at < first + share)
        x = tl.load(x_ptr + at, mask=inside, other=0)
        for step in tl.static_range(1, RANKS):
            to = (rank + step) % RANKS
            window = tl.load(peers_ptr + to).to(tl.pointer_type(tl.int32))
            tl.store(_words_of(window, INBOX_AT) + place + at, x, mask=inside)
        tl.store(out_ptr + _gathered_at(at, num_elements, width, rank, RANKS, COLUMNS), x, mask=inside)


@triton.jit
def _take_part(
    inbox, out_ptr, rank, arrived, num_elements, width, max_elements,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a program's share of the other ranks' tensors out of an inbox; NaN if they have not arrived."""
    share = _share_of(num_elements, PROGRAMS)
    first = tl.program_id(0).to(tl.int64) * share
    nothing = tl.full((BLOCK,), 0x7FC0, tl.int16)  # NaN as bfloat16; two of them are one as float32
    for start in range(0, share, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = (at < num_elements) & (at < first + share)
        for step in tl.static_range(1, RANKS):
            source = (rank + step) % RANKS
            x = tl.load(inbox + source.to(tl.int64) * max_elements + at, mask=inside, other=0, cache_modifier=".cg")
            to = _gathered_at(at, num_elements, width, source, RANKS, COLUMNS)
            tl.store(out_ptr + to, tl.where(arrived, x, nothing), mask=inside)


@triton.jit(do_not_specialize=["rank"])
def gather_rows(
    x0_ptr, x1_ptr, x2_ptr, out0_ptr, out1_ptr, out2_ptr, window_ptr, peers_ptr, record_ptr,
    rank, num0, num1, num2, at1, at2, width, max_elements,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, PUSHES: tl.constexpr, TAKES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PROGRAMS: tl.constexpr, ABORT_AT: tl.constexpr,
    INBOX_AT: tl.constexpr, LOOKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Pushes up to three tensors, or takes what was pushed last, or both. num: elements of each; at1, at2: where the
    second and third begin in an inbox; width: elements of a row, by columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if PUSHES:
        epoch = count_up(window_ptr, RANKS, PROGRAMS)
        if look(window_ptr + ABORT_AT) == 0:
            place = ((epoch & 1) * RANKS + rank).to(tl.int64) * max_elements
            _push_part(
                x0_ptr, out0_ptr, peers_ptr, rank, place, num0, width, RANKS, PROGRAMS, INBOX_AT, COLUMNS, BLOCK
            )  # fmt: skip
            if PARTS > 1:
                _push_part(
                    x1_ptr, out1_ptr, peers_ptr, rank, place + at1, num1, width,
                    RANKS, PROGRAMS, INBOX_AT, COLUMNS, BLOCK,
                )  # fmt: skip
            if PARTS > 2:
                _push_part(
                    x2_ptr, out2_ptr, peers_ptr, rank, place + at2, num2, width,
                    RANKS, PROGRAMS, INBOX_AT, COLUMNS, BLOCK,
                )  # fmt: skip
            raise_flags(window_ptr, peers_ptr, rank, epoch, RANKS, LANES, PROGRAMS)
    else:
        epoch = tl.load(window_ptr + RANKS * PROGRAMS + program)
    if TAKES:
        mine = tl.full((1,), 0, tl.int32) + program
        arrived = await_rows(
            window_ptr, peers_ptr, record_ptr, epoch, mine, RANKS, LANES, PROGRAMS, ABORT_AT, LOOKS, INTERPRETED
        )
        inbox = _words_of(window_ptr, INBOX_AT) + ((epoch & 1) * RANKS).to(tl.int64) * max_elements
        _take_part(inbox, out0_ptr, rank, arrived, num0, width, max_elements, RANKS, PROGRAMS, COLUMNS, BLOCK)
        if PARTS > 1:
            _take_part(inbox + at1, out1_ptr, rank, arrived, num1, width, max_elements, RANKS, PROGRAMS, COLUMNS, BLOCK)
        if PARTS > 2:
            _take_part(inbox + at2, out2_ptr, rank, arrived, num2, width, max_elements, RANKS, PROGRAMS, COLUMNS, BLOCK)
