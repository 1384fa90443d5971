"""Rows whose logits change by what was drawn before, in steps that are launched before that is read."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID
from cpu.engine.late_device import LateDevice, PagedModel
from cpu.engine.test_overlap import ENDLESS, ENDS, PLAIN, RULE, VOCAB, Asked, greedy, ids_of, served, until
from support.matchers import Every, Script

from ownpath.config import EngineConfig
from ownpath.engine import steps
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, SamplingParams, StepOutput

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "min_tokens": 5},
    {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 0.9, "logit_bias": ((9, 2.0), (2, 1.5))},
    {"temperature": 0.7, "presence_penalty": 1.0, "num_logprobs": 0},
)


@dataclass(frozen=True)
class Wanted:
    """A request to be made. every: the grammar's number; ``None``: no grammar."""

    prompt_ids: list[int]
    params: SamplingParams
    every: int | None = None

    def ask(self, engine: Engine) -> Asked:
        asked = Asked.of(self.prompt_ids, self.params)
        asked.request.matcher = None if self.every is None else Every(self.every, VOCAB)
        engine.submit([asked.request])
        return asked


def random_wanted(chance: random.Random) -> Wanted:
    prompt = [chance.randrange(4, VOCAB) for _ in range(chance.choice((1, 1, 2, 5, 14)))]
    params = SamplingParams(chance.randint(1, 40), seed=chance.randrange(99), **chance.choice((*PLAIN, *KINDS)))
    return Wanted(prompt, params, chance.choice((None, 3, 7)))


def by_forward(wanted: Sequence[Wanted]) -> list[list[StepOutput]]:
    """Hears of an engine that runs one request after the other by ``forward``, step by step."""
    device = LateDevice()
    engine = Engine(PagedModel(RULE, VOCAB, device), EngineConfig(max_model_len=512), VOCAB, end_token_ids=ENDS)
    engine.start()
    found = [one.ask(engine).all() for one in wanted]
    engine.stop()
    device.end()
    return found


@pytest.fixture(autouse=True)
def prompts_by_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of two tokens and more are read by ``forward``, unless a test says otherwise."""
    monkeypatch.setattr(steps, "MOST_ALONE", 1)
    monkeypatch.setattr(steps, "MOST_BESIDE", 1)


@pytest.mark.parametrize("most_in_rows", [1, 16])
def test_answers_are_those_of_steps_one_by_one(most_in_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars, penalties, bias and minima beside rows without, on a device that is late by random times: random joins,
    ends and aborts."""
    monkeypatch.setattr(steps, "MOST_ALONE", most_in_rows)
    monkeypatch.setattr(steps, "MOST_BESIDE", most_in_rows)
    seed = most_in_rows
    chance = random.Random(seed)
    wanted = [random_wanted(chance) for _ in range(16)]
    expected = by_forward(wanted)
    with served(most_s=0.001, seed=seed) as running:
        asked: list[Asked] = []
        aborted: set[int] = set()
        for n, one in enumerate(wanted):
            asked.append(one.ask(running.engine))
            time.sleep(chance.random() * 0.01 * (chance.random() < 0.4))
            if chance.random() < 0.2:
                aborted.add(victim := chance.randrange(n + 1))
                running.engine.abort(asked[victim].request)
        for n, heard in enumerate(asked):
            if n not in aborted:
                assert heard.all() == expected[n], wanted[n]
        until(lambda: running.engine.num_open == 0)
        for n in aborted:
            heard_so_far = asked[n].heard()
            assert heard_so_far == expected[n][: len(heard_so_far)]
        num_decode = len(running.model.rows)
        assert not running.engine._adjuster._asking
    assert running.decoder.num_behind > num_decode / 4, "else this tests little"


def barred(prompt_ids: list[int], number: int, count: int) -> list[int]:
    """The definition: the likeliest token that is allowed after all so far."""
    said: list[int] = []
    while len(said) < count and (not said or said[-1] != EOS_ID):
        logits = ENDLESS((*prompt_ids, *said)).clone()
        logits[torch.arange(VOCAB) % number != len(said) % number] = -torch.inf
        said.append(int(logits.argmax()))
    return said


