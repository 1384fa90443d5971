"""Memory of requests: who waits for blocks, who gives them back, and that none is lost, whatever comes and goes."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.engine.test_engine_engine import NUM_TOKENS, VOCAB, Asked, expected_greedy, running, until
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.cache.layout import BLOCK_TOKENS, NAN_BYTE
from ownpath.config import EngineConfig
from ownpath.engine.batch import build_batch
from ownpath.engine.engine import Engine
from ownpath.engine.memory import RequestMemory
from ownpath.engine.request import FinishReason, Request, RequestError, SamplingParams, ScoredToken
from ownpath.engine.scheduler import ScheduledChunk, Scheduler
from ownpath.loading import load_model

MAX_MODEL_LEN = 4 * BLOCK_TOKENS


def make_request(num_prompt: int, max_tokens: int, client: str = "", priority: int = 0) -> Request:
    params = SamplingParams(max_tokens, temperature=0)
    return Request([3] * num_prompt, params, lambda output: None, client=client, priority=priority)


def give_back(request: Request) -> None:
    if request.cache is not None:
        request.cache.release()
    request.cache = None


class Play:
    """Scheduler and memory over real books; a step is played, and its tokens count up.

    stride: tokens that an answer gains in a step, as far as its blocks have room: as if others had stood still.
    """

    def __init__(self, max_num_seqs: int, num_blocks: int, max_prefill_tokens: int = 400, stride: int = 1) -> None:
        model = FakeModel(random_rule(VOCAB), VOCAB, MAX_MODEL_LEN, num_blocks)
        self.slots, self.memory = model.caches.slots, RequestMemory(model, give_back)
        self.scheduler = Scheduler(max_num_seqs, max_prefill_tokens, self.memory)
        self.open: list[Request] = []
        self.stride = stride

    def add(self, *requests: Request) -> None:
        self.scheduler.add(*requests)
        self.open += requests

    def remove(self, request: Request) -> None:
        assert self.scheduler.remove(request)
        self.open.remove(request)

    def step(self) -> list[Request]:
        """Runs a step; requests that have all their tokens end. Returns which ran."""
        chunks = self.scheduler.schedule()
        assert chunks or not self.open, "there is work, so a step does some"
        for request, num_tokens in chunks:
            assert request.num_computed == request.caches.num_tokens
            request.caches.num_tokens += num_tokens
            samples = num_tokens == request.num_pending
            request.num_computed += num_tokens
            if samples:
                self.draw(request)
            if len(request.output_ids) == request.params.max_tokens:
                self.remove(request)
        self.check()
        return [chunk.request for chunk in chunks]

    def draw(self, request: Request) -> None:
        ids, most = request.output_ids, request.params.max_tokens
        ids.append(len(ids))
        assert ids == list(range(len(ids))), "no token twice, none left out"
        more = max(min(self.stride - 1, request.room - request.num_computed - 1, most - len(ids)), 0)
        ids += range(len(ids), len(ids) + more)
        request.num_computed += more
        request.caches.num_tokens += more

    def check(self) -> None:
        """Books balance, and are those of the requests that run."""
        assert self.slots.faults() == []
        has_cache = [request for request in self.open if request.cache is not None]
        assert sorted(map(id, has_cache)) == sorted(map(id, self.scheduler.running))
        assert {request.caches.slot for request in has_cache} == {*self.slots.owned}
        for request in has_cache:
            assert request.num_computed <= request.room == BLOCK_TOKENS * len(request.caches.blocks)
        held = sum(len(request.caches.blocks) for request in has_cache)
        assert held == self.slots.num_blocks - self.slots.num_free_blocks


def test_what_does_not_fit_now_waits() -> None:
    """Blocks decide, although sequences are free; then the first in turn begins."""
    play = Play(max_num_seqs=4, num_blocks=4)
    first, second, third = make_request(700, 5), make_request(500, 5), make_request(10, 5)
    for request in (first, second, third):
        play.add(request)
    assert play.step() == [first]
    assert play.scheduler.num_waiting == 2, "the third, which would fit, does not overtake the second"
    while first in play.open:
        play.step()
    assert play.step() == [second, third]


def test_the_newest_gives_its_blocks_back() -> None:
    """Three grow; the one that began last is sent back for the first, and is the next to begin, before any other."""
    play = Play(max_num_seqs=4, num_blocks=5)
    first, second, third = (make_request(200, 300) for _ in range(3))
    for request in (first, second, third):
        play.add(request)
    for _ in range(2):
        play.step()
    waiting = make_request(2, 2)
    play.add(waiting)
    seen: list[int] = []
    while third in play.open:
        play.step()
        seen += [third.num_computed] if third in play.scheduler.running else [-1]
        assert waiting in play.open or third.num_computed > 0 or third not in play.open
    assert play.scheduler.num_preempted >= 1
    assert -1 in seen
    assert seen[0] > 0
    back = seen.index(-1)
    assert seen[seen.index(next(n for n in seen[back:] if n > 0), back)] > 1, "it reads its answer as a prompt"


def test_the_one_that_is_least_wanted_yields_first() -> None:
    """A higher priority number yields before a newer one."""
    play = Play(max_num_seqs=3, num_blocks=6)
    low, high, newest = make_request(250, 600, priority=5), make_request(250, 600), make_request(250, 600)
    for request in (low, high, newest):
        play.add(request)
        play.step()
    for _ in range(300):
        if not play.scheduler.num_preempted:
            play.step()
    assert play.scheduler.running == [high, newest]
    assert low.num_computed == 0


def test_a_lower_priority_number_begins_first() -> None:
    play = Play(max_num_seqs=2, num_blocks=8)
    running = make_request(10, 20), make_request(10, 30)
    play.add(running[0])
    play.add(running[1])
    play.step()
    later = [make_request(10, 5, priority=priority) for priority in (3, 0, -2, 0)]
    for request in later:
        play.add(request)
    began: list[Request] = []
    while play.open:
        began += [request for request in play.step() if request not in (*running, *began)]
    assert began == [later[2], later[1], later[3], later[0]]


def test_unread_prompts_of_a_lower_priority_number_come_first() -> None:
    play = Play(max_num_seqs=4, num_blocks=16, max_prefill_tokens=64)
    later, first = make_request(100, 5, priority=1), make_request(100, 5, priority=0)
    play.add(later)
    play.step()
    play.add(first)
    assert [(one.request, one.num_tokens) for one in play.scheduler.schedule()] == [(first, 64)]
    play.step()
    assert [(one.request, one.num_tokens) for one in play.scheduler.schedule()] == [(first, 36), (later, 28)]


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_client_with_one_request_does_not_wait_for_a_hundred(max_num_seqs: int) -> None:
    """It gets the next free sequence."""
    play = Play(max_num_seqs, num_blocks=64)
    many = [make_request(5, 10 + n % 7, client="many") for n in range(100)]
    for request in many:
        play.add(request)
    for _ in range(20):
        play.step()
    num_open = len(play.open)
    one = make_request(5, 3, client="one")
    play.add(one)
    while one in play.open:
        play.step()
    assert num_open - len(play.open) <= 2 + max_num_seqs, "one ended for it, and a few beside it"


def test_clients_take_turns() -> None:
    """Two clients with a queue each get half of the sequences, whoever came first; a third one's come next."""
    play = Play(max_num_seqs=4, num_blocks=64)
    for client in ("a", "b"):
        for _ in range(20):
            play.add(make_request(5, 20, client=client))
    for _ in range(110):
        play.step()
    shares = Counter(request.client for request in play.scheduler.running)
    assert shares == {"a": 2, "b": 2}


