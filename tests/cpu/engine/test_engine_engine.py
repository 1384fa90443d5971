"""The engine's thread: what each request hears, whatever happens to the others."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, FakeModel, random_rule, script_rule

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine, EngineStopped
from ownpath.engine.places import EngineOverloaded
from ownpath.engine.request import FinishReason, Request, RequestError, SamplingParams, StepOutput
from ownpath.model.batch import ForwardBatch

VOCAB, NUM_TOKENS = 64, 60
WAIT_S = 20


class Asked:
    """A request and what it heard."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams) -> None:
        self.outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self.request = Request(prompt_ids, params, self.outputs.put)

    def all(self) -> list[StepOutput]:
        outputs = [self.outputs.get(timeout=WAIT_S)]
        while outputs[-1].finish_reason is None:
            outputs.append(self.outputs.get(timeout=WAIT_S))
        assert self.outputs.empty()
        return outputs

    def token_ids(self) -> list[int]:
        return [output.token.token_id for output in self.all() if output.token is not None]


@contextmanager
def running(model: FakeModel, max_num_queued: int = 256, **limits: int) -> Iterator[Engine]:
    config = EngineConfig(
        **({"max_model_len": model.max_model_len, "max_num_seqs": 4, "max_prefill_tokens": 8} | limits)
    )
    engine = Engine(model, config, NUM_TOKENS, max_num_queued)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
    assert model.caches.slots.faults() == []
    assert not model.caches.slots.owned, "every request gave its slot and blocks back, however it ended"


def random_model() -> FakeModel:
    return FakeModel(random_rule(VOCAB), VOCAB)


