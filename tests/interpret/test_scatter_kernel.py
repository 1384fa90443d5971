"""Pushed sums of a rank's own rows, by the interpreter: several ranks as tensors of one process, in every order that
the protocol allows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import pytest
import torch
from support.exchange_orders import Event, orders

from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_reduce, reduce_scatter
from ownpath.kernels.exchange.scatter import PUSHED_SCATTER, start_scatter, start_tagged_scatter
from ownpath.kernels.exchange.window import Window, virtual_windows

CPU = torch.device("cpu")


def parts_of(size: int, rows: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """Each rank's part of all rows, whose sum depends on the order."""
    g = torch.Generator().manual_seed(seed)

    def one() -> torch.Tensor:
        shape = size * rows, width
        scale = torch.exp2(torch.randint(-8, 9, shape, generator=g).float())
        return (torch.randn(shape, generator=g) * scale).to(torch.bfloat16)

    return [one() for _ in range(size)]


@dataclass
class Run:
    """parts, others: by exchange and rank. outs: by rank and exchange."""

    windows: list[Window]
    parts: list[list[torch.Tensor]]
    others: list[list[torch.Tensor]] | None = None
    start: Callable[..., object] = start_scatter
    outs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        what, rank, step = event
        part = self.parts[step][rank]
        other = None if self.others is None else self.others[step][rank]
        out = torch.full_like(part[: len(part) // len(self.windows)], 7)
        self.start(self.windows[rank], part, other, out, pushes=what == "push", sums=what == "sum")
        if what == "sum":
            self.outs[rank, step] = out

    def check(self) -> None:
        """Checks every output against the twin, bit by bit."""
        for (rank, step), out in self.outs.items():
            wanted = reduce_scatter(self.parts[step], rank)
            if self.others is not None:
                wanted = (wanted.float() + self.others[step][rank].float()).to(torch.bfloat16)
            assert torch.equal(out, wanted), (rank, step)


FORMS = pytest.mark.parametrize("start", [start_scatter, start_tagged_scatter])


@FORMS
@pytest.mark.parametrize(("size", "shapes", "every"), [(2, [(2, 64), (1, 100)], 9), (3, [(1, 200)], 40)])
def test_every_order_gives_the_same_sums(
    size: int, shapes: list[tuple[int, int]], every: int, start: Callable[..., object]
) -> None:
    """Sizes change between exchanges; the epoch wraps."""
    layout, parts = WindowLayout(size, 384, num_programs=2), [parts_of(size, *shape) for shape in shapes]
    for order in islice(orders(size, len(shapes)), 0, None, every):
        run = Run(virtual_windows(layout, CPU, epoch=-1 if size == 2 else 2**31 - 1), parts, start=start)
        for event in order:
            run.do(event)
        run.check()
        assert all(window.lost() is None for window in run.windows)


@FORMS
def test_eight_ranks_add_in_their_order(start: Callable[..., object]) -> None:
    """Rank 0's part, then 1's; each rank's own in its place among them."""
    layout, parts = WindowLayout(8, 128, num_programs=1), parts_of(8, 1, 128)
    parts[4] = -parts[0] * 2**20
    parts[0] = -parts[4]
    run = Run(virtual_windows(layout, CPU), [parts], start=start)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(8)]:
        run.do(event)
    run.check()
    backwards = all_reduce(parts[::-1])
    assert all(not torch.equal(run.outs[rank, 0], backwards[rank : rank + 1]) for rank in range(8))


@FORMS
def test_something_may_be_added_to_the_sum(start: Callable[..., object]) -> None:
    """To the sum as it would be stored."""
    layout, parts = WindowLayout(2, 256, num_programs=2), parts_of(2, 2, 128)
    others = [parts_of(1, 2, 128, seed)[0] for seed in (3, 4)]
    run = Run(virtual_windows(layout, CPU), [parts], [others], start)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(2)]:
        run.do(event)
    run.check()