def test_a_client_of_many_prompts_leaves_tokens_to_another() -> None:
    play = Play(max_num_seqs=8, num_blocks=64, max_prefill_tokens=100)
    for _ in range(5):
        play.add(make_request(300, 5, client="many"))
    one = make_request(300, 5, client="one")
    play.add(one)
    tokens = {chunk.request: chunk.num_tokens for chunk in play.scheduler.schedule()}
    assert tokens[one] == 50
    assert sum(tokens.values()) == 100


def test_a_thousand_aborts_and_preemptions_lose_nothing() -> None:
    """Random lengths, priorities and clients, for as long as it takes."""
    chance, play = random.Random(7), Play(max_num_seqs=8, num_blocks=8, max_prefill_tokens=4000, stride=256)
    num_aborted = 0
    while num_aborted < 1000 or play.scheduler.num_preempted < 1000:
        assert num_aborted < 5000
        while len(play.open) < 24:
            few = chance.randint(1, 3)
            client, priority = chance.choice("abc"), chance.choice((0, 0, 1))
            play.add(
                *(make_request(chance.randint(1, 70), chance.randint(700, 950), client, priority) for _ in range(few))
            )
        for _ in range(3):
            play.step()
        for request in chance.sample(play.open, min(1, len(play.open))):
            play.remove(request)
            num_aborted += 1
            play.check()
    while play.open:
        play.step()
    assert (play.slots.num_free_blocks, play.slots.num_free_slots) == (8, 16)
    assert not play.scheduler.has_work


