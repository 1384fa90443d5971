"""The policy of drafts in traffic, on a clock of its own: what pays goes on, and what loses costs less than 2%.

Steps take what was measured on an H200. Requests come and go, are read two tokens a step or one, and a step with drafts
waits for the host where they change, as the engine's does: each traffic is run with the policy and with plain steps
alone, and the times of the same tokens are compared.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import pytest

from ownpath.engine.draft_policy import MOST_DRAFTED, NUM_BETWEEN, NUM_TRIED, DraftPolicy

GRAPHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64)
LEAST = 0.98


class Costs(NamedTuple):
    """Milliseconds, plain and with drafts, of steps of 1, 8 and 32 requests. wait: of the host, where a step with drafts
    is not launched ahead. forward, reading: of a prompt that ``forward`` reads, the backbone's and the module's."""

    plain: tuple[float, float, float]
    drafted: tuple[float, float, float]
    wait: float
    forward: float
    reading: float

    def of(self, drafts: bool, count: int) -> float:
        """Returns the time of a step of so many."""
        low, middle, high = self.drafted if drafts else self.plain
        if count > 32:
            return high * count / 32
        if count <= 8:
            return low + (middle - low) * (count - 1) / 7
        return middle + (high - middle) * (count - 8) / 24


FLASH = Costs((5.5, 11.44, 26.5), (6.63, 18.21, 37.91), 0.5, 65.0, 3.0)
EMBEDDED = Costs((0.2, 0.28, 0.54), (0.27, 0.42, 0.88), 0.4, 6.4, 3.0)
MODELS = {"flash": FLASH, "embedded": EMBEDDED}


class Asked(NamedTuple):
    """A request. prompt: tokens that steps read; forward: whether ``forward`` reads the prompt instead."""

    prompt: int
    answer: int
    forward: bool = False


@dataclass
class Traffic:
    """Requests in their order. most: at a time. together: whether the next begin when all before have ended. right: the
    share of guesses that are, by the number of the step."""

    requests: Sequence[Asked]
    most: int
    together: bool = False
    right: Callable[[int], float] = field(default=lambda _: 0.95)


def graph_of(count: int) -> int:
    return next(one for one in GRAPHS if one >= count)


def run(traffic: Traffic, costs: Costs, policy: DraftPolicy | None) -> float:
    """Returns the milliseconds of all requests, with plain steps alone where there is no policy."""
    chance, clock, waiting = random.Random(5), 0.0, list(reversed(traffic.requests))
    running: list[list[int]] = []  # tokens to read, tokens to draw
    num_ended, was_drafted, changed, is_closed, step = 0, False, True, False, 0
    while waiting or running:
        step, num_forward = step + 1, 0
        while waiting and len(running) < traffic.most and not (traffic.together and is_closed):
            asked = waiting.pop()
            running.append([0 if asked.forward else asked.prompt, asked.answer])
            num_forward, changed = num_forward + asked.forward, True
        is_closed, size = True, graph_of(len(running))
        drafts = policy is not None and policy.drafts(size)
        clock += num_forward * costs.forward
        if num_forward and drafts and policy is not None:
            clock += num_forward * costs.reading
            policy.note_reading(size, num_forward * costs.reading)
        is_mixed = 0 < sum(one[0] > 0 for one in running) < len(running)
        waits = (changed or not was_drafted or is_mixed) if drafts else was_drafted
        # A plain step has a row of those that ended in the one before, which nobody had read when it was launched.
        rows = len(running) if drafts or was_drafted else min(len(running) + num_ended, traffic.most)
        seconds, gained = costs.of(drafts, graph_of(rows)) + waits * costs.wait, 0
        for one in running:
            idx, right = int(not one[0]), chance.random() < traffic.right(step)
            got = min(one[idx], 1 + (drafts and (right or not idx)))
            one[idx], gained = one[idx] - got, gained + got
        if policy is not None:
            policy.note(size, seconds, gained / len(running), is_drafted=drafts)
        clock, was_drafted = clock + seconds, drafts
        left = [one for one in running if one[1]]
        num_ended, changed, running = len(running) - len(left), len(left) < len(running), left
        is_closed = bool(running)
    return clock


def gain(traffic: Traffic, costs: Costs, policy: DraftPolicy | None = None) -> float:
    return run(traffic, costs, None) / run(traffic, costs, policy or DraftPolicy())