def expected_greedy(model: FakeModel, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """The definition: run the rule over the growing history, never beyond the tokenizer's vocabulary."""
    history = list(prompt_ids)
    for _ in range(num_tokens):
        history.append(int(model.rule(tuple(history))[:NUM_TOKENS].argmax()))
    return history[len(prompt_ids) :]


def test_greedy_decoding_follows_the_model() -> None:
    model = random_model()
    with running(model) as engine:
        asked = Asked([3, 4, 5], SamplingParams(10, temperature=0))
        engine.submit([asked.request])
        outputs = asked.all()
    assert [output.token.token_id for output in outputs if output.token] == expected_greedy(model, [3, 4, 5], 10)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert asked.request.cache is None, "a finished request gives its cache back"
    assert engine.num_open == 0


def test_what_is_submitted_together_starts_together() -> None:
    """An engine that waits for work wakes up to all of it, not to the first request alone."""
    model = random_model()
    with running(model) as engine:
        for _ in range(30):
            asked = [Asked([3], SamplingParams(1)) for _ in range(3)]
            engine.submit([one.request for one in asked])
            for one in asked:
                one.all()
    assert model.step_sizes == [[1, 1, 1]] * 30


def test_eos_ends_with_stop_and_is_reported() -> None:
    model = FakeModel(script_rule([7, 8], VOCAB, prompt_len=2), VOCAB)
    with running(model) as engine:
        asked = Asked([3, 4], SamplingParams(10, temperature=0))
        engine.submit([asked.request])
        outputs = asked.all()
    assert [output.token.token_id for output in outputs if output.token] == [7, 8, EOS_ID]
    assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("end_token_ids", "expected"), [({8}, [7, 8]), ({7, EOS_ID}, [7]), ({EOS_ID, 50}, [7, 8, EOS_ID])]
)
def test_any_end_token_ends_an_answer(end_token_ids: set[int], expected: list[int]) -> None:
    model = FakeModel(script_rule([7, 8], VOCAB, prompt_len=2), VOCAB)
    engine = Engine(model, EngineConfig(max_model_len=64), NUM_TOKENS, end_token_ids=end_token_ids)
    engine.start()
    try:
        asked = Asked([3, 4], SamplingParams(3, temperature=0))
        engine.submit([asked.request])
        outputs = asked.all()
    finally:
        engine.stop()
    assert [output.token.token_id for output in outputs if output.token] == expected
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_answers_do_not_depend_on_the_company() -> None:
    """Seeded sampling: alone, in a crowd, and with chunked prompts the tokens are the same."""
    prompts = [[3 + n] * (1 + 7 * n) for n in range(6)]
    params = [SamplingParams(12, temperature=1.0, top_p=0.9, seed=n) for n in range(6)]
    alone = []
    for prompt, param in zip(prompts, params, strict=True):
        with running(random_model(), max_prefill_tokens=100) as engine:
            asked = Asked(prompt, param)
            engine.submit([asked.request])
            alone.append(asked.token_ids())
    with running(random_model(), max_prefill_tokens=5) as engine:
        crowd = [Asked(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        engine.submit([asked.request for asked in crowd])
        assert [asked.token_ids() for asked in crowd] == alone


def test_steps_respect_the_limits_and_batch() -> None:
    model = random_model()
    with running(model, max_num_seqs=3, max_prefill_tokens=8) as engine:
        crowd = [Asked([5] * 20, SamplingParams(6, temperature=0)) for _ in range(7)]
        engine.submit([asked.request for asked in crowd])
        for asked in crowd:
            assert len(asked.token_ids()) == 6
    assert max(len(sizes) for sizes in model.step_sizes) == 3
    assert all(sum(sizes) <= 8 + 3 for sizes in model.step_sizes)


def test_padding_rows_of_the_embedding_are_never_tokens() -> None:
    """The model's favourite is a padding row; sampling and log-probabilities do not know it."""

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[NUM_TOKENS:] = 40.0
        return logits

    with running(FakeModel(rule, VOCAB)) as engine:
        greedy = Asked([3], SamplingParams(4, temperature=0))
        drawn = Asked([3], SamplingParams(40, temperature=2.0, seed=0, num_logprobs=20))
        engine.submit([greedy.request, drawn.request])
        outputs = drawn.all()
        assert all(token_id < NUM_TOKENS for token_id in greedy.token_ids())
    for output in outputs:
        assert output.token is not None
        assert output.token.token_id < NUM_TOKENS
        # Uniform over the tokens there are: log 60 is above 4, where float32 has steps of 2**-21; 4 of them.
        assert output.token.logprob == pytest.approx(-float(torch.tensor(NUM_TOKENS).log()), abs=4 * 2**-21)
        assert all(token_id < NUM_TOKENS for token_id, _ in output.token.top_logprobs)


@pytest.mark.parametrize("max_prefill_tokens", [1, 3, 100])
def test_prompt_scores_are_whole_whatever_the_chunks(max_prefill_tokens: int) -> None:
    model, prompt = random_model(), [3, 9, 4, 40, 41, 42, 7]
    with running(model, max_prefill_tokens=max_prefill_tokens) as engine:
        params = SamplingParams(2, temperature=0, num_logprobs=3, prompt_logprobs=3)
        asked = Asked(prompt, params)
        engine.submit([asked.request])
        outputs = [output for output in asked.all() if output.prompt]
    (scored,) = [output.prompt for output in outputs]
    assert [entry.token_id for entry in scored] == prompt
    assert scored[0].logprob is None
    for position in range(1, len(prompt)):
        logprobs = model.rule(tuple(prompt[:position]))[:NUM_TOKENS].log_softmax(-1)
        assert scored[position].logprob == float(logprobs[prompt[position]])
        assert scored[position].top_logprobs[0][0] == int(logprobs.argmax())
        assert len(scored[position].top_logprobs) == 3


@pytest.mark.parametrize("prompt_logprobs", [0, None])
def test_no_tokens_wanted_scores_the_prompt_only(prompt_logprobs: int | None) -> None:
    with running(random_model()) as engine:
        asked = Asked([3, 4, 5], SamplingParams(0, num_logprobs=0, prompt_logprobs=prompt_logprobs))
        engine.submit([asked.request])
        (output,) = asked.all()
    assert output.finish_reason is FinishReason.LENGTH
    assert output.token is None
    assert len(output.prompt) == (3 if prompt_logprobs is not None else 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_its_own_request_only(bad: float) -> None:
    good_rule = random_rule(VOCAB)

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        return torch.full((VOCAB,), bad) if history[0] == 50 and len(history) >= 5 else good_rule(history)

    model = FakeModel(rule, VOCAB)
    with running(model) as engine:
        sick = Asked([50, 3, 3], SamplingParams(10, temperature=1.0, seed=1))
        well = Asked([3, 4], SamplingParams(10, temperature=0))
        engine.submit([sick.request, well.request])
        outputs = sick.all()
        assert well.token_ids() == expected_greedy(model, [3, 4], 10)
        assert engine.is_alive
    assert [output.token is not None for output in outputs] == [True, True, False]
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert outputs[-1].error == "the model produced a logit that is not finite"


def test_a_prompt_score_that_is_not_finite_is_an_error_too() -> None:
    def rule(history: tuple[int, ...]) -> torch.Tensor:
        return torch.full((VOCAB,), float("nan") if len(history) == 2 else 0.0)

    with running(FakeModel(rule, VOCAB)) as engine:
        asked = Asked([3, 4, 5, 6], SamplingParams(0, num_logprobs=0, prompt_logprobs=0))
        engine.submit([asked.request])
        assert asked.all()[-1].finish_reason is FinishReason.ERROR


def test_a_forward_that_raises_fails_its_step_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Exploding(FakeModel):
        def forward(self, batch: ForwardBatch) -> torch.Tensor:
            if 50 in batch.token_ids_T.tolist():
                raise RuntimeError("a secret detail")
            return super().forward(batch)

    model = Exploding(random_rule(VOCAB, forbidden=(EOS_ID, 50)), VOCAB)
    with running(model) as engine:
        bad = Asked([50], SamplingParams(3))
        engine.submit([bad.request])
        (output,) = bad.all()
        assert output.finish_reason is FinishReason.ERROR
        assert "secret" not in str(output.error)
        assert "secret" in caplog.text, "the cause is in the log"
        good = Asked([4], SamplingParams(3, temperature=0))
        engine.submit([good.request])
        assert good.token_ids() == expected_greedy(model, [4], 3)
        assert engine.num_open == 0


def test_no_memory_for_a_cache_fails_that_request_only() -> None:
    class Tight(FakeModel):
        num_caches = 0

        def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
            self.num_caches += 1
            if self.num_caches == 2:
                raise torch.OutOfMemoryError("no")
            return super().new_cache(num_tokens)

    with running(Tight(random_rule(VOCAB), VOCAB)) as engine:
        crowd = [Asked([3], SamplingParams(5)) for _ in range(3)]
        engine.submit([asked.request for asked in crowd])
        reasons = [asked.all()[-1].finish_reason for asked in crowd]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]


def test_a_listener_that_fails_is_dropped() -> None:
    def sink(output: StepOutput) -> None:
        raise RuntimeError("gone")

    with running(random_model()) as engine:
        engine.submit([Request([3], SamplingParams(100), sink)])
        asked = Asked([3], SamplingParams(5))
        engine.submit([asked.request])
        assert len(asked.token_ids()) == 5
        assert engine.num_open == 0


class Gated(FakeModel):
    """Runs one step per permit."""

    def __init__(self) -> None:
        super().__init__(random_rule(VOCAB), VOCAB)
        self.permits = threading.Semaphore(0)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        assert self.permits.acquire(timeout=WAIT_S)
        return super().forward(batch)


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("index", [0, 1])
def test_an_aborted_request_frees_its_place_and_hears_nothing_more(index: int) -> None:
    """Index 0 is running, index 1 is waiting."""
    model = Gated()
    with running(model, max_num_seqs=1) as engine:
        both = [Asked([3], SamplingParams(50)), Asked([4], SamplingParams(2, temperature=0))]
        engine.submit([asked.request for asked in both])
        model.permits.release()
        both[0].outputs.get(timeout=WAIT_S)
        engine.abort(both[index].request)
        for _ in range(60):
            model.permits.release()
        both[1 - index].all()
        until(lambda: engine.num_open == 0)
        assert both[index].request.cache is None
        assert both[index].request not in engine._scheduler.running
        engine.abort(both[index].request)


def test_the_queue_is_bounded_and_submission_is_all_or_nothing() -> None:
    model = Gated()
    with running(model, max_num_seqs=2, max_num_queued=1) as engine:
        asked = [Asked([3], SamplingParams(1)) for _ in range(4)]
        with pytest.raises(EngineOverloaded):
            engine.submit([one.request for one in asked])
        assert engine.num_open == 0
        engine.submit([one.request for one in asked[:3]])
        with pytest.raises(EngineOverloaded, match="3 requests of this client are open"):
            engine.submit([asked[3].request])
        for _ in range(4):
            model.permits.release()
        for one in asked[:3]:
            one.all()
        engine.submit([asked[3].request])
        asked[3].all()


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "message"),
    [
        ([], 1, "no tokens"),
        ([3, NUM_TOKENS], 1, f"token id {NUM_TOKENS} is outside the vocabulary of {NUM_TOKENS}"),
        ([-1], 1, "token id -1"),
        ([3] * 250, 7, "250 prompt tokens and 7 tokens to generate exceed the maximum context of 256"),
    ],
)
def test_what_cannot_run_is_refused_with_the_numbers(prompt_ids: list[int], max_tokens: int, message: str) -> None:
    with running(random_model()) as engine:
        with pytest.raises(RequestError, match=message):
            engine.submit([Request(prompt_ids, SamplingParams(max_tokens), print)])
        assert engine.num_open == 0


