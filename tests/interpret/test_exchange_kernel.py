"""Pushed exchanges by the interpreter: several ranks as tensors of one process, one kernel after the other, in every
order that the protocol allows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
import torch
from support.exchange_orders import Event, orders
from triton.runtime.interpreter import InterpreterBuilder

from ownpath.kernels.exchange import gather as exchange_gather
from ownpath.kernels.exchange import launch as exchange_launch
from ownpath.kernels.exchange import layout as exchange_layout
from ownpath.kernels.exchange.launch import PUSHED_REDUCE, start_exchange, start_tagged
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_reduce
from ownpath.kernels.exchange.window import Window, virtual_windows
from ownpath.ranks.peers import PeerLost
from ownpath.startup import warm_up_exchanges

CPU = torch.device("cpu")


@dataclass
class Run:
    """Virtual ranks that exchange parts of these sizes. outs: by rank and exchange."""

    windows: list[Window]
    parts: list[list[torch.Tensor]]
    others: list[list[torch.Tensor | None]] | None = None
    start: Callable[..., object] = start_exchange
    outs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        what, rank, step = event
        part = self.parts[step][rank]
        other = None if self.others is None else self.others[step][rank]
        out = torch.full_like(part, 7)
        self.start(self.windows[rank], part, other, out, pushes=what == "push", sums=what == "sum")
        if what == "sum":
            self.outs[rank, step] = out

    def check(self) -> None:
        """Checks every output against the twin, bit by bit."""
        for (_, step), out in self.outs.items():
            assert torch.equal(out, all_reduce(self.parts[step]))


def parts_of(size: int, shapes: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    """Random parts whose sum depends on the order: magnitudes from 2^-8 to 2^8."""
    g = torch.Generator().manual_seed(size)

    def one(shape: tuple[int, int]) -> torch.Tensor:
        scale = torch.exp2(torch.randint(-8, 9, shape, generator=g).float())
        return (torch.randn(shape, generator=g) * scale).to(torch.bfloat16)

    return [[one(shape) for _ in range(size)] for shape in shapes]


FORMS = pytest.mark.parametrize("start", [start_exchange, start_tagged])
BOTH = (("push", 0, 0), ("push", 1, 0))


def test_the_orders_are_all() -> None:
    """Two ranks, one exchange: two orders of pushes, two of sums. With a second, a rank may push before the other
    adds."""
    assert len(list(orders(2, 1))) == 4
    assert all(order[:2] in (BOTH, BOTH[::-1]) for order in orders(2, 1))
    assert len(set(orders(2, 2))) == len(list(orders(2, 2))) > 16


@FORMS
@pytest.mark.parametrize(("size", "shapes"), [(2, [(2, 128), (1, 128)]), (3, [(1, 384)])])
def test_every_order_gives_the_same_sums(
    size: int, shapes: list[tuple[int, int]], start: Callable[..., object]
) -> None:
    """Sizes change between exchanges; the epoch wraps. All orders of two ranks by flags; else every fifth."""
    layout, parts = WindowLayout(size, 384, num_programs=1), parts_of(size, shapes)
    for order in islice(orders(size, len(shapes)), 0, None, 1 if size == 2 and start is start_exchange else 5):
        run = Run(virtual_windows(layout, CPU, epoch=-1 if size == 2 else 2**31 - 1), parts, start=start)
        for event in order:
            run.do(event)
        run.check()
        assert all(window.lost() is None for window in run.windows)


@FORMS
def test_programs_share_the_rows(start: Callable[..., object]) -> None:
    """Of three, one has no rows, then two, then none; the epochs of all go on."""
    layout, parts = WindowLayout(2, 384, num_programs=3), parts_of(2, [(2, 128), (1, 128), (3, 128)])
    run = Run(virtual_windows(layout, CPU), parts, start=start)
    for event in next(orders(2, 3)):
        run.do(event)
    run.check()
    assert all(run.windows[0].words[: layout.abort_at] == 3)


@FORMS
def test_eight_ranks_add_in_their_order(start: Callable[..., object]) -> None:
    layout, parts = WindowLayout(8, 128, num_programs=1), parts_of(8, [(1, 128)])
    parts[0][4] = -parts[0][0] * 2**20
    parts[0][0] = -parts[0][4]
    run = Run(virtual_windows(layout, CPU), parts, start=start)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(8)]:
        run.do(event)
    run.check()
    assert not torch.equal(all_reduce(parts[0]), all_reduce(parts[0][::-1])), "the order would not show"


@FORMS
def test_a_part_may_have_two_parts(start: Callable[..., object]) -> None:
    layout, parts, others = WindowLayout(2, 256, num_programs=1), parts_of(2, [(2, 128)]), parts_of(2, [(2, 128)])
    others[0].reverse()
    run = Run(virtual_windows(layout, CPU), parts, others, start=start)
    for event in [(what, rank, 0) for what in ("push", "sum") for rank in range(2)]:
        run.do(event)
    stored = [part + other for part, other in zip(parts[0], others[0], strict=True)]
    assert torch.equal(run.outs[0, 0], all_reduce(stored))
    assert torch.equal(run.outs[1, 0], run.outs[0, 0])


def test_one_rank_in_one_launch_gives_its_own() -> None:
    (window,) = virtual_windows(WindowLayout(1, 256, num_programs=2), CPU)
    part = parts_of(1, [(2, 128)])[0][0]
    out = PUSHED_REDUCE.run(part, PUSHED_REDUCE.prepare(window))
    assert torch.equal(out, part)


@FORMS
def test_a_wait_for_a_lost_rank_ends(start: Callable[..., object]) -> None:
    """Rank 1 pushes nothing: rank 0's and 2's waits end, name it, tell it, and give NaN; nobody pushes any more."""
    layout, parts = WindowLayout(3, 128, num_programs=1), parts_of(3, [(1, 128), (1, 128)])
    run = Run(virtual_windows(layout, CPU), parts, start=start)
    for window in run.windows:
        window.set_limit(20)
    for event in (("push", 0, 0), ("push", 2, 0), ("sum", 0, 0)):
        run.do(event)
    assert run.outs[0, 0].isnan().all()
    assert run.windows[0].lost() == (1, (1,))
    assert [int(window.words[layout.abort_at]) for window in run.windows] == [2, 2, 2]
    before = run.windows[0].words[layout.inbox_at :].clone()
    for event in (("sum", 2, 0), ("push", 0, 1), ("push", 2, 1), ("sum", 2, 1)):
        run.do(event)
    assert run.windows[2].lost() == (2, (1,))
    with pytest.raises(PeerLost, match=r"rank 1 is lost, in layers\.3\.attn\.reduce: its rows of exchange 2"):
        run.windows[2].check("layers.3.attn.reduce")
    run.windows[1].check("layers.3.attn.reduce")
    assert torch.equal(before, run.windows[0].words[layout.inbox_at :])
    assert run.outs[2, 1].isnan().all()


def num_looks(monkeypatch: pytest.MonkeyPatch, pushing: tuple[int, ...], limit: int) -> tuple[int, Window]:
    """Returns how many atomics rank 0's wait takes while only some of three ranks push, and its window."""
    layout, parts = WindowLayout(3, 128, num_programs=1), parts_of(3, [(1, 128)])
    run = Run(virtual_windows(layout, CPU, epoch=2**31 - 1), parts)
    run.windows[0].set_limit(limit)
    for rank in pushing:
        run.do(("push", rank, 0))
    count, original = Counter[str](), InterpreterBuilder.create_atomic_rmw

    def counted(*arguments: Any) -> Any:
        count["rmw"] += 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
        run.do(("sum", 0, 0))
    return count["rmw"], run.windows[0]


