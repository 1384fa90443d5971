"""Pushed rows and columns by the interpreter: several ranks as tensors of one process, in every order that the protocol
allows. Bits are random, so that NaNs of every kind are among them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import pytest
import torch
from support.exchange_orders import Event, orders, random_order

from ownpath.kernels.exchange import gather
from ownpath.kernels.exchange.gather import PUSHED_GATHER, rows_in_place, start_gather, start_rows
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_gather
from ownpath.kernels.exchange.scatter import PUSHED_SCATTER, start_scatter, start_tagged_scatter
from ownpath.kernels.exchange.window import Window, virtual_windows

CPU = torch.device("cpu")
Rows = tuple[torch.Tensor, ...]


def drawn(seed: int, *shapes: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Rows:
    """Tensors of random bits."""
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(256, (rows, columns * dtype.itemsize), generator=g, dtype=torch.uint8).view(dtype)
        for rows, columns in shapes
    )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))


@dataclass
class Run:
    """Virtual ranks that gather; given: by exchange and rank. outs: by rank and exchange."""

    windows: list[Window]
    given: list[list[torch.Tensor]]
    by_columns: bool = False
    start: Callable[..., object] = start_gather
    outs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        what, rank, step = event
        x, size = self.given[step][rank], len(self.windows)
        if (rank, step) not in self.outs:
            shape = (len(x), size * x.shape[1]) if self.by_columns else (size * len(x), x.shape[1])
            self.outs[rank, step] = x.new_empty(shape)
            self.outs[rank, step].view(torch.int16).fill_(7)
        out = self.outs[rank, step]
        self.start(self.windows[rank], x, out, self.by_columns, pushes=what == "push", takes=what == "sum")

    def check(self) -> None:
        for (rank, step), out in self.outs.items():
            assert same(out, all_gather(self.given[step], -1 if self.by_columns else 0)), (rank, step)


@dataclass
class PlacedRun:
    """Virtual ranks that push several tensors to their places, and then sums of them to each other."""

    windows: list[Window]
    given: list[list[Rows]]
    forms: tuple[str, ...] = ("pushed",)

    def do(self, event: Event) -> None:
        """Exchanges in turn: rows, and the sum of what was read of them."""
        what, rank, step = event
        window, xs = self.windows[rank], self.given[step // 2][rank]
        pushes, reads = what == "push", what == "sum"
        is_tagged = self.forms[step % len(self.forms)] == "tagged"
        if step % 2 == 0:
            (gather.start_tagged_rows if is_tagged else start_rows)(window, xs, pushes, reads)
            return
        if pushes:  # experts read here, in front of the push
            self.check(rank, step // 2)
        part = torch.ones(len(self.windows), 128, dtype=torch.bfloat16)
        out = torch.zeros(1, 128, dtype=torch.bfloat16)
        (start_tagged_scatter if is_tagged else start_scatter)(window, part, None, out, pushes, reads)
        if reads:
            assert (out == len(self.windows)).all()

    def check(self, rank: int, call: int) -> None:
        xs = self.given[call][rank]
        for idx, found in enumerate(rows_in_place(self.windows[rank], xs)):
            assert same(found, all_gather([given[idx] for given in self.given[call]])), (rank, call, idx)


FORMS = pytest.mark.parametrize("start", [start_gather, gather.start_tagged_gather])


@FORMS
@pytest.mark.parametrize(
    ("size", "shapes", "by_columns", "every"), [(2, [(2, 64), (1, 130)], True, 5), (3, [(2, 20)], False, 8)]
)
def test_every_order_gathers_the_same(
    size: int, shapes: list[tuple[int, int]], by_columns: bool, every: int, start: Callable[..., object]
) -> None:
    """Sizes change between exchanges; the epoch wraps. Of the orders, which tests of sums go through, every so many."""
    layout = WindowLayout(size, 384, num_programs=1)
    given = [[drawn(10 * step + rank, shape)[0] for rank in range(size)] for step, shape in enumerate(shapes)]
    for order in islice(orders(size, len(shapes)), 0, None, every):
        run = Run(virtual_windows(layout, CPU, epoch=-1 if size == 2 else 2**31 - 1), given, by_columns, start)
        for event in order:
            run.do(event)
        run.check()
        assert all(window.lost() is None for window in run.windows)


@pytest.mark.parametrize(
    ("size", "rows", "dtype", "by_columns", "start"),
    [
        (3, 3, torch.bfloat16, False, start_gather),
        (3, 3, torch.float32, True, start_gather),
        (2, 3, torch.int32, False, start_gather),
        (2, 2, torch.int64, True, start_gather),
        (3, 2, torch.bfloat16, False, gather.start_tagged_gather),
        (3, 3, torch.float32, True, gather.start_tagged_gather),
        (2, 2, torch.int64, True, gather.start_tagged_gather),
    ],
)
def test_bits_of_any_dtype_stay(
    size: int, rows: int, dtype: torch.dtype, by_columns: bool, start: Callable[..., object]
) -> None:
    """Over three programs, the last of which has no share, or a part of one."""
    layout, given = (
        WindowLayout(size, 384, num_programs=3),
        [[drawn(r, (rows, 37), dtype=dtype)[0] for r in range(size)]],
    )
    run = Run(virtual_windows(layout, CPU), given, by_columns, start)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(size)]:
        run.do(event)
    run.check()


def tokens(step: int, size: int, count: int) -> list[Rows]:
    """Each rank's rows with experts and weights."""

    def one(rank: int) -> Rows:
        seed = 100 * step + 10 * rank
        (x,), (ids,) = drawn(seed, (count, 72)), drawn(seed + 1, (count, 6), dtype=torch.int64)
        return x, ids, drawn(seed + 2, (count, 6), dtype=torch.float32)[0]

    return [one(rank) for rank in range(size)]


