"""The policy of drafts in traffic, on a clock of its own: what pays goes on, and what loses costs less than 2%.

Steps take what was measured on an H200. Requests come and go, are read two tokens a step or one, and a step with drafts
waits for the host where they change, as the engine's does. Steps are late by chance. Each traffic is run with the policy
and with plain steps alone, and the times of the same answers are compared.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from ownpath.engine.draft_policy import MOST_DRAFTED, NUM_BETWEEN, NUM_TRIED, DraftPolicy
from ownpath.engine.graphs import BUCKETS

LEAST = 0.98
Right = Callable[[int], float]
"""The share of guesses that are right, by the number of the step."""


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


class Traffic(NamedTuple):
    """Requests in their order. most: at a time. together: whether the next begin when all before have ended."""

    requests: Sequence[Asked]
    most: int
    together: bool
    right: Right


def graph_of(count: int) -> int:
    return next(one for one in BUCKETS if one >= count)


def run(traffic: Traffic, costs: Costs, policy: DraftPolicy | None) -> float:
    """Returns the milliseconds of all requests, with plain steps alone where there is no policy."""
    chance, noise, clock, waiting = random.Random(5), random.Random(9), 0.0, list(reversed(traffic.requests))
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
        longer = (1 + 0.18 * (num_forward - 1)) if num_forward else 0.0
        clock += longer * costs.forward
        if longer and policy is not None and policy.holds(size):
            clock += longer * costs.reading
            policy.note_reading(size, longer * costs.reading)
        is_mixed = 0 < sum(one[0] > 0 for one in running) < len(running)
        waits = (changed or not was_drafted or is_mixed) if drafts else was_drafted
        # A plain step has a row of those that ended in the one before, which nobody had read when it was launched.
        rows = len(running) if drafts or was_drafted else min(len(running) + num_ended, traffic.most)
        late = noise.uniform(0.85, 1.15) * (5 if noise.random() < 0.003 else 1)
        seconds, gained = late * (costs.of(drafts, graph_of(rows)) + waits * costs.wait), 0
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


def gain(traffic: Traffic, costs: Costs) -> float:
    """Returns the time of plain steps over that with the policy."""
    return run(traffic, costs, None) / run(traffic, costs, DraftPolicy())


def steady(share: float) -> Right:
    return lambda _: share


def drawn(count: int, answer: tuple[int, int], forward: float = 0.0) -> list[Asked]:
    """Returns requests with answers of such lengths. forward: the share of prompts that ``forward`` reads."""
    chance = random.Random(1)
    return [Asked(chance.randint(6, 16), chance.randint(*answer), chance.random() < forward) for _ in range(count)]


def mixed(most: int) -> list[Asked]:
    """Returns short answers, long ones, and prompts of both kinds, in phases."""
    phases = drawn(12 * most, (5, 13)), drawn(3 * most, (100, 300)), drawn(6 * most, (10, 60), forward=0.5)
    return [one for _ in range(2) for phase in phases for one in phase]


SHORT, MIDDLE, LONG = (5, 13), (20, 90), (150, 400)


@pytest.mark.parametrize("together", [False, True], ids=["flowing", "together"])
@pytest.mark.parametrize("share", [0.95, 0.4])
@pytest.mark.parametrize("kind", ["short", "middle", "long", "forward", "mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_32_requests_never_lose(model: str, kind: str, share: float, together: bool) -> None:
    """Chats that come and go, long answers that end one by one, prompts that ``forward`` reads, and all by turns."""
    requests = {
        "short": drawn(60 * 32, SHORT),
        "middle": drawn(12 * 32, MIDDLE),
        "long": drawn(3 * 32, LONG),
        "forward": drawn(12 * 32, MIDDLE, forward=1.0),
        "mixed": mixed(32),
    }[kind]
    assert gain(Traffic(requests, 32, together, steady(share)), MODELS[model]) >= LEAST
