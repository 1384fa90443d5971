"""Steps launched before the tokens of the one before are read: the same answers, whoever joins, ends or goes."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, random_rule
from cpu.engine.late_device import WAIT_S, LateDecoder, LateDevice, PagedModel

from ownpath.config import EngineConfig
from ownpath.engine import steps
from ownpath.engine.decoder import StepBegun
from ownpath.engine.engine import Engine
from ownpath.engine.flight import Flight, NextRows
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows, unread
from ownpath.engine.scheduler import ScheduledChunk
from ownpath.model.batch import ForwardBatch

VOCAB, MAX_ROWS = 64, 6
ENDS = frozenset({EOS_ID, 2})
RULE = random_rule(VOCAB)
ENDLESS = random_rule(VOCAB, forbidden=sorted(ENDS))
PLAIN: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.3, "num_logprobs": 0},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.01},
)
OTHERS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "min_tokens": 5},
    {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 0.5, "num_logprobs": 3},
    {"temperature": 0.9, "logit_bias": ((9, 2.0), (2, 1.5))},
)


@pytest.fixture(autouse=True)
def prompts_by_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of two tokens and more are read by ``forward`` here; ``test_prompts_in_rows`` has the others."""
    monkeypatch.setattr(steps, "MOST_ALONE", 1)
    monkeypatch.setattr(steps, "MOST_BESIDE", 1)


@dataclass
class Asked:
    """A request and what it heard."""

    request: Request
    outputs: "queue.SimpleQueue[StepOutput]"

    @classmethod
    def of(cls, prompt_ids: list[int], params: SamplingParams) -> "Asked":
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        return cls(Request(prompt_ids, params, outputs.put), outputs)

    def all(self) -> list[StepOutput]:
        outputs = [self.outputs.get(timeout=WAIT_S)]
        while outputs[-1].finish_reason is None:
            outputs.append(self.outputs.get(timeout=WAIT_S))
        assert self.outputs.empty()
        return outputs

    def heard(self) -> list[StepOutput]:
        """Takes the outputs that have come so far."""
        return [self.outputs.get() for _ in range(self.outputs.qsize())]


def ids_of(outputs: list[StepOutput]) -> list[int]:
    return [output.token.token_id for output in outputs if output.token is not None]


@dataclass
class Served:
    """An engine on a late device."""

    engine: Engine
    model: PagedModel
    decoder: LateDecoder
    device: LateDevice

    def start(self, *prompts_and_params: tuple[list[int], SamplingParams]) -> list[Asked]:
        asked = [Asked.of(*one) for one in prompts_and_params]
        self.engine.submit([one.request for one in asked])
        return asked

    def hold_in_flight(self, asked: Asked) -> list[StepOutput]:
        """Holds the device with steps in flight. Returns what was heard until then."""
        heard = [asked.outputs.get(timeout=WAIT_S)]
        self.device.hold()
        until(lambda: self.device.num_given == self.device.num_done + 2 or not self.engine.num_open)
        return [*heard, *asked.heard()]


@contextmanager
def served(
    rule: Callable[[tuple[int, ...]], torch.Tensor] = RULE, most_s: float = 0.0, seed: int = 0, **limits: int
) -> Iterator[Served]:
    device = LateDevice(most_s, seed)
    model = PagedModel(rule, VOCAB, device)
    decoder = LateDecoder(model, MAX_ROWS, VOCAB)
    config = EngineConfig(**({"max_model_len": 512, "max_num_seqs": MAX_ROWS, "max_prefill_tokens": 16} | limits))
    engine = Engine(model, config, VOCAB, end_token_ids=ENDS, decoder=decoder)
    engine.start()
    try:
        yield Served(engine, model, decoder, device)
    finally:
        device.release()
        engine.stop()
        device.end()
    assert model.caches.slots.faults() == []
    assert not model.caches.slots.owned, "every request gave its slot and blocks back, however it ended"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


def alone(prompt_ids: list[int], params: SamplingParams) -> list[StepOutput]:
    """Hears of an engine that runs a request by ``forward``, step by step, with nobody beside it."""
    device = LateDevice()
    model = PagedModel(RULE, VOCAB, device)
    engine = Engine(model, EngineConfig(max_model_len=512), VOCAB, end_token_ids=ENDS)
    engine.start()
    asked = Asked.of(prompt_ids, params)
    engine.submit([asked.request])
    found = asked.all()
    engine.stop()
    device.end()
    return found


