"""Measures calls that several ranks make together: each rank a process with its own device, the slowest one counts.

Ranks meet three times for a contender: when its first call is checked, when a round is captured, and when it is timed.
Whoever fails says so there, so that all of them give the contender up together and go on with the next.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ownpath.bench.check import poison
from ownpath.bench.measure import describe
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.timing import CudaGraph, WallClock
from ownpath.ranks.group import Group, join, leave
from ownpath.ranks.launch import launched
from ownpath.ranks.start import RankFailed, swap_text
from ownpath.ranks.started import is_rank
from ownpath.runners.window import WindowedPeers, open_window

LIMIT_US, GROUP_LIMIT = 20_000_000, timedelta(seconds=60)
MAX_RANKS = 8
LINK_GBPS = 365.0
"""One H200's reads of another's memory, from 64 MiB on (measured)."""


@dataclass(frozen=True)
class TogetherRound:
    """Calls that are timed together, and what judges the first one's result: its error, NaN if it is wrong."""

    calls: Sequence[Callable[[], torch.Tensor]]
    judge: Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class TogetherContender:
    """A contender of several ranks. make: its round, which is made on all ranks. most: its largest error."""

    name: str
    make: Callable[[], TogetherRound]
    is_peer: bool = True
    most: float = 0.0


@dataclass(frozen=True)
class Together:
    """The ranks of a bench, seen from one of them. group: torch's, NCCL between GPUs and gloo elsewhere.

    peers: with windows on GPUs.
    """

    peers: Group | WindowedPeers
    device: torch.device
    group: dist.ProcessGroup
    timer: CudaGraph | WallClock

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def size(self) -> int:
        return self.peers.size

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    def row(self, case: Case, contender: TogetherContender) -> Row:
        """Checks a contender's first call on every rank, then times its round. A failure becomes a row too."""
        row = Row(case, contender.name, contender.is_peer, "ok")
        try:
            error, calls = self._first_call(contender)
            timing = self._time(calls)
        except Exception as failure:  # a contender's failure is a result, shown in the table
            return replace(row, status="failed", reason=describe(failure))
        finally:
            self._free()
        if not error <= contender.most:  # NaN too
            why = f"error {error:.1e}, more than {contender.most}"
            return replace(row, status="wrong", reason=why, timing=timing, rel_l2=error)
        return replace(row, timing=timing, rel_l2=error)

    def _first_call(self, contender: TogetherContender) -> tuple[float, Sequence[Callable[[], torch.Tensor]]]:
        """Returns the largest error of all ranks, and the calls."""
        failure: Exception | None = None
        error, calls = float("nan"), list[Callable[[], torch.Tensor]]()
        try:
            found = contender.make()
            calls = [*found.calls]
            poison(tuple(calls[0]().shape), self.device)
            error = found.judge(calls[0]())
            self.check()
        except Exception as caught:
            failure = caught
        errors = [float(told) for told in self._tell(str(error), failure)]
        return (float("nan") if any(one != one for one in errors) else max(errors)), calls

    def _time(self, calls: Sequence[Callable[[], torch.Tensor]]) -> Timing:
        """Returns the time of the rank whose median is the largest."""
        told, timing, failure = list[str](), None, None

        def agreed(round_us: float) -> float:
            told.extend(self._tell(str(round_us)))
            return max(map(float, told))

        try:
            timing = replace(self.timer, agreed=agreed).time(calls)
            self.check()
        except RankFailed:
            raise
        except Exception as caught:
            failure = caught
        if failure is not None and not told:
            self._tell("", failure)
        mine = "" if timing is None else f"{timing.us} {timing.us_p10} {timing.us_p90}"
        of_ranks = [tuple(map(float, one.split())) for one in self._tell(mine, failure)]
        assert timing is not None
        us, us_p10, us_p90 = max(of_ranks)
        return replace(timing, us=us, us_p10=us_p10, us_p90=us_p90)

    def _tell(self, text: str, failure: Exception | None = None) -> list[str]:
        """Gives the others a text, or why there is none, and returns all ranks'.

        Errors: this rank's own failure; RankFailed with the first other's.
        """
        told = "+" + text if failure is None else f"-{type(failure).__name__}: {failure}"
        found = swap_text(self.peers, "bench", told)
        if failure is not None:
            raise failure
        for rank, other in enumerate(found):
            if other.startswith("-"):
                raise RankFailed(f"rank {rank}: {other[1:]}")
        return [other[1:] for other in found]

    def check(self) -> None:
        """Waits for the device. Errors: PeerLost where a wait for a rank was given up."""
        if self.on_gpus:
            torch.cuda.synchronize(self.device)
        if isinstance(self.peers, WindowedPeers):
            self.peers.window.check("bench")

    def _free(self) -> None:
        if self.on_gpus:
            torch.cuda.empty_cache()


@contextmanager
def together(asked: BenchRequest, hidden_size: int, max_tokens: int, top_k: int) -> Iterator[Together]:
    """Yields this process among the ranks: those that torchrun has started, or that it starts itself.

    hidden_size, max_tokens, top_k: the largest that are measured. Errors: ValueError for too few GPUs.
    """
    device = torch.device(asked.settings.device)
    with _group(asked, device) as peers:
        if device.type == "cuda":
            device = torch.device("cuda", peers.rank)
            torch.cuda.set_device(device)
            group = dist.new_group(backend="nccl", timeout=GROUP_LIMIT)
            yield Together(_windowed(peers, hidden_size, max_tokens, top_k), device, group, _timer(asked))
        else:
            world = dist.group.WORLD
            assert world is not None
            yield Together(peers, device, world, _timer(asked))


def _timer(asked: BenchRequest) -> CudaGraph | WallClock:
    """Returns the timer that was asked for. It warms up as long as it measures, where that is shorter than usual: what
    waits for links draws little power."""
    timer = asked.settings.timer
    assert isinstance(timer, CudaGraph | WallClock)
    if isinstance(timer, CudaGraph):
        return replace(timer, warm_up_s=min(timer.warm_up_s, timer.budget_s))
    return timer


@contextmanager
def _group(asked: BenchRequest, device: torch.device) -> Iterator[Group]:
    if is_rank(os.environ):
        try:
            yield join(os.environ)
        finally:
            leave()
        return
    here = min(torch.cuda.device_count(), MAX_RANKS) if device.type == "cuda" else 2
    size = here if asked.ranks is None else asked.ranks
    if device.type == "cuda" and not 2 <= size <= here:
        raise ValueError(f"bench parallel: {max(size, 2)} ranks need as many GPUs, found {torch.cuda.device_count()}")
    with launched(size, asked.command_line) as group:
        yield group


def _windowed(peers: Group, hidden_size: int, max_tokens: int, top_k: int) -> WindowedPeers:
    """Opens windows, whose inbox and rows are NaN until something is pushed."""
    windowed = open_window(peers, hidden_size, max_tokens, top_k)
    window = windowed.window
    window.words[window.layout.inbox_at :] = -1
    window.set_limit(LIMIT_US)
    torch.cuda.synchronize()
    swap_text(peers, "bench", "")
    return windowed