def test_the_longest_request_that_fits_runs() -> None:
    with running(random_model()) as engine:
        asked = Asked([3] * 250, SamplingParams(6))
        engine.submit([asked.request])
        assert len(asked.token_ids()) == 6


def test_stopping_ends_open_requests_with_an_error() -> None:
    model = Gated()
    with running(model) as engine:
        asked = Asked([3], SamplingParams(50))
        engine.submit([asked.request])
        model.permits.release(3)
        for _ in range(2):
            asked.outputs.get(timeout=WAIT_S)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        until(lambda: not engine.is_alive)
        model.permits.release(2)
        stopper.join(WAIT_S)
        assert asked.all()[-1].error == "the engine has stopped"
        with pytest.raises(EngineStopped):
            engine.submit([Asked([3], SamplingParams(1)).request])


def test_an_engine_that_never_started_refuses() -> None:
    engine = Engine(random_model(), EngineConfig(max_model_len=256), NUM_TOKENS)
    assert not engine.is_alive
    with pytest.raises(EngineStopped):
        engine.submit([Asked([3], SamplingParams(1)).request])
    engine.stop()


@pytest.mark.parametrize("num_vocab", [0, VOCAB + 1])
def test_a_vocabulary_that_is_not_the_models_is_refused(num_vocab: int) -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Engine(random_model(), EngineConfig(), num_vocab)