def greedy(prompt_ids: list[int], num_tokens: int, rule: Callable[[tuple[int, ...]], torch.Tensor] = RULE) -> list[int]:
    """The definition: the likeliest token after all so far, until one ends it."""
    history = list(prompt_ids)
    while len(history) < len(prompt_ids) + num_tokens and (history[-1] not in ENDS or len(history) == len(prompt_ids)):
        history.append(int(rule(tuple(history)).argmax()))
    return history[len(prompt_ids) :]


def random_request(chance: random.Random, kinds: Sequence[dict[str, Any]]) -> tuple[list[int], SamplingParams]:
    prompt = [chance.randrange(4, VOCAB) for _ in range(chance.choice((1, 2, 5, 14, 40)))]
    stops = frozenset(chance.sample(range(4, VOCAB), chance.choice((0, 3))))
    return prompt, SamplingParams(
        chance.randint(1, 40), seed=chance.randrange(99), stop_token_ids=stops, **chance.choice(kinds)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kinds", [PLAIN, (*PLAIN, *OTHERS)], ids=["plain", "mixed"])
def test_answers_are_those_of_steps_one_by_one(seed: int, kinds: Sequence[dict[str, Any]]) -> None:
    """Random joins, ends and aborts on a device that is late by random times."""
    chance = random.Random(seed)
    wanted = [random_request(chance, kinds) for _ in range(12)]
    expected = [alone(*one) for one in wanted]
    with served(most_s=0.001, seed=seed) as running:
        asked, aborted = [], set()
        for n, one in enumerate(wanted):
            asked += running.start(one)
            if chance.random() < 0.4:
                time.sleep(chance.random() * 0.01)
            if chance.random() < 0.2:
                aborted.add(victim := chance.randrange(n + 1))
                running.engine.abort(asked[victim].request)
        for n, one in enumerate(asked):
            if n not in aborted:
                assert one.all() == expected[n], wanted[n]
        until(lambda: running.engine.num_open == 0)
        for n in aborted:
            heard = asked[n].heard()
            assert heard == expected[n][: len(heard)]
        num_decode = len(running.model.rows)
    if kinds is PLAIN:
        assert running.decoder.num_behind > num_decode / 3, "else this tests little"


def test_a_greedy_answer_is_the_models() -> None:
    with served(most_s=0.0005) as running:
        prompts = [[5 + n] * (1 + 3 * n) for n in range(5)]
        asked = running.start(*((ids, SamplingParams(25, temperature=0)) for ids in prompts))
        assert [ids_of(one.all()) for one in asked] == [greedy(ids, 25) for ids in prompts]


def test_the_next_step_is_launched_before_the_tokens_are_read() -> None:
    with served(ENDLESS) as running:
        (asked,) = running.start(([5, 6], SamplingParams(9, temperature=0)))
        heard = running.hold_in_flight(asked)
        assert running.decoder.num_behind
        assert asked.heard() == []
        running.device.release()
        assert ids_of([*heard, *asked.all()]) == greedy([5, 6], 9, ENDLESS)
        assert running.decoder.num_uploads == 1, "the device goes on by itself"
        until(lambda: running.engine.load().times.num_steps == 9)
        times = running.engine.load().times
        assert times.busy_s > 0
        assert times.gap_s >= 0


def test_no_row_is_run_whose_token_nobody_may_hear() -> None:
    """The longest request that fits fills its memory to the last row but one, which no step computes."""
    with served(ENDLESS, max_model_len=64) as running:
        prompt = [5] * 50
        asked = running.start((prompt, SamplingParams(14, temperature=0)), ([6], SamplingParams(40, temperature=0)))
        assert ids_of(asked[0].all()) == greedy(prompt, 14, ENDLESS)
        asked[1].all()
    rows = [row for step in running.model.rows for row in step]
    longest = max(rows, key=lambda row: row[1])
    assert longest[1] == 62
    assert len(set(rows)) == len(rows), "no position is computed twice"
    assert len([row for row in rows if row[0] == longest[0] and row[1] >= 50]) == 13


def stopping(prompt_ids: list[int], least: int) -> tuple[SamplingParams, int]:
    """Parameters whose stop token comes after at least so many others, and how many tokens that makes."""
    words = greedy(prompt_ids, 40, ENDLESS)
    end = next(at for at, word in enumerate(words) if at >= least and word not in words[:at])
    return SamplingParams(40, temperature=0, stop_token_ids=frozenset({words[end]})), end + 1


def test_an_end_token_costs_one_row_and_memory_is_given_back_behind_it() -> None:
    """A stop token ends an answer while its own row is under way; a newcomer waits for the slot."""
    prompts = [[5, 6, 7], [9, 10]]
    params, counts = zip(*(stopping(prompt, 5) for prompt in prompts), strict=True)
    with served(ENDLESS, max_num_seqs=1) as running:
        asked = running.start(*zip(prompts, params, strict=True))
        assert [len(ids_of(one.all())) for one in asked] == list(counts)
        until(lambda: not running.model.caches.slots.owned)
    ran = [step[0][1] for step in running.model.rows]
    # Each answer's tokens but the first, which its prompt's step draws; the end token's row is the one too many.
    ends = [len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)]
    assert ran == [*range(3, ends[0]), *range(2, ends[1])]