def test_nobody_is_given_rows_of_others() -> None:
    """A rank's inbox has what is for it, and NaN, which it was filled with, elsewhere: of itself too."""
    layout, parts = WindowLayout(3, 128, num_programs=1), parts_of(3, 1, 100)
    windows = virtual_windows(layout, CPU)
    run = Run(windows, [parts])
    for rank in range(3):
        run.do(("push", rank, 0))
    inbox = windows[2].words[layout.inbox_at : layout.rows_at].view(torch.bfloat16).view(2, 3, 128)
    for source in (0, 1):
        assert torch.equal(inbox[1, source, :100], parts[source][2])
    assert inbox[1, 2].isnan().all()
    assert inbox[0].isnan().all()
    assert inbox[1, :, 100:].isnan().all()


def test_tagged_words_of_others_are_nobodys() -> None:
    """As in the inbox: a rank's tagged words are those for it, with the epoch; of itself it has none."""
    layout, parts = WindowLayout(3, 128, num_programs=1), parts_of(3, 1, 100)
    windows = virtual_windows(layout, CPU)
    run = Run(windows, [parts], start=start_tagged_scatter)
    for rank in range(3):
        run.do(("push", rank, 0))
    words = windows[2].words[layout.tags_at :].view(2, 3, 64, 2)
    for source in (0, 1):
        assert torch.equal(words[1, source, :50, 0].contiguous().view(torch.bfloat16), parts[source][2])
    assert (words[1, :2, :50, 1] == 1).all()
    assert not words[1, 2, :, 1].any()
    assert not words[1, :, 50:, 1].any()
    assert not words[0, ..., 1].any()


def test_one_rank_in_one_launch_gives_its_own() -> None:
    (window,) = virtual_windows(WindowLayout(1, 256, num_programs=2), CPU)
    (part,) = parts_of(1, 2, 128)
    operand, out = PUSHED_SCATTER.prepare(window), torch.empty_like(part)
    assert torch.equal(PUSHED_SCATTER.run(part, operand), part)
    assert PUSHED_SCATTER.run(part, operand, (2,), other_TD=part, out=out) is out
    assert torch.equal(out, 2 * part)


@FORMS
def test_a_wait_for_a_lost_rank_ends(start: Callable[..., object]) -> None:
    """Rank 1 pushes nothing: rank 0's and 2's sums are NaN and name it."""
    layout, parts = WindowLayout(3, 128, num_programs=1), parts_of(3, 1, 128)
    run = Run(virtual_windows(layout, CPU), [parts], start=start)
    for window in run.windows:
        window.set_limit(20)
    for event in (("push", 0, 0), ("push", 2, 0), ("sum", 0, 0), ("sum", 2, 0)):
        run.do(event)
    for rank in (0, 2):
        assert run.outs[rank, 0].isnan().all()
        assert run.windows[rank].lost() == (1, (1,))


@pytest.mark.parametrize(
    ("part", "counts", "found"),
    [
        (torch.zeros(2, 128), None, "y_BD must be torch.bfloat16"),
        (torch.zeros(3, 128, dtype=torch.bfloat16), None, "as many rows for each of 2 ranks, found 3"),
        (torch.zeros(8, 128, dtype=torch.bfloat16), None, "512 elements do not fit a window of 384"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), (3, 1), r"every rank must have as many rows, found counts \[3, 1\]"),
        (torch.zeros(128, dtype=torch.bfloat16), None, "2 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(part: torch.Tensor, counts: tuple[int, ...] | None, found: str) -> None:
    operand = PUSHED_SCATTER.prepare(virtual_windows(WindowLayout(2, 384), CPU)[0])
    with pytest.raises(ValueError, match=found):
        PUSHED_SCATTER.run(part, operand, counts)


def test_what_is_added_must_have_the_rows() -> None:
    operand, part = PUSHED_SCATTER.prepare(virtual_windows(WindowLayout(2, 384), CPU)[0]), parts_of(2, 1, 128)[0]
    for name, given in (("other_TD", {"other_TD": part}), ("out", {"out": part})):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[1, 128\]"):
            PUSHED_SCATTER.run(part, operand, **given)