def test_who_misses_several_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth: another rank may know which of them is lost. Two atomics a poll, of flags and cell. The epoch wraps,
    so that flags of the old one are larger numbers."""
    one, window = num_looks(monkeypatch, (0, 2), 64)
    assert window.lost() == (-(2**31), (1,))
    several, window = num_looks(monkeypatch, (0,), 64)
    assert window.lost() == (-(2**31), (1, 2))
    assert one > 2 * 64
    assert several - one == 2 * 64 // 16


@FORMS
def test_nothing_is_used_once_a_rank_is_lost(start: Callable[..., object]) -> None:
    """Not even rows that have come: another rank has given up."""
    layout, parts = WindowLayout(2, 128, num_programs=1), parts_of(2, [(1, 128)])
    run = Run(virtual_windows(layout, CPU), parts, start=start)
    for rank in range(2):
        run.do(("push", rank, 0))
    run.windows[0].words[layout.abort_at] = 2
    run.do(("sum", 0, 0))
    assert run.outs[0, 0].isnan().all()
    assert run.windows[0].lost() == (1, (1,))


@pytest.mark.parametrize(
    ("part", "found"),
    [
        (torch.zeros(2, 128), "x_TD must be torch.bfloat16"),
        (torch.zeros(2, 100, dtype=torch.bfloat16), "multiple of 128"),
        (torch.zeros(4, 128, dtype=torch.bfloat16), "do not fit a window of 384"),
        (torch.zeros(128, dtype=torch.bfloat16), "2 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(part: torch.Tensor, found: str) -> None:
    (window,) = virtual_windows(WindowLayout(1, 384, num_programs=1), CPU)
    with pytest.raises(ValueError, match=found):
        PUSHED_REDUCE.run(part, PUSHED_REDUCE.prepare(window))


@pytest.mark.parametrize(("size", "elements", "found"), [(9, 128, "1 to 8 ranks"), (2, 100, "multiple of 128")])
def test_layouts_that_do_not_fit_are_refused(size: int, elements: int, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        WindowLayout(size, elements)


def test_warming_up_reaches_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of elements that a program may have, in the powers of two that kernels know; few by tagged words.
    Each with one part and with two."""
    monkeypatch.setattr(exchange_layout, "TAGGED_ELEMENTS", 512)
    (window,) = virtual_windows(WindowLayout(1, 128 * 9, num_programs=2), CPU)
    launched = list[tuple[str, int]]()

    def noting(name: str) -> Callable[..., None]:
        return lambda window, x, *_, **__: launched.append((name, window.layout.share(x.numel())))

    for name in ("start_tagged", "start_exchange"):
        monkeypatch.setattr(exchange_launch, name, noting(name))
    for name in ("start_gather", "start_tagged_gather"):
        monkeypatch.setattr(exchange_gather, name, lambda *_, **__: None)
    warm_up_exchanges(window)
    tagged, flagged = [("start_tagged", 128), ("start_tagged", 256)], [("start_exchange", 512), ("start_exchange", 640)]
    assert launched == [one for one in (*tagged, *flagged) for _ in range(2)]
    assert window.order.count == 3 * 4