class Requests(RuleBasedStateMachine):
    """Any order of arrivals, steps and aborts."""

    def __init__(self) -> None:
        super().__init__()
        self.play = Play(max_num_seqs=4, num_blocks=6, max_prefill_tokens=300)

    @rule(
        sizes=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 400)), min_size=1, max_size=3),
        client=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
    )
    def submit(self, sizes: Sequence[tuple[int, int]], client: str, priority: int) -> None:
        self.play.add(*(make_request(prompt, answer, client, priority) for prompt, answer in sizes))

    @rule(count=st.integers(1, 120))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.play.step()

    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick: random.Random) -> None:
        if self.play.open:
            self.play.remove(pick.choice(self.play.open))

    @invariant()
    def balance(self) -> None:
        self.play.check()

    def teardown(self) -> None:
        while self.play.open:
            self.play.step()
        assert self.play.slots.num_free_blocks == self.play.slots.num_blocks


RequestsTest = Requests.TestCase
RequestsTest.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


def engine_model(num_blocks: int) -> FakeModel:
    return FakeModel(random_rule(VOCAB), VOCAB, MAX_MODEL_LEN, num_blocks)


@pytest.mark.parametrize(
    "kind",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.7, "seed": 6, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"temperature": 0.0, "min_tokens": 25, "num_logprobs": 2, "prompt_logprobs": 0},
    ],
    ids=["greedy", "drawn", "penalties", "log-probs"],
)
def test_a_preempted_request_answers_as_if_nothing_had_been(kind: dict[str, float]) -> None:
    """It needs a second block after 14 tokens, when an older request has the last one. Each token is told once, and
    everything is what it is where memory never ends."""
    found = []
    for num_blocks, num_preempted in ((16, 0), (4, 1)):
        with running(engine_model(num_blocks), max_prefill_tokens=300, max_model_len=MAX_MODEL_LEN) as engine:
            asked = Asked([3] * 500, SamplingParams(40)), Asked([4, 5] * 120, SamplingParams(30, **kind))  # type: ignore[arg-type]
            engine.submit([asked[0].request])
            engine.submit([asked[1].request])
            found.append(asked[1].all())
            assert len(asked[0].token_ids()) == 40
            assert engine.load().counts.num_preempted == num_preempted
    free, tight = found
    assert tight == free
    assert sum(output.token is not None for output in tight) == 30
    assert [len(output.prompt) for output in tight if output.prompt] == ([240] if "prompt_logprobs" in kind else [])


@settings(max_examples=30, deadline=None)
@given(num_prompt=st.integers(1, 40), num_scored=st.integers(0, 39), sizes=st.lists(st.integers(1, 9), min_size=40))
def test_a_prompt_that_is_read_again_is_not_scored_again(num_prompt: int, num_scored: int, sizes: list[int]) -> None:
    """Whatever its chunks, the rows of all together score what is missing, each from the token before it."""
    model, ids = engine_model(4), list(range(10, 10 + num_prompt))
    request = Request(ids, SamplingParams(2, prompt_logprobs=0), lambda output: None)
    num_scored = min(num_scored, num_prompt - 1)
    request.scored_prompt += [ScoredToken(token_id, 0.0) for token_id in ids[1 : 1 + num_scored]]
    request.cache = model.new_cache()
    scored: list[int] = []
    for size in sizes:
        if request.num_computed == num_prompt:
            break
        chunk = ScheduledChunk(request, min(size, request.num_pending))
        batch, (share,) = build_batch([chunk], "cpu")
        rows = batch.logits_ids[share.start : share.start + len(share.scored_ids)]
        assert [token_id + 1 for token_id in batch.token_ids_T[rows].tolist()] == list(share.scored_ids)
        request.scored_prompt += [ScoredToken(token_id, 0.0) for token_id in share.scored_ids]
        scored += share.scored_ids
        request.num_computed += chunk.num_tokens
        request.caches.num_tokens += chunk.num_tokens
    assert scored == ids[1 + num_scored :]


