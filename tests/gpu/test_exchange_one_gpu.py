"""Exchanges of virtual ranks on one GPU: one phase after the other on one stream, and at once, a stream for each
rank."""

import random
import time

import pytest
import torch

from ownpath.kernels.exchange.gather import rows_in_place, start_gather, start_rows
from ownpath.kernels.exchange.launch import PUSHED_REDUCE, start_exchange
from ownpath.kernels.exchange.layout import NUM_PROGRAMS, WindowLayout
from ownpath.kernels.exchange.ref import all_gather, all_reduce, reduce_scatter
from ownpath.kernels.exchange.scatter import start_scatter
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
    return WindowLayout(size, 512 * WIDTH, NUM_PROGRAMS // size)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_phase_after_phase(size: int, device: torch.device) -> None:
    """Sizes that change; the epoch wraps. Every rank has the twin's bits."""
    windows = virtual_windows(layout_of(size), device, epoch=2**31 - 3)
    for step, num_tokens in enumerate((1, 64, 3, 512, 8, 1)):
        parts = parts_of(size, num_tokens, device, step)
        outs = [torch.full_like(part, 7) for part in parts]
        for window, part, out in zip(windows, parts, outs, strict=True):
            start_exchange(window, part, None, out, pushes=True, sums=False)
        for window, part, out in zip(windows, parts, outs, strict=True):
            start_exchange(window, part, None, out, pushes=False, sums=True)
        expected = all_reduce(parts)
        assert all(torch.equal(out, expected) for out in outs), num_tokens
    assert all(window.lost() is None for window in windows)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_rows_phase_after_phase(size: int, device: torch.device) -> None:
    """Rows with ids and weights, sums of own rows, then columns of float32, in one window whose epoch wraps."""
    layout = WindowLayout(size, 512 * WIDTH, row_elements=512 * WIDTH + 512 * 24 + 384)
    windows = virtual_windows(layout, device, epoch=2**31 - 3)
    for step, num_tokens in enumerate((1, 64, 3, 512)):
        x = parts_of(size, num_tokens, device, step)
        ids = [part[:, :6].float().int().contiguous() for part in x]
        weights = [part[:, :6].float() for part in x]
        given = list(zip(x, ids, weights, strict=True))
        for pushes in (True, False):
            for window, one in zip(windows, given, strict=True):
                start_rows(window, one, pushes, not pushes)
        for window in windows:
            for found, wanted in zip(rows_in_place(window, given[0]), (x, ids, weights), strict=True):
                assert torch.equal(found, all_gather(wanted)), num_tokens
        sums = [torch.cat([part + rank for rank in range(size)]) for part in x]
        outs = [torch.full_like(part, 7) for part in x]
        for pushes in (True, False):
            for window, part, out in zip(windows, sums, outs, strict=True):
                start_scatter(window, part, part[:num_tokens], out, pushes, not pushes)
        for rank, out in enumerate(outs):
            wanted = (reduce_scatter(sums, rank).float() + sums[rank][:num_tokens].float()).to(torch.bfloat16)
            assert torch.equal(out, wanted), num_tokens
        wide = [part[: max(1, num_tokens // 2)].float() / 3 for part in x]
        beside = [part.new_full((len(part), size * WIDTH), 7) for part in wide]
        for pushes in (True, False):
            for window, part, out in zip(windows, wide, beside, strict=True):
                start_gather(window, part, out, True, pushes, not pushes)
        assert all(torch.equal(out, all_gather(wide, -1)) for out in beside), num_tokens
    assert all(window.lost() is None for window in windows)


@pytest.mark.parametrize("size", [2, 4])
def test_at_once(size: int, device: torch.device) -> None:
    """10,000 replays of graphs of three sizes, each rank on its stream with delays of its own: no wrong element."""
    windows = virtual_windows(layout_of(size), device)
    streams = [torch.cuda.Stream(device) for _ in windows]
    operands = [PUSHED_REDUCE.prepare(window) for window in windows]
    graphs, wrong = [], torch.zeros(size, dtype=torch.int64, device=device)
    for num_tokens in (1, 8, 64):
        parts = parts_of(size, num_tokens, device, num_tokens)
        expected, outs = all_reduce(parts), [torch.empty_like(part) for part in parts]
        torch.cuda.synchronize()
        for stream, operand, part, out in zip(streams, operands, parts, outs, strict=True):
            with torch.cuda.stream(stream):  # compiles; another rank's waits for it
                PUSHED_REDUCE.run(part, operand, out=out)
        torch.cuda.synchronize()
        for rank, out in enumerate(outs):  # also loads what the graphs hold
            wrong[rank] += (out != expected).sum()
        of_size = []
        for rank, (stream, operand, part, out) in enumerate(zip(streams, operands, parts, outs, strict=True)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out.fill_(7)
                PUSHED_REDUCE.run(part, operand, out=out)
                wrong[rank] += (out != expected).sum()
            of_size.append(graph)
        graphs.append(of_size)
    chosen = random.Random(size)
    for _ in range(10_000):
        for graph, stream in zip(chosen.choice(graphs), streams, strict=True):
            with torch.cuda.stream(stream):
                if chosen.random() < 0.05:
                    torch.cuda._sleep(chosen.randrange(MAX_DELAY_CYCLES))
                graph.replay()
    torch.cuda.synchronize()
    assert all(window.lost() is None for window in windows)
    assert not wrong.any(), wrong


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


def test_a_wait_ends(device: torch.device) -> None:
    """After its limit, with the rank's name and a device that goes on; every later wait ends at once."""
    windows, part = virtual_windows(layout_of(2), device), parts_of(2, 64, device)[0]
    start_exchange(windows[0], part, None, part.clone(), pushes=True, sums=False)  # compiles
    lost_after(windows, part, 1000)  # compiles
    assert windows[0].lost() == (2, (1,))
    windows = virtual_windows(layout_of(2), device)
    assert 0.3 < lost_after(windows, part, 300_000) < 0.6
    assert windows[0].lost() == (1, (1,))
    assert lost_after(windows, part, 300_000) < 0.1
    assert [int(window.words[window.layout.abort_at]) for window in windows] == [2, 2]
    assert torch.ones(4, device=device).sum() == 4
