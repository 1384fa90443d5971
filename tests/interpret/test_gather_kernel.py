"""Pushed rows and columns by the interpreter: several ranks as tensors of one process, in every order that the protocol
allows. Bits are random, so that NaNs of every kind are among them."""

from dataclasses import dataclass, field
from itertools import islice

import pytest
import torch
from support.exchange_orders import Event, orders

from ownpath.kernels.exchange.gather import PUSHED_GATHER, check_gathered, start_gather
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_gather
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
    given: list[list[Rows]]
    by_columns: bool = False
    outs: dict[tuple[int, int], Rows] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        what, rank, step = event
        xs, size = self.given[step][rank], len(self.windows)
        if (rank, step) not in self.outs:
            shapes = [(len(x), size * x.shape[1]) if self.by_columns else (size * len(x), x.shape[1]) for x in xs]
            self.outs[rank, step] = tuple(x.new_empty(shape) for x, shape in zip(xs, shapes, strict=True))
            for out in self.outs[rank, step]:
                out.view(torch.int16).fill_(7)
        outs = self.outs[rank, step]
        start_gather(self.windows[rank], xs, outs, self.by_columns, pushes=what == "push", takes=what == "sum")

    def check(self) -> None:
        for (rank, step), outs in self.outs.items():
            for idx, out in enumerate(outs):
                wanted = all_gather([xs[idx] for xs in self.given[step]], -1 if self.by_columns else 0)
                assert same(out, wanted), (rank, step, idx)


@pytest.mark.parametrize(
    ("size", "shapes", "by_columns", "every"), [(2, [(2, 64), (1, 130)], True, 3), (3, [(2, 20)], False, 8)]
)
def test_every_order_gathers_the_same(size: int, shapes: list[tuple[int, int]], by_columns: bool, every: int) -> None:
    """Sizes change between exchanges; the epoch wraps. Of the orders, which tests of sums go through, every so many."""
    layout = WindowLayout(size, 384, num_programs=1)
    given = [[drawn(10 * step + rank, shape) for rank in range(size)] for step, shape in enumerate(shapes)]
    for order in islice(orders(size, len(shapes)), 0, None, every):
        run = Run(virtual_windows(layout, CPU, epoch=-1 if size == 2 else 2**31 - 1), given, by_columns)
        for event in order:
            run.do(event)
        run.check()
        assert all(window.lost() is None for window in run.windows)


@pytest.mark.parametrize(
    ("size", "rows", "dtype", "by_columns"),
    [
        (8, 3, torch.bfloat16, False),
        (3, 3, torch.float32, True),
        (2, 3, torch.int32, False),
        (2, 2, torch.int64, True),
    ],
)
def test_bits_of_any_dtype_stay(size: int, rows: int, dtype: torch.dtype, by_columns: bool) -> None:
    """Over three programs, the last of which has no share, or a part of one."""
    layout, given = WindowLayout(size, 384, num_programs=3), [[drawn(r, (rows, 37), dtype=dtype) for r in range(size)]]
    run = Run(virtual_windows(layout, CPU), given, by_columns)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(size)]:
        run.do(event)
    run.check()


def test_a_token_travels_with_experts_and_weights() -> None:
    """Three tensors under one epoch, twice, with another number of rows."""
    layout, given = WindowLayout(3, 3 * 384, num_programs=2), []
    for step, count in enumerate((5, 1)):
        x = [drawn(10 * step + rank, (count, 72))[0] for rank in range(3)]
        ids = [drawn(10 * step + rank + 3, (count, 6), dtype=torch.int64)[0] for rank in range(3)]
        weights = [drawn(10 * step + rank + 6, (count, 6), dtype=torch.float32)[0] for rank in range(3)]
        given.append(list(zip(x, ids, weights, strict=True)))
    run = Run(virtual_windows(layout, CPU), given)
    for event in next(orders(3, 2)):
        run.do(event)
    run.check()
    assert all(run.windows[0].words[: layout.abort_at] == 2)


def test_a_rank_that_is_lost_leaves_nan() -> None:
    """Rank 1 pushes nothing: its rows are NaN at rank 0, whose own are there, and nobody pushes any more."""
    layout = WindowLayout(2, 256, num_programs=2)
    given = [[drawn(rank + step, (2, 128)) for rank in range(2)] for step in range(2)]
    run = Run(virtual_windows(layout, CPU), given)
    for window in run.windows:
        window.set_limit(20)
    for event in (("push", 0, 0), ("sum", 0, 0)):
        run.do(event)
    assert run.windows[0].lost() == (1, (1,))
    assert run.outs[0, 0][0][2:].isnan().all()
    assert same(run.outs[0, 0][0][:2], given[0][0][0])
    before = run.windows[1].words[layout.inbox_at :].clone()
    run.do(("push", 0, 1))
    assert torch.equal(before, run.windows[1].words[layout.inbox_at :])


@pytest.mark.parametrize("columns", [1, 3, 128])
def test_one_rank_in_one_launch_gives_its_own(columns: int) -> None:
    (window,) = virtual_windows(WindowLayout(1, 256, num_programs=2), CPU)
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
    (rows,), counts = PUSHED_GATHER.rows((torch.empty(0, 5),), PUSHED_GATHER.prepare(window))
    assert (rows.shape, counts) == ((0, 5), (0, 0))
    assert not window.words[: window.layout.abort_at].any()


FOUR = (torch.zeros(1, 1),) * 4


@pytest.mark.parametrize(
    ("xs", "found"),
    [
        ((torch.zeros(2, 300),), "do not fit a window of 384"),
        ((torch.zeros(128),), "2 dimensions"),
        ((torch.zeros(2, 8, dtype=torch.uint8),), "x_TC must have 2, 4 or 8 bytes an element"),
        ((torch.zeros(8, 4).T,), "x_TC must be contiguous"),
        ((torch.zeros(2, 8), torch.zeros(3, 8)), r"tensor 1 must have shape \[2, 8\]"),
        (FOUR, "1 to 3 tensors are gathered together, found 4"),
    ],
)
def test_what_does_not_fit_is_refused(xs: Rows, found: str) -> None:
    (window,) = virtual_windows(WindowLayout(1, 384, num_programs=1), CPU)
    with pytest.raises(ValueError, match=found):
        check_gathered(xs, window)


def test_an_output_that_does_not_fit_is_refused() -> None:
    operand, x = PUSHED_GATHER.prepare(virtual_windows(WindowLayout(2, 384), CPU)[0]), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"out must have shape \[2, 16\]"):
        PUSHED_GATHER.run(x, operand, out=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="dim must be 0, or -1"):
        PUSHED_GATHER.run(x, operand, dim=2)