def test_a_bound_step_is_launched_before_the_tokens_before_it_are_read() -> None:
    """All but the first are, and none uploads rows: the device goes on from the token that was drawn again."""
    with served(ENDLESS, most_s=0.0005) as running:
        bound = Wanted([5, 6], SamplingParams(30, temperature=0), every=5).ask(running.engine)
        assert ids_of(bound.all()) == barred([5, 6], 5, 30)
        assert len(running.model.rows) == 29
        assert running.decoder.num_behind == 28
        assert running.decoder.num_uploads == 1


def test_rows_beside_a_bound_one_do_not_wait_for_its_mask_to_run() -> None:
    """While the mask is made, the device has the step that it is for."""
    with served(ENDLESS) as running:
        launched: list[tuple[int, int]] = []

        class Looking(Script):
            def fill(self, output_ids: Any, row_W: Any) -> None:
                launched.append((len(output_ids), running.decoder._num_unread))
                super().fill(output_ids, row_W)

        asked = Asked.of([5, 6], SamplingParams(6, temperature=0))
        asked.request.matcher = Looking([[7], [8], [9], [10], [11], [12]])
        running.engine.submit([asked.request])
        assert ids_of(asked.all()) == [7, 8, 9, 10, 11, 12]
        assert launched == [(0, 0), *((count, 1) for count in range(1, 6))]


def test_a_grammar_that_raises_ends_its_answer_alone() -> None:
    """It is asked for while its step runs, so the steps of all are run again one by one."""

    class Raising(Script):
        def fill(self, output_ids: Any, row_W: Any) -> None:
            if len(output_ids) >= 4:
                raise ValueError("the grammar's own words")
            super().fill(output_ids, row_W)

    with served(ENDLESS, most_s=0.0005) as running:
        sick = Asked.of([9, 9], SamplingParams(30, temperature=0))
        sick.request.matcher = Raising([[7]])
        running.engine.submit([sick.request])
        bound = Wanted([5, 6], SamplingParams(25, temperature=0), every=5).ask(running.engine)
        (free,) = running.start(([4, 8], SamplingParams(25, temperature=0)))
        outputs = sick.all()
        assert ids_of(outputs) == [7] * 4
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert ids_of(bound.all()) == barred([5, 6], 5, 25)
        assert ids_of(free.all()) == greedy([4, 8], 25, ENDLESS)


@pytest.mark.parametrize("failing_draw", [1, 2, 6])
def test_a_second_draw_that_cannot_be_launched_is_done_again(
    failing_draw: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(ENDLESS) as running:
        redraw, num_drawn = running.decoder.redraw, 0

        def failing(*given: Any) -> None:
            nonlocal num_drawn
            num_drawn += 1
            if num_drawn == failing_draw:
                raise RuntimeError("out of memory")
            redraw(*given)

        monkeypatch.setattr(running.decoder, "redraw", failing)
        bound = Wanted([5, 6], SamplingParams(20, temperature=0), every=5).ask(running.engine)
        (free,) = running.start(([4, 8], SamplingParams(20, temperature=0)))
        assert ids_of(bound.all()) == barred([5, 6], 5, 20)
        assert ids_of(free.all()) == greedy([4, 8], 20, ENDLESS)


def test_a_prompt_that_is_read_in_rows_needs_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows but the last draw nothing that counts."""
    monkeypatch.setattr(steps, "MOST_ALONE", 16)
    script = Script([[7], [8], [9]])
    with served(ENDLESS) as running:
        asked = Asked.of([5, 6, 7, 8, 9], SamplingParams(3, temperature=0))
        asked.request.matcher = script
        running.engine.submit([asked.request])
        assert ids_of(asked.all()) == [7, 8, 9]
        assert len(running.model.rows) == 7
    assert script.seen == [[], [7], [7, 8]]