MIXED = ("tagged", "pushed", "pushed", "tagged")


@pytest.mark.parametrize(
    ("size", "count", "forms"),
    [(2, 1, ("pushed",)), (2, 1, ("tagged",)), (2, 2, MIXED), (2, 1, MIXED[::-1]), (3, 1, MIXED)],
)
def test_tokens_travel_to_their_places_in_any_order(size: int, count: int, forms: tuple[str, ...]) -> None:
    """Three tensors under one epoch, and a sum behind their readers; then another number of rows, in the same place.
    The epoch wraps; a rank may push while others are an exchange behind. So many random orders."""
    layout = WindowLayout(size, 128, num_programs=2, row_elements=1024)
    given = [tokens(step, size, count) for step, count in enumerate((5, 1))]
    for order in (random_order(size, 4, seed) for seed in range(count)):
        run = PlacedRun(virtual_windows(layout, CPU, epoch=2**31 - 2), given, forms)
        for event in order:
            run.do(event)
        assert all(window.lost() is None for window in run.windows)


@pytest.mark.parametrize("form", ["pushed", "tagged"])
def test_eight_ranks_rows_lie_in_their_order(form: str) -> None:
    layout, given = WindowLayout(8, 128, num_programs=1, row_elements=512), [tokens(0, 8, 2)]
    run = PlacedRun(virtual_windows(layout, CPU), given, (form,))
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(8)]:
        run.do(event)
    for rank in range(8):
        run.check(rank, 0)


def test_rows_of_a_lost_rank_are_not_awaited_for_ever() -> None:
    windows = virtual_windows(WindowLayout(2, 128, num_programs=1, row_elements=512), CPU)
    windows[0].set_limit(20)
    before = windows[1].words[windows[1].layout.rows_at :].clone()
    PUSHED_GATHER.rows(tokens(0, 2, 1)[0], PUSHED_GATHER.prepare(windows[0]))
    assert windows[0].lost() == (1, (1,))
    pushed = windows[1].words[windows[1].layout.rows_at :].clone()
    assert not torch.equal(before, pushed)
    PUSHED_GATHER.rows(tokens(1, 2, 1)[0], PUSHED_GATHER.prepare(windows[0]))
    assert torch.equal(windows[1].words[windows[1].layout.rows_at :], pushed), "it pushes after an abort"


