"""``MegaMoE`` by pushed kernels: virtual ranks that take turns with the interpreter; and two processes that map each
other's windows, as GPUs do."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.mapped_windows import FORMS, HIDDEN, LIMIT, NUM_EXPERTS, TOP_K, compare_form, run_rank, stacks_of

from ownpath import MegaMoE
from ownpath.conformance.bounds import assert_allowed
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens, exact_mixture
from ownpath.kernels.exchange import gather, launch, layout, scatter
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import virtual_windows
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.runners.window import WindowedPeers, expert_layout

TESTS = Path(__file__).parents[1]
STARTS = [
    *((launch, "start_exchange"), (launch, "start_tagged"), (gather, "start_rows"), (gather, "start_tagged_rows")),
    *((scatter, "start_scatter"), (scatter, "start_tagged_scatter")),
]


def take_turns(size: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Splits each launch in two, behind each of which ranks meet. Returns a list that gets the launches' names."""
    one_at_a_time, barrier, names = threading.Lock(), threading.Barrier(size), list[str]()

    def split(name: str, inner: Callable[..., object]) -> Callable[..., None]:
        def halves(*args: object, pushes: bool, **takes: bool) -> None:
            (reads,) = takes
            for half in (True, False):
                with one_at_a_time:
                    inner(*args, pushes=half, **{reads: not half})
                barrier.wait(60)
            names.append(name)

        return halves

    for module, name in STARTS:
        monkeypatch.setattr(module, name, split(name, getattr(module, name)))
    return names


@pytest.mark.parametrize(
    ("size", "most_tagged", "used"),
    [
        (2, 1 << 18, {"start_tagged", "start_tagged_rows", "start_tagged_scatter"}),
        (2, 0, {"start_exchange", "start_rows", "start_scatter"}),
        (4, 1 << 18, {"start_tagged_rows", "start_tagged_scatter"}),
    ],
    ids=["tags", "flags", "four"],
)
def test_experts_over_virtual_ranks(
    size: int, most_tagged: int, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of exchanges through the host, with 2 rows, then 1; by ids and data, what the experts allow."""
    monkeypatch.setattr(layout, "TAGGED_ELEMENTS", most_tagged)
    names = take_turns(size, monkeypatch)
    wide = expert_layout(size, HIDDEN, 2 if size > 2 else 2 * size, TOP_K)
    windows = virtual_windows(
        WindowLayout(size, wide.max_elements, 1, wide.row_elements), torch.device("cpu"), epoch=2**31 - 3
    )
    routed, shared = stacks_of()
    tokens = [RoutedTokens.draw(size * count, HIDDEN, NUM_EXPERTS, TOP_K, torch.device("cpu")) for count in (2, 1)]
    tokens[0].ids[0, 0] = -1

    def work(peers: VirtualPeers) -> torch.Tensor:
        windowed = WindowedPeers(peers, windows[peers.rank])
        for form in FORMS if size == 2 else FORMS[:1]:
            for drawn in tokens:
                compare_form(windowed, routed, shared, drawn, form)
        whole = MegaMoE.cut(routed, LIMIT, windowed)
        mine = slice(peers.rank, peers.rank + 1)
        return whole(tokens[1].x[mine].bfloat16(), tokens[1].ids[mine], tokens[1].weights[mine])

    found = torch.cat(run_virtual(size, work))
    given = RoutedTokens(tokens[1].x.bfloat16(), tokens[1].ids, tokens[1].weights)
    assert_allowed(found, exact_mixture(ExpertStacks(*routed), given, LIMIT))
    assert set(names) == used


@pytest.mark.slow
def test_experts_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four forms, with 3 rows, then 1: the bits of exchanges through the host. The epoch wraps."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "support.mapped_windows", "1", "2", str(tmp_path)]
    second = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    try:
        run_rank(0, 2, tmp_path)
        assert second.wait(60) == 0, second.stderr and second.stderr.read()
    finally:
        second.kill()
        second.communicate()
