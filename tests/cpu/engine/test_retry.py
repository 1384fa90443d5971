"""Steps that fail and are run again one by one: the tokens and the caches of a run in which nothing failed.

The model is in float64: what may differ is the order of sums alone.
"""

from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, FakeModel, random_rule
from cpu.engine.test_engine_engine import VOCAB, Asked, expected_greedy, running
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.cache.layout import STATE, EntryKind, ring_row
from ownpath.cache.pools import SequenceCache
from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.engine import steps
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

MODEL_VOCAB = 96
TOLERANCE = 1e-9
"""As in ``test_incremental``."""
PROMPTS, NUM_TOKENS = (200, 5), 6
"""Past the sliding window and windows of both ratios."""
IN_PROMPT, IN_CHUNKS, DECODING, NO_LAYER = 1, 3, 6, 99
"""Steps: the first chunks; chunks that replace rows of the rings which they read; one row of each request."""
CONFIG = EngineConfig(dtype=torch.float64, max_model_len=512, max_num_seqs=3, max_prefill_tokens=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("retry")
    random_checkpoint(folder, "full-nvfp4", seed=31, **THREE_LAYERS)
    return load_model(folder, CONFIG)


class Failing:
    """A model whose step number ``at`` fails: in a layer, when those before it have written, or behind the last one."""

    def __init__(self, model: Model, at: int, layer_idx: int) -> None:
        self.inner, self.at, self.num_steps = model, at, 0
        self.config, self.caches, self.ledger, self.decodes = model.config, model.caches, model.ledger, model.decodes
        self.new_cache = model.new_cache
        blocks = [*model.blocks]
        if layer_idx < len(blocks):
            blocks[layer_idx] = _fail  # type: ignore[call-overload]
        self._broken = replace(model, blocks=tuple(blocks), head=model.head if layer_idx < len(blocks) else _fail)

    def _next(self) -> Model:
        self.num_steps += 1
        return self._broken if self.num_steps == self.at else self.inner

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self._next().forward(batch)

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        return self._next().decode(token_ids_T, tables)


def _fail(*_: object) -> NoReturn:
    raise RuntimeError("broken")


def held(cache: SequenceCache) -> list[torch.Tensor]:
    """Copies what a sequence's later rows may read: windows, states and entries of every layer."""
    pool, count, found = cache.pool, cache.num_tokens, []
    for layer_idx in pool.layout.layer_ids:
        window = cache.window(layer_idx)
        found.append(window[[p % len(window) for p in range(max(count - len(window), 0), count)]])
        found += [kept for part in EntryKind if (kept := cache.entries(layer_idx, part)) is not None]
    for member, tensor in pool.tensors.items():
        if member.group is STATE:
            last = range(max(count - member.num_rows, 0), count)
            found.append(tensor[[ring_row(cache.slot, p, member.num_rows) for p in last]])
    return [one.clone() for one in found]


class Run:
    """Runs requests of ``PROMPTS`` step by step. outputs: what each heard. caches: by request and number of tokens,
    what it held after a step."""

    def __init__(self, model: Model, at: int, layer_idx: int, with_decoder: bool) -> None:
        failing = Failing(model, at, layer_idx)
        decoder = Decoder(failing, len(PROMPTS), MODEL_VOCAB) if with_decoder else None
        self.engine = Engine(failing, CONFIG, MODEL_VOCAB, end_token_ids=(), decoder=decoder)
        self.outputs: list[list[StepOutput]] = [[] for _ in PROMPTS]
        self.caches: dict[tuple[int, int], list[torch.Tensor]] = {}
        params = SamplingParams(NUM_TOKENS, temperature=0, num_logprobs=0, prompt_logprobs=0)
        requests = [
            Request([(7 * n + 3 * i) % 90 for i in range(count)], params, self.outputs[n].append)
            for n, count in enumerate(PROMPTS)
        ]
        self.engine._open.update(requests)
        for request in requests:
            self.engine._add([request])
        while self.engine._open:
            self.engine._step_or_fail()
            for n, request in enumerate(requests):
                if request.cache is not None and request.num_computed == request.cache.num_tokens:
                    self.caches[n, request.num_computed] = held(request.cache)
        assert model.caches.slots.faults() == []
        assert not model.caches.slots.owned


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> dict[bool, Run]:
    """By whether a decoder runs decode steps."""
    return {with_decoder: Run(model, 0, 0, with_decoder) for with_decoder in (False, True)}


def told(outputs: list[StepOutput]) -> tuple[list[int], torch.Tensor]:
    """Returns the tokens of prompt and answer, and their log-probs."""
    tokens = [token for output in outputs for token in (*output.prompt, *([output.token] if output.token else []))]
    return [one.token_id for one in tokens], torch.tensor([one.logprob or 0.0 for one in tokens], dtype=torch.float64)


@pytest.mark.parametrize(
    ("at", "layer_idx", "with_decoder"),
    [
        (IN_PROMPT, 2, False),
        (IN_CHUNKS, 2, False),
        (IN_CHUNKS, NO_LAYER, False),
        (DECODING, 2, True),
        (DECODING, NO_LAYER, True),
    ],
)
def test_a_step_that_failed_leaves_what_one_run_does(
    model: Model, undisturbed: dict[bool, Run], at: int, layer_idx: int, with_decoder: bool
) -> None:
    clean, found = undisturbed[with_decoder], Run(model, at, layer_idx, with_decoder)
    assert found.engine.counts.num_step_retries > 1
    for expected, outputs in zip(clean.outputs, found.outputs, strict=True):
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        (ids, logprobs), (other_ids, other) = told(expected), told(outputs)
        assert other_ids == ids
        torch.testing.assert_close(other, logprobs, rtol=0, atol=TOLERANCE)
    common = clean.caches.keys() & found.caches.keys()
    assert {number for number, _ in common} == {0, 1}
    assert {PROMPTS[n] + NUM_TOKENS - 2 for n in range(2)} <= {count for _, count in common}, "up to the last steps"
    for place in common:
        for one, other_one in zip(clean.caches[place], found.caches[place], strict=True):
            torch.testing.assert_close(other_one, one, rtol=0, atol=TOLERANCE)


class Spoiled(FakeModel):
    """Fails whenever a token 50 is run, behind its forward or before."""

    def __init__(self, is_behind: bool) -> None:
        super().__init__(random_rule(VOCAB, forbidden=(EOS_ID, 50)), VOCAB)
        self.is_behind = is_behind

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        logits = super().forward(batch) if self.is_behind else None
        if 50 in batch.token_ids_T.tolist():
            raise RuntimeError("broken")
        return super().forward(batch) if logits is None else logits


@pytest.mark.parametrize("is_behind", [False, True])
def test_only_the_guilty_request_fails(is_behind: bool) -> None:
    """Beside others in its prompt and in their answers, which go on; its error tells nothing of the cause."""
    model = Spoiled(is_behind)
    with running(model, max_num_seqs=4, max_prefill_tokens=16) as engine:
        before = Asked([3] * 9, SamplingParams(60, temperature=0))
        engine.submit([before.request])
        before.outputs.get(timeout=20)
        guilty = Asked([7] * 5 + [50, 8], SamplingParams(5))
        others = [Asked([4 + n] * (5 + 20 * n), SamplingParams(12, temperature=0)) for n in range(2)]
        engine.submit([one.request for one in (others[0], guilty, others[1])])
        (output,) = guilty.all()
        assert output.error == "the step that this request was part of failed"
        assert output.finish_reason is FinishReason.ERROR
        for n, one in enumerate(others):
            assert one.token_ids() == expected_greedy(model, [4 + n] * (5 + 20 * n), 12)
        assert before.token_ids() == expected_greedy(model, [3] * 9, 60)[1:]
        assert engine.num_open == 0


def test_who_was_told_already_is_not_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of the second of three requests fails once, amid the reports of a step."""
    model = FakeModel(random_rule(VOCAB), VOCAB)
    failures = iter([True])
    name = steps.with_own

    def name_or_fail(*top: Any) -> object:
        is_amid = asked[0].request.num_tokens > asked[1].request.num_tokens
        if len(model.step_sizes) == 6 and is_amid and next(failures, False):
            raise RuntimeError("broken")
        return name(*top)

    monkeypatch.setattr(steps, "with_own", name_or_fail)
    asked = [Asked([3 + n], SamplingParams(20, temperature=0, num_logprobs=0)) for n in range(3)]
    with running(model) as engine:
        engine.submit([one.request for one in asked])
        found = [one.token_ids() for one in asked]
    assert found == [expected_greedy(model, [3 + n], 20) for n in range(3)]
    assert next(failures, None) is None, "it did fail"