def test_an_aborted_request_keeps_its_memory_until_no_step_writes_there() -> None:
    with served(ENDLESS) as running:
        slots, device = running.model.caches.slots, running.device
        asked = running.start(([5], SamplingParams(300)), ([6, 6], SamplingParams(60, temperature=0)))
        heard = running.hold_in_flight(asked[1])
        running.engine.abort(asked[0].request)
        device.hold(1)
        until(lambda: running.engine.num_open == 1 and device.num_given == device.num_done + 2)
        assert len(slots.owned) == 2, "its last row is under way"
        device.hold(1)
        until(lambda: device.num_given == device.num_done + 2 and len(slots.owned) == 1)
        device.release()
        assert ids_of([*heard, *asked[1].all()]) == greedy([6, 6], 60, ENDLESS)
        until(lambda: not slots.owned)


def test_a_row_that_is_not_finite_ends_its_own_request() -> None:
    def rule(history: tuple[int, ...]) -> torch.Tensor:
        bad = torch.full((VOCAB,), torch.nan)
        return bad if history[0] == 50 and len(history) >= 6 else ENDLESS(history)

    with served(rule, most_s=0.0005) as running:
        sick, well = running.start(
            ([50, 3], SamplingParams(30, temperature=0)), ([4], SamplingParams(30, temperature=0))
        )
        outputs = sick.all()
        assert ids_of(well.all()) == greedy([4], 30, ENDLESS)
    assert ids_of(outputs) == greedy([50, 3], 4, ENDLESS)
    assert outputs[-1].error == "the model produced a logit that is not finite"


def test_a_listener_that_fails_is_dropped() -> None:
    with served(ENDLESS, most_s=0.0005) as running:

        def sink(output: StepOutput) -> None:
            raise RuntimeError("gone")

        running.engine.submit([Request([3], SamplingParams(100), sink)])
        (asked,) = running.start(([4], SamplingParams(30, temperature=0)))
        assert ids_of(asked.all()) == greedy([4], 30, ENDLESS)
        assert running.engine.num_open == 0


