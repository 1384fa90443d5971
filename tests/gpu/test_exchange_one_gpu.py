"""Exchanges of virtual ranks on one GPU: one phase after the other on one stream, and at once, a stream for each
rank."""

import random
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from ownpath.kernels.exchange.gather import (
    PUSHED_GATHER,
    rows_in_place,
    start_gather,
    start_rows,
    start_tagged_gather,
    start_tagged_rows,
)
from ownpath.kernels.exchange.launch import PUSHED_REDUCE, start_exchange, start_tagged
from ownpath.kernels.exchange.layout import NUM_PROGRAMS, WindowLayout
from ownpath.kernels.exchange.ref import all_gather, all_reduce, reduce_scatter
from ownpath.kernels.exchange.scatter import PUSHED_SCATTER, start_scatter, start_tagged_scatter
from ownpath.kernels.exchange.window import Window, virtual_windows

WIDTH = 4096
MAX_DELAY_CYCLES = 200_000

pytestmark = pytest.mark.sm90


def parts_of(size: int, num_tokens: int, device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """Random parts whose sum depends on the order."""
    g = torch.Generator().manual_seed(seed)
    shape = num_tokens, WIDTH
    parts = [torch.randn(shape, generator=g) * 4.0**rank for rank in range(size)]
    return [part.to(device, torch.bfloat16) for part in parts]


def layout_of(size: int) -> WindowLayout:
    """Fewer programs a rank than on a GPU of its own: all ranks' must fit it at once, as they wait for each other."""
    return WindowLayout(size, 512 * WIDTH, NUM_PROGRAMS // size, row_elements=512 * WIDTH + 512 * 24 + 384)


FORMS = pytest.mark.parametrize("is_tagged", [False, True], ids=["flags", "tags"])


@FORMS
@pytest.mark.parametrize("size", [2, 3, 8])
def test_phase_after_phase(size: int, is_tagged: bool, device: torch.device) -> None:
    """Sizes that change; the epoch wraps. Every rank has the twin's bits."""
    start = start_tagged if is_tagged else start_exchange
    windows = virtual_windows(layout_of(size), device, epoch=2**31 - 3)
    for step, num_tokens in enumerate((1, 64, 3, 8, 1) if is_tagged else (1, 64, 3, 512, 8, 1)):
        parts = parts_of(size, num_tokens, device, step)
        outs = [torch.full_like(part, 7) for part in parts]
        for window, part, out in zip(windows, parts, outs, strict=True):
            start(window, part, None, out, pushes=True, sums=False)
        for window, part, out in zip(windows, parts, outs, strict=True):
            start(window, part, None, out, pushes=False, sums=True)
        expected = all_reduce(parts)
        assert all(torch.equal(out, expected) for out in outs), num_tokens
    assert all(window.lost() is None for window in windows)


@FORMS
@pytest.mark.parametrize("size", [2, 3, 8])
def test_rows_phase_after_phase(size: int, is_tagged: bool, device: torch.device) -> None:
    """Rows with ids and weights, sums of own rows, then columns of float32, in one window whose epoch wraps."""
    rows_start, sums_start, columns_start = (
        (start_tagged_rows, start_tagged_scatter, start_tagged_gather)
        if is_tagged
        else (start_rows, start_scatter, start_gather)
    )
    windows = virtual_windows(layout_of(size), device, epoch=2**31 - 3)
    for step, num_tokens in enumerate((1, 60, 3, 32) if is_tagged else (1, 64, 3, 512)):
        x = parts_of(size, num_tokens, device, step)
        ids = [part[:, :6].float().int().contiguous() for part in x]
        weights = [part[:, :6].float() for part in x]
        given = list(zip(x, ids, weights, strict=True))
        for pushes in (True, False):
            for window, one in zip(windows, given, strict=True):
                rows_start(window, one, pushes, not pushes)
        for window in windows:
            for found, given_by_all in zip(rows_in_place(window, given[0]), (x, ids, weights), strict=True):
                assert torch.equal(found, all_gather(given_by_all)), num_tokens
        sums = [torch.cat([part + rank for rank in range(size)]) for part in x]
        outs = [torch.full_like(part, 7) for part in x]
        for pushes in (True, False):
            for window, part, out in zip(windows, sums, outs, strict=True):
                sums_start(window, part, part[:num_tokens], out, pushes, not pushes)
        for rank, out in enumerate(outs):
            wanted = (reduce_scatter(sums, rank).float() + sums[rank][:num_tokens].float()).to(torch.bfloat16)
            assert torch.equal(out, wanted), num_tokens
        wide = [part[: max(1, num_tokens // 2)].float() / 3 for part in x]
        beside = [part.new_full((len(part), size * WIDTH), 7) for part in wide]
        for pushes in (True, False):
            for window, part, out in zip(windows, wide, beside, strict=True):
                columns_start(window, part, out, True, pushes, not pushes)
        assert all(torch.equal(out, all_gather(wide, -1)) for out in beside), num_tokens
    assert all(window.lost() is None for window in windows)


Exchanges = Callable[[list[Window]], list[list[Callable[[], torch.Tensor]]]]
"""Makes exchanges over windows: a list of each, with a call for each rank."""


class AtOnce:
    """Virtual ranks, each with a stream and graphs, which are replayed with delays. wrong: words, by rank."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.windows, self.spare = (virtual_windows(layout_of(size), device) for _ in range(2))
        self.streams = [torch.cuda.Stream(device) for _ in self.windows]
        self.wrong = torch.zeros(size, dtype=torch.int64, device=device)
        self.graphs = list[list[torch.cuda.CUDAGraph]]()
        self._kept = list[object]()  # graphs read and write it
        for window in self.spare:
            window.set_limit(1000)
        for stream in self.streams:
            # Memory for what calls make: to ask for more would wait for the device, where another rank's kernel waits.
            with torch.cuda.stream(stream):
                rooms = [torch.empty(count, dtype=torch.uint8, device=device) for count in (1 << 28, *[1 << 19] * 64)]
            del rooms

    def run(self, rank: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Calls on a rank's stream."""
        with torch.cuda.stream(self.streams[rank]):
            return call()

    def capture(self, make: Exchanges, wanted: list[list[torch.Tensor]]) -> None:
        """Makes a graph for each rank of exchanges, and what counts wrong words of their results.

        All calls are made over spare windows first, where no wait is long. That compiles and loads what a graph holds:
        a module that is loaded while a kernel waits for a rank that the host has yet to launch would wait as well.
        wanted: by exchange and rank.
        """
        for windows in (self.spare, self.windows):
            self.wrong.zero_()
            exchanges = make(windows)
            for calls, right in zip(exchanges, wanted, strict=True):
                torch.cuda.synchronize()
                found = [self.run(rank, call) for rank, call in enumerate(calls)]
                torch.cuda.synchronize()
                for rank, one in enumerate(found):
                    self._count(rank, one, right[rank])
            torch.cuda.synchronize()
        assert all(window.lost() is None for window in self.windows)
        assert not self.wrong.any(), self.wrong
        of_size = []
        for rank, stream in enumerate(self.streams):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for calls, right in zip(exchanges, wanted, strict=True):
                    self._count(rank, calls[rank](), right[rank])
            of_size.append(graph)
        self.graphs.append(of_size)
        self._kept.append((exchanges, wanted))

    def _count(self, rank: int, found: torch.Tensor, right: torch.Tensor) -> None:
        self.wrong[rank] += (found.view(torch.int16) != right.view(torch.int16)).sum()

    def replay(self, count: int) -> None:
        """Replays graphs in a random order, the same on all ranks."""
        torch.cuda._sleep(1)  # loads it
        torch.cuda.synchronize()
        chosen = random.Random(len(self.windows))
        for _ in range(count):
            for graph, stream in zip(chosen.choice(self.graphs), self.streams, strict=True):
                with torch.cuda.stream(stream):
                    if chosen.random() < 0.05:
                        torch.cuda._sleep(chosen.randrange(MAX_DELAY_CYCLES))
                    graph.replay()
        torch.cuda.synchronize()
        assert all(window.lost() is None for window in self.windows)
        assert not self.wrong.any(), self.wrong


def sums_of_all(
    parts: list[torch.Tensor], outs: list[torch.Tensor], windows: list[Window]
) -> list[list[Callable[[], torch.Tensor]]]:
    """Makes a sum of all ranks' parts."""
    operands = [PUSHED_REDUCE.prepare(window) for window in windows]

    def of_rank(rank: int) -> torch.Tensor:
        outs[rank].fill_(7)
        return PUSHED_REDUCE.run(parts[rank], operands[rank], out=outs[rank])

    return [[partial(of_rank, rank) for rank in range(len(windows))]]


@pytest.mark.parametrize("size", [2, 4])
def test_at_once(size: int, device: torch.device) -> None:
    """10,000 replays of graphs of sums, by tags and by flags: no wrong word."""
    ranks = AtOnce(size, device)
    for num_tokens in (1, 8, 64, 100):
        parts = parts_of(size, num_tokens, device, num_tokens)
        outs = [torch.empty_like(part) for part in parts]
        ranks.capture(partial(sums_of_all, parts, outs), [[all_reduce(parts)] * size])
    ranks.replay(10_000)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_at_once(size: int, device: torch.device) -> None:
    """3,000 replays of graphs of rows there, sums back, and columns, by tags and by flags: no wrong word."""
    ranks = AtOnce(size, device)
    for num_tokens in (1, 8, 64, 200):
        parts = parts_of(size, num_tokens, device, num_tokens)
        sums = [torch.cat([part + rank for rank in range(size)]) for part in parts]
        rows = all_gather(parts)
        wanted = [
            [torch.cat([rows, rows[:, :6].float().to(rows.dtype), rows[:, :12]], dim=1)] * size,
            [reduce_scatter(sums, rank) for rank in range(size)],
            [all_gather(parts, -1)] * size,
        ]
        ranks.capture(partial(rows_sums_and_columns, parts, sums), wanted)
    ranks.replay(3_000)


def rows_sums_and_columns(
    parts: list[torch.Tensor], sums: list[torch.Tensor], windows: list[Window]
) -> list[list[Callable[[], torch.Tensor]]]:
    """Makes a gather of rows with ids and weights, a scatter of sums, and a gather of columns."""
    gathers = [PUSHED_GATHER.prepare(window) for window in windows]
    scatters = [PUSHED_SCATTER.prepare(window) for window in windows]

    def rows_of(rank: int) -> torch.Tensor:
        x = parts[rank]
        (x, ids, weights), _ = PUSHED_GATHER.rows((x, x[:, :6].float(), x[:, :12].contiguous()), gathers[rank])
        return torch.cat([x, ids.to(x.dtype), weights], dim=1)

    def sums_of(rank: int) -> torch.Tensor:
        return PUSHED_SCATTER.run(sums[rank], scatters[rank])

    def columns_of(rank: int) -> torch.Tensor:
        return PUSHED_GATHER.run(parts[rank], gathers[rank])

    return [[partial(one, rank) for rank in range(len(windows))] for one in (rows_of, sums_of, columns_of)]


def lost_after(windows: list[Window], part: torch.Tensor, limit_us: int) -> float:
    """Returns the seconds that rank 0's exchange takes while the last rank pushes nothing."""
    for window in windows:
        window.set_limit(limit_us)
    operand = PUSHED_REDUCE.prepare(windows[0])
    torch.cuda.synchronize()
    start = time.monotonic()
    out = PUSHED_REDUCE.run(part, operand)
    torch.cuda.synchronize()
    assert out.isnan().all()
    return time.monotonic() - start


@pytest.mark.parametrize("num_tokens", [64, 100], ids=["tags", "flags"])
def test_a_wait_ends(num_tokens: int, device: torch.device) -> None:
    """After its limit, with the rank's name and a device that goes on; every later wait ends at once."""
    windows, part = virtual_windows(layout_of(2), device), parts_of(2, num_tokens, device)[0]
    start_exchange(windows[0], part, None, part.clone(), pushes=True, sums=False)  # compiles
    lost_after(windows, part, 1000)  # compiles
    assert windows[0].lost() == (2, (1,))
    windows = virtual_windows(layout_of(2), device)
    assert 0.3 < lost_after(windows, part, 300_000) < 0.6
    assert windows[0].lost() == (1, (1,))
    assert lost_after(windows, part, 300_000) < 0.1
    assert [int(window.words[window.layout.abort_at]) for window in windows] == [2, 2]
    assert torch.ones(4, device=device).sum() == 4
