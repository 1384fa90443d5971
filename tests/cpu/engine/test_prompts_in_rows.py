"""Short prompts that are read by graphs, a token a step: the same answers, and answers beside them do not wait."""

import random
import time
from typing import Any

import pytest
from cpu.engine.test_overlap import PLAIN, Served, alone, ids_of, served

from ownpath.engine import steps
from ownpath.engine.request import SamplingParams
from ownpath.engine.steps import MOST_ALONE, MOST_ALONE_OF_GRAPHS, MOST_BESIDE

NUM_TOKENS = 5


def prompt_of(count: int) -> list[int]:
    return [4 + 7 * count % 50, *[3 + idx % 55 for idx in range(count - 1)]]


def count_forwards(running: Served) -> list[int]:
    """Returns a list that grows by the number of tokens of each forward."""
    sizes: list[int] = []
    forward = running.model.forward

    def counting(batch: Any) -> Any:
        sizes.append(len(batch.token_ids_T))
        return forward(batch)

    running.model.forward = counting  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("params", PLAIN, ids=str)
@pytest.mark.parametrize(("count", "num_forwards"), [(2, 0), (MOST_ALONE, 0), (MOST_ALONE + 1, 1)])
def test_a_prompt_alone(count: int, num_forwards: int, params: dict[str, Any]) -> None:
    asked_for = prompt_of(count), SamplingParams(NUM_TOKENS, seed=5, **params)
    with served(max_prefill_tokens=64) as running:
        sizes = count_forwards(running)
        (asked,) = running.start(asked_for)
        assert asked.all() == alone(*asked_for)
        assert len(sizes) == num_forwards


@pytest.mark.parametrize(("count", "num_forwards"), [(MOST_BESIDE, 0), (MOST_BESIDE + 1, 1)])
def test_a_prompt_beside_an_answer(count: int, num_forwards: int) -> None:
    params = SamplingParams(300, temperature=0.9, seed=3, ignore_eos=True)
    with served(max_prefill_tokens=128) as running:
        (first,) = running.start(([5], params))
        first.outputs.get(timeout=20)
        sizes = count_forwards(running)
        asked_for = prompt_of(count), SamplingParams(NUM_TOKENS, temperature=0)
        (asked,) = running.start(asked_for)
        assert asked.all() == alone(*asked_for)
        assert sizes == [count] * num_forwards, "the answer beside it has its row in a graph"
        assert len(first.all()) == params.max_tokens - 1, "the first output was taken"


class Graphs:
    """Graphs of prompts, of up to two requests."""

    def takes(self, num_requests: int) -> bool:
        return num_requests <= 2


def test_graphs_of_prompts_read_all_but_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(count, count > MOST_ALONE_OF_GRAPHS) for count in (MOST_ALONE_OF_GRAPHS, MOST_ALONE_OF_GRAPHS + 1)]
    monkeypatch.setattr(steps, "prompts_of", lambda model: Graphs())
    for count, is_read_at_once in wanted:
        with served(max_prefill_tokens=64) as running:
            sizes = count_forwards(running)
            asked_for = prompt_of(count), SamplingParams(NUM_TOKENS, temperature=0)
            (asked,) = running.start(asked_for)
            assert asked.all() == alone(*asked_for)
            assert sizes == [count] * is_read_at_once
    with served(max_prefill_tokens=64) as running:
        sizes = count_forwards(running)
        for asked in running.start(*[asked_for] * 3):
            assert asked.all() == alone(*asked_for)
        assert sizes == [], "three requests at a time fit no graph"


def test_a_prompt_that_fails_leaves_the_answer_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the same step is whole: nothing of the answer is lost or told twice."""
    params = SamplingParams(200, temperature=0.9, seed=3, ignore_eos=True)
    with served(max_prefill_tokens=128) as running:
        expected = alone([5], params)
        (first,) = running.start(([5], params))
        heard = [first.outputs.get(timeout=20)]
        forward = running.model.forward

        def failing(batch: Any) -> Any:
            if 4 in batch.token_ids_T.tolist():
                raise RuntimeError("broken")
            return forward(batch)

        monkeypatch.setattr(running.model, "forward", failing)
        (guilty,) = running.start(([6, *[4] * 90], SamplingParams(NUM_TOKENS, temperature=0)))
        assert guilty.all()[-1].error == "the step that this request was part of failed"
        assert [*heard, *first.all()] == expected
        assert running.engine.counts.num_step_retries > 0


def test_a_prompt_that_is_scored_is_read_at_once() -> None:
    asked_for = prompt_of(9), SamplingParams(NUM_TOKENS, temperature=0, prompt_logprobs=0)
    with served() as running:
        sizes = count_forwards(running)
        (asked,) = running.start(asked_for)
        assert asked.all() == alone(*asked_for)
        assert sizes == [9]


def test_many_prompts_that_come_and_go() -> None:
    random_numbers = random.Random(4)
    wanted = [
        (prompt_of(random_numbers.randint(1, 20)), SamplingParams(random_numbers.randint(1, 9), seed=n, **PLAIN[n % 4]))
        for n in range(40)
    ]
    with served() as running:
        asked = [running.start(one)[0] for one in wanted]
        assert [ids_of(one.all()) for one in asked] == [ids_of(alone(*one)) for one in wanted]


def test_a_prompt_is_read_by_steps_that_overlap() -> None:
    """Each of its rows goes on from a token that the host knows; only the first has no step before it."""
    asked_for = prompt_of(12), SamplingParams(NUM_TOKENS, temperature=0)
    with served(most_s=0.001) as running:
        (asked,) = running.start(asked_for)
        assert asked.all() == alone(*asked_for)
        assert [step[0][1] for step in running.model.rows] == list(range(12 + NUM_TOKENS - 1))
        assert running.decoder.num_behind == 12 + NUM_TOKENS - 2


@pytest.mark.parametrize("seed", range(2))
def test_a_long_prompt_comes_while_short_ones_are_under_way(seed: int) -> None:
    """Its steps are forwards, planned while rows of the others' prompts are unread."""
    chance = random.Random(seed)
    wanted = [
        (prompt_of(chance.choice((2, 5, 15, 60, 90))), SamplingParams(chance.randint(0, 9), seed=n, **PLAIN[n % 4]))
        for n in range(24)
    ]
    with served(most_s=0.001, seed=seed, max_prefill_tokens=32) as running:
        sizes = count_forwards(running)
        asked = []
        for one in wanted:
            asked += running.start(one)
            time.sleep(chance.random() * 0.004)
        assert [one.all() for one in asked] == [alone(*one) for one in wanted]
        assert sizes
        assert running.decoder.num_behind > 10