def test_a_request_that_never_fits_is_refused_with_the_numbers() -> None:
    model = engine_model(2)
    with running(model, max_model_len=MAX_MODEL_LEN) as engine:
        text = "500 prompt tokens and 13 tokens to generate need 3 blocks of 256 tokens; the caches have 2"
        with pytest.raises(RequestError, match=text):
            engine.submit([Asked([3] * 500, SamplingParams(13)).request])
        fits = Asked([3] * 500, SamplingParams(12, temperature=0))
        engine.submit([fits.request])
        assert fits.token_ids() == expected_greedy(model, [3] * 500, 12)


def test_memory_that_somebody_else_holds_ends_a_request_with_an_error() -> None:
    """It waits while others run, for they may give blocks back; then nobody will."""
    model = engine_model(3)
    with running(model, max_model_len=MAX_MODEL_LEN) as engine:
        held = model.caches.new_sequence(1)
        small, large = Asked([3], SamplingParams(5)), Asked([3] * 513, SamplingParams(5))
        engine.submit([small.request])
        engine.submit([large.request])
        assert small.all()[-1].finish_reason is FinishReason.LENGTH
        (output,) = large.all()
        assert output.finish_reason is FinishReason.ERROR
        assert output.error == "there is no memory for this request"
        held.release()


def test_the_load_tells_blocks_and_slots() -> None:
    model = engine_model(7)
    engine = Engine(model, EngineConfig(max_model_len=MAX_MODEL_LEN), NUM_TOKENS)
    held = model.caches.new_sequence(300)
    load = engine.load()
    assert (load.blocks.used, load.blocks.total, load.slots.used, load.slots.total) == (2, 7, 1, 16)
    held.release()
    assert engine.load().blocks.used == 0


def test_a_thousand_requests_whose_clients_leave_lose_nothing() -> None:
    """Aborted while they wait, read, answer or wait again, from another thread; the rest answer as if alone."""
    chance, model = random.Random(11), engine_model(6)
    with running(model, max_num_seqs=8, max_prefill_tokens=600, max_model_len=MAX_MODEL_LEN) as engine:
        stay = [Asked([4 + n] * 250, SamplingParams(12, temperature=0)) for n in range(4)]
        for wave in range(20):
            leave = [Asked([3] * chance.choice((1, 5, 250)), SamplingParams(300)) for _ in range(50)]
            for one in leave:
                engine.submit([one.request])
            if wave % 5 == 0:
                engine.submit([stay[wave // 5].request])
            chance.shuffle(leave)
            for one in leave:
                if chance.random() < 0.1:
                    time.sleep(0.002)
                engine.abort(one.request)
        for n, one in enumerate(stay):
            assert one.token_ids() == expected_greedy(model, [4 + n] * 250, 12)
        until(lambda: engine.num_open == 0)
        assert engine.load().blocks.used == 0


def test_the_real_model_with_few_blocks_answers_as_with_many(tmp_path: Path) -> None:
    """In float64, greedy and drawn: requests come, are sent back, are aborted, and fill blocks that others had."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=41, **THREE_LAYERS)
    found, num_preempted = [], []
    for num_blocks in (None, 3):
        config = EngineConfig(dtype=torch.float64, max_model_len=512, max_num_seqs=4, max_prefill_tokens=256)
        config = replace(config, num_cache_blocks=num_blocks)
        model = load_model(tmp_path, config)
        for tensor in model.caches.tensors.values():
            tensor.view(torch.uint8).fill_(NAN_BYTE)
        engine = Engine(model, config, 96, end_token_ids=())
        asked = [
            Asked([(5 * n + 3 * i) % 90 for i in range(249 + n)], SamplingParams(9, temperature=n % 2, seed=n))
            for n in range(3)
        ]
        gone = Asked([7] * 252, SamplingParams(100))
        engine._open.update(one.request for one in (*asked, gone))
        for one in (asked[0], asked[1], gone, asked[2]):
            engine._add([one.request])
        for step in range(100):
            if step == 6:
                engine._close(gone.request)
            if engine._open:
                engine._step_or_fail()
            assert model.caches.slots.faults() == []
        found.append([one.token_ids() for one in asked])
        num_preempted.append(engine.counts.num_preempted)
        assert not model.caches.slots.owned
    assert num_preempted[0] == 0
    assert num_preempted[1] > 0
    assert found[0] == found[1]