def test_a_rank_that_is_lost_leaves_nan() -> None:
    """Rank 1 pushes nothing: its rows are NaN at rank 0, whose own are there, and nobody pushes any more."""
    layout = WindowLayout(2, 256, num_programs=2)
    given = [[drawn(rank + step, (2, 128))[0] for rank in range(2)] for step in range(2)]
    run = Run(virtual_windows(layout, CPU), given)
    for window in run.windows:
        window.set_limit(20)
    for event in (("push", 0, 0), ("sum", 0, 0)):
        run.do(event)
    assert run.windows[0].lost() == (1, (1,))
    assert run.outs[0, 0][2:].isnan().all()
    assert same(run.outs[0, 0][:2], given[0][0])
    before = run.windows[1].words[layout.inbox_at :].clone()
    run.do(("push", 0, 1))
    assert torch.equal(before, run.windows[1].words[layout.inbox_at :])


@pytest.mark.parametrize("columns", [1, 3, 128])
def test_one_rank_in_one_launch_gives_its_own(columns: int) -> None:
    (window,) = virtual_windows(WindowLayout(1, 256, num_programs=2, row_elements=256), CPU)
    operand, (x,) = PUSHED_GATHER.prepare(window), drawn(1, (1, columns))
    assert same(PUSHED_GATHER.run(x, operand), x)
    out = torch.empty_like(x)
    assert PUSHED_GATHER.run(x, operand, dim=0, out=out) is out
    assert same(out, x)
    (rows, again), counts = PUSHED_GATHER.rows((x, x), operand)
    assert same(rows, x)
    assert same(again, x)
    assert counts == (1,)


def test_no_rows_are_no_exchange() -> None:
    """All ranks have as many, so that none counts."""
    window = virtual_windows(WindowLayout(2, 128), CPU)[0]
    operand, none = PUSHED_GATHER.prepare(window), torch.empty(0, 5)
    (rows,), counts = PUSHED_GATHER.rows((none,), operand)
    assert (rows.shape, counts) == ((0, 5), (0, 0))
    assert PUSHED_GATHER.run(none, operand).shape == (0, 10)
    part = torch.empty(0, 5, dtype=torch.bfloat16)
    assert PUSHED_SCATTER.run(part, PUSHED_SCATTER.prepare(window)).shape == (0, 5)
    assert not window.words[: window.layout.abort_at].any()


FOUR = (torch.zeros(1, 1),) * 4


@pytest.mark.parametrize(
    ("xs", "found"),
    [
        ((torch.zeros(2, 300),), r"rows torch.float32 \[2, 300\] of each rank do not fit a window of 512 elements"),
        ((torch.zeros(128),), "2 dimensions"),
        ((torch.zeros(2, 8, dtype=torch.uint8),), "x_TC must have 2, 4 or 8 bytes an element"),
        ((torch.zeros(2, 8), torch.zeros(3, 8)), r"tensor 1 must have shape \[2, 8\]"),
        (FOUR, "1 to 3 tensors are gathered together, found 4"),
    ],
)
def test_what_does_not_fit_is_refused(xs: Rows, found: str) -> None:
    (window,) = virtual_windows(WindowLayout(1, 384, num_programs=1, row_elements=512), CPU)
    with pytest.raises(ValueError, match=found):
        PUSHED_GATHER.rows(xs, PUSHED_GATHER.prepare(window))


def test_rows_that_lie_otherwise_are_copied() -> None:
    """A slice at no multiple of 16 bytes, and columns of a wider tensor."""
    (window,) = virtual_windows(WindowLayout(1, 384, num_programs=1, row_elements=512), CPU)
    (ids,), (wide,) = drawn(1, (3, 6), dtype=torch.int32), drawn(2, (2, 50))
    (first, second), _ = PUSHED_GATHER.rows((ids[1:], wide[:, :40]), PUSHED_GATHER.prepare(window))
    assert same(first, ids[1:])
    assert same(second, wide[:, :40].contiguous())


def test_an_output_that_does_not_fit_is_refused() -> None:
    operand, x = PUSHED_GATHER.prepare(virtual_windows(WindowLayout(2, 384), CPU)[0]), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"out must have shape \[2, 16\]"):
        PUSHED_GATHER.run(x, operand, out=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="400 elements do not fit a window of 384"):
        PUSHED_GATHER.run(torch.zeros(1, 200), operand)
    with pytest.raises(ValueError, match="x_TC must be contiguous"):
        PUSHED_GATHER.run(torch.zeros(8, 4).T, operand)
    with pytest.raises(ValueError, match="dim must be 0, or -1"):
        PUSHED_GATHER.run(x, operand, dim=2)