@pytest.mark.parametrize("lost", [None, "an illegal address"])
def test_a_device_that_fails_ends_the_requests_of_both_steps(lost: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears one error. A device that is lost ends the engine; else later requests run."""
    monkeypatch.setattr("ownpath.engine.engine.device_problem", lambda device: lost)
    with served(ENDLESS) as running:
        asked = running.start(([5], SamplingParams(300)), ([6, 6], SamplingParams(300)))
        running.hold_in_flight(asked[0])
        running.device.error = RuntimeError("the device's own words")
        running.device.release()
        for one in asked:
            last = one.all()[-1]
            assert last.finish_reason is FinishReason.ERROR
            assert "own words" not in str(last.error)
        until(lambda: running.engine.num_open == 0)
        assert (running.engine.failure is None) == (lost is None)
        running.device.error = None
        if lost is None:
            (later,) = running.start(([7], SamplingParams(20, temperature=0)))
            assert ids_of(later.all()) == greedy([7], 20, ENDLESS)


def test_likeliest_tokens_are_those_of_their_own_step() -> None:
    """They are taken before the next step's logits overwrite a step's, although that is launched before the read."""
    asks = SamplingParams(12, 0.8, seed=3, num_logprobs=3, ignore_eos=True)
    wanted = [([5, 6], SamplingParams(9, temperature=0)), ([7], asks)]
    expected = [alone(*one) for one in wanted]
    assert len(expected[1]) == 12
    with served(most_s=0.001) as running:
        asked = running.start(*wanted)
        assert [one.all() for one in asked] == expected
        assert running.decoder.num_behind >= 10, "the first token is the prompt's step's, and the next has none before"


ADJUSTED = {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3}


@pytest.mark.parametrize("adjusted", [ADJUSTED, {"logit_bias": ((9, 4.0),)}, {"min_tokens": 7}], ids=str)
def test_adjusted_rows_go_on_from_tokens_that_nobody_has_read(adjusted: dict[str, Any]) -> None:
    params = SamplingParams(14, 0.9, seed=6, ignore_eos=True, stop_token_ids=frozenset({3}), **adjusted)
    wanted = [([5, 6], SamplingParams(9, temperature=0)), ([7], params)]
    expected = [alone(*one) for one in wanted]
    num_tokens = len(expected[1])
    assert num_tokens > 7
    with served(most_s=0.001) as running:
        asked = running.start(*wanted)
        assert [one.all() for one in asked] == expected
        assert running.decoder.num_behind >= num_tokens - 3, "a table of counts is made when the first token is read"


@pytest.mark.parametrize("failing_step", [1, 3, 6])
def test_a_step_that_fails_is_not_counted(failing_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(14, 0.9, seed=6, ignore_eos=True, **ADJUSTED)
    expected = alone([7], params)
    with served() as running:
        launch, num_begun = running.decoder._launch_whole, 0

        def failing(*work: Any) -> None:
            nonlocal num_begun
            num_begun += 1
            launch(*work)
            if num_begun == failing_step:
                raise RuntimeError("out of memory")

        def enqueue(work: Callable[[], None], turn: int) -> object:
            work()  # at once, so that it fails here
            return running.device.put(lambda: None)

        monkeypatch.setattr(running.decoder, "_launch_whole", failing)
        monkeypatch.setattr(running.decoder, "_enqueue", enqueue)
        (asked,) = running.start(([7], params))
        assert asked.all() == expected
        assert running.engine.load().counts.num_step_retries == 1


@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("failing_step", [1, 2, 5])
def test_a_step_that_cannot_be_launched_leaves_the_one_before_whole(
    failing_step: int, num_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is launched once more; a request whose step fails again ends with an error."""
    with served(ENDLESS) as running:
        enqueue, num_begun = running.decoder._enqueue, 0

        def failing(*work: Any) -> object:
            nonlocal num_begun
            num_begun += 1
            if failing_step <= num_begun < failing_step + num_failures:
                raise RuntimeError("out of memory")
            return enqueue(*work)

        monkeypatch.setattr(running.decoder, "_enqueue", failing)
        (asked,) = running.start(([5, 6], SamplingParams(30, temperature=0)))
        outputs = asked.all()
        assert outputs[-1].finish_reason is (FinishReason.LENGTH if num_failures == 1 else FinishReason.ERROR)
        num_tokens = 30 if num_failures == 1 else failing_step  # the first by the prompt's step
        assert ids_of(outputs) == greedy([5, 6], num_tokens, ENDLESS)
        assert running.engine.load().counts.num_step_retries == 1
        (later,) = running.start(([7], SamplingParams(20, temperature=0)))
        assert ids_of(later.all()) == greedy([7], 20, ENDLESS)


def test_stopping_with_steps_in_flight_ends_open_requests() -> None:
    with served(ENDLESS) as running:
        (asked,) = running.start(([5], SamplingParams(400)))
        running.hold_in_flight(asked)
        stopper = threading.Thread(target=running.engine.stop)
        stopper.start()
        until(lambda: not running.engine.is_alive)
        running.device.release()
        stopper.join(WAIT_S)
        assert asked.all()[-1].error == "the engine has stopped"


def test_rows_whose_cache_was_taken_are_no_repetition() -> None:
    model = PagedModel(ENDLESS, VOCAB, device := LateDevice())
    device.end()
    asked = [Asked.of([5, 6], SamplingParams(limit)) for limit in (4, 9)]
    for one in asked:
        one.request.cache, one.request.num_computed = model.new_cache(), 2
        one.request.output_ids.append(7)
    chunks = [ScheduledChunk(one.request, 1) for one in asked]
    flight = Flight.of(NextRows.of(chunks, {asked[0].request: 0}), ENDS, StepBegun(2, 0), 0.0)
    assert flight.num_more == 1, "of four tokens one is read, one unread, one this step's"
    assert flight.repeats(list(chunks))
    assert not flight.repeats(chunks[:1])
    assert not flight.repeated(StepBegun(2, 1), 0.0).repeats(chunks)
    asked[1].request.cache = model.new_cache()
    assert not flight.repeats(chunks)


def test_a_prompts_last_row_is_looked_at_once() -> None:
    """The step behind it is the same one more, in which each row only extends an answer."""
    model = PagedModel(ENDLESS, VOCAB, device := LateDevice())
    device.end()
    asked = Asked.of([5, 6], SamplingParams(9))
    asked.request.cache, asked.request.num_computed = model.new_cache(), 1
    following = NextRows.of([ScheduledChunk(asked.request, 1)], {})
    assert following.reading == {0}
    flight = Flight.of(following, ENDS, StepBegun(1, 0), 0.0)
    assert flight.goes_on
    assert flight.looks == {0}
    assert flight.repeated(StepBegun(1, 1), 0.0).looks == frozenset()
    assert flight.repeated(StepBegun(1, 1, {0: 3}), 0.0).looks == {0}


@torch.inference_mode()
def test_rows_move_while_their_tokens_are_unread() -> None:
    """The decoder alone, its device held: rows leave, join and change places, and two uploads wait side by side."""
    device = LateDevice()
    model = PagedModel(ENDLESS, VOCAB, device)
    decoder = LateDecoder(model, MAX_ROWS, VOCAB)
    prompts = [[5, 6], [7], [8, 9, 10]]
    caches = [model.new_cache() for _ in prompts]
    model.forward(
        ForwardBatch.of([(ids[:-1] or [4], cache) for ids, cache in zip(prompts, caches, strict=True)], "cpu")
    )
    histories = [ids if len(ids) > 1 else [4, *ids] for ids in prompts]
    one, two, three = (greedy(ids, 8, ENDLESS) for ids in histories)
    a, b, c = (DecodeRow(cache, ids[-1]) for cache, ids in zip(caches, prompts, strict=True))
    device.hold()
    first = decoder.begin(StepRows.of([a, b]))
    second = decoder.begin(StepRows.of([c, b._replace(token_id=unread(1)), a._replace(token_id=unread(0))]))
    assert device.is_idle is False
    with pytest.raises(AssertionError, match="unread"):
        decoder.begin(StepRows.of([a]))
    device.release()
    until(lambda: device.is_idle)
    assert decoder.finish(first).token_ids == [one[0], two[0]], "the second step's results lie beside the first's"
    third = decoder.begin(StepRows.of([a._replace(token_id=unread(2)), c._replace(token_id=unread(0))]))
    assert decoder.finish(second).token_ids == [three[0], two[1], one[1]]
    fourth = decoder.begin(StepRows.of([a._replace(token_id=unread(0)), b._replace(token_id=two[1])]))
    assert decoder.finish(third).token_ids == [one[2], three[1]]
    assert decoder.finish(fourth).token_ids == [one[3], two[2]]
    num_uploads = decoder.num_uploads
    known = [a._replace(token_id=one[3]), b._replace(token_id=two[2])]
    assert decoder.step(StepRows.of(known)).token_ids == [one[4], two[3]]
    again = decoder.begin(StepRows.of([a._replace(token_id=one[4]), b._replace(token_id=two[3])]))
    once_more = decoder.begin(StepRows.of([a._replace(token_id=unread(0)), b._replace(token_id=unread(1))]))
    decoder.finish(again)
    assert decoder.can_repeat
    last = decoder.repeat()
    decoder.finish(once_more)
    more = decoder.begin(StepRows.of([a._replace(token_id=unread(0)), b._replace(token_id=unread(1))]))
    assert decoder.finish(last).token_ids == [one[7], two[6]]
    decoder.finish(more)
    assert decoder.num_uploads == num_uploads, "the host names the tokens that the device holds"
    caches[0].num_tokens -= 1
    assert not decoder.can_repeat, "the device is one token ahead"
    caches[0].num_tokens += 1
    assert decoder.can_repeat
    model.caches.slots.owned[caches[0].slot] = caches[0].blocks[::-1]
    assert not decoder.can_repeat, "the device has another table"
    device.end()
