"""Steps with drafts as graphs: the answers without drafts, the bits of an eager step, and whole books.

A model of the embedded one's sizes and random weights, whose kernels other tests compile too. Its guesses are drawn
with the target's noise, so that at a high temperature some are right although nothing was trained.
"""

import queue
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernel_configs import plan_configs

from ownpath.bench.step import make_model
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.graphs import StepGraphs
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.inspect.memory import KINDS as DEVICES
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

EXPORT, WAIT_S, BUCKETS = "full", 30, (1, 4)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 2.0},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 2.0, "num_logprobs": 2},
)


def drafting_config() -> ModelConfig:
    """The embedded model's, with one module of drafts."""
    return replace(ModelConfig.from_file(default_model_dir() / "config.json"), num_nextn_predict_layers=1)


def kernel_configs() -> Iterator[Config]:
    """Those of the model, by an invariant plan."""
    (caps,) = (caps for caps in DEVICES if caps.name == "sm_90")
    config = drafting_config()
    index = drawn_checkpoint(config, EXPORT, with_drafts=True)
    plan = make_plan(config, index, caps, Demands("bfloat16", is_batch_invariant=True), loads_draft=True)
    yield from plan_configs(plan, index)


@pytest.fixture(scope="module")
def engine_config(cuda: torch.device) -> EngineConfig:
    config = EngineConfig(str(cuda), torch.bfloat16, 512, BUCKETS[-1], max_prefill_tokens=1024)
    return replace(config, is_batch_invariant=True, loads_draft=True, rows_per_request=ROWS)


@pytest.fixture(scope="module")
def model(engine_config: EngineConfig) -> Model:
    return make_model(drafting_config(), engine_config, EXPORT, None).model


class Always(DraftPolicy):
    """Drafts in every step that may."""

    def drafts(self, num_requests: int) -> bool:
        return True


def captured(decoder: StepGraphs) -> None:
    decoder.buckets = BUCKETS
    with torch.inference_mode():
        decoder.capture(lambda *_: None)


def wanted(num_vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Several lengths and kinds; some answers pass a block's end. Every prompt is too long for a graph, so that one
    ``forward`` reads it, whoever answers beside it."""
    rng = random.Random(7)
    return [
        (
            [rng.randrange(num_vocab) for _ in range((70, 90, 240, 130)[n // 2])],
            SamplingParams(rng.randrange(20, 50), seed=n, **KINDS[n % len(KINDS)]),
        )
        for n in range(8)
    ]


def said(heard: "queue.SimpleQueue[StepOutput]") -> list[int]:
    ids: list[int] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        assert output.error is None
        ids += [] if output.token is None else [output.token.token_id]
        if output.finish_reason is not None:
            assert output.finish_reason is FinishReason.LENGTH
            return ids


def answers(engine: Engine, size: int, asked: list[tuple[list[int], SamplingParams]] | None = None) -> list[list[int]]:
    """Answers so many requests at a time, more than may run if all are."""
    found, asked = [], asked or wanted(engine.num_vocab)
    engine.start()
    for start in range(0, len(asked), size):
        waiting = []
        for ids, params in asked[start : start + size]:
            waiting.append(queue.SimpleQueue[StepOutput]())
            engine.submit([Request(ids, params, waiting[-1].put)])
        found += [said(heard) for heard in waiting]
    engine.stop()
    return found


def test_answers_are_those_without_drafts(model: Model, engine_config: EngineConfig) -> None:
    """Token for token those of one request after the other: a row has the same bits whatever its step's rows."""
    num_vocab = model.config.vocab_size
    plain, drafting = Decoder(model, BUCKETS[-1], num_vocab), DraftDecoder(model, BUCKETS[-1], num_vocab)
    captured(plain)
    captured(drafting)
    run = model, engine_config, num_vocab
    expected = answers(Engine(*run, end_token_ids=(), decoder=plain), 1)
    for size in (1, 8):
        drafts = Drafts(model, drafting, Always())
        engine = Engine(*run, end_token_ids=(), decoder=plain, drafts=drafts)
        found, counts = answers(engine, size), engine.load().drafts
        print(counts)
        assert counts.num_steps > 20
        assert found == expected
        assert model.caches.slots.faults() == []
        assert not model.caches.slots.owned


def test_short_prompts_are_read_two_tokens_a_step(model: Model, engine_config: EngineConfig) -> None:
    """Of every length that plain graphs read a token a step: the same answers, and guesses from the first step on."""
    num_vocab = model.config.vocab_size
    plain, drafting = Decoder(model, BUCKETS[-1], num_vocab), DraftDecoder(model, BUCKETS[-1], num_vocab)
    captured(plain)
    captured(drafting)
    rng, run = random.Random(3), (model, engine_config, num_vocab)
    asked = [
        ([rng.randrange(num_vocab) for _ in range(length)], SamplingParams(12, seed=length, temperature=1.5))
        for length in (1, 2, 3, 4, 7, 12, 16)
    ]
    expected = answers(Engine(*run, end_token_ids=(), decoder=plain), 1, asked)
    engine = Engine(*run, end_token_ids=(), decoder=plain, drafts=Drafts(model, drafting, Always()))
    assert answers(engine, 1, asked) == expected
    counts = engine.load().drafts
    assert counts.num_steps >= sum(len(ids) // 2 for ids, _ in asked) + 6 * len(asked)
    assert model.caches.slots.faults() == []


@torch.inference_mode()
def test_a_graph_has_the_bits_of_an_eager_step(model: Model) -> None:
    """Three requests in a bucket of four, from other lengths; five steps, of which four go on by themselves. The module
    has read the prompts too: what its window holds of nobody's rows is another thing in each run."""

    def run(decoder: DraftDecoder) -> list[Any]:
        rows = []
        for count in (3, 130, 259):
            cache = model.new_cache()
            batch = ForwardBatch.of([(list(range(5, 5 + count)), cache)], model.cache_spec.device)
            _, hidden = model.forward_drafting(batch)
            model.draft_forward(hidden, batch.token_ids_T + 1, batch, batch.logits_ids)
            rows.append(DecodeRow(cache, 5 + count))
        begun, found = decoder.begin(StepRows.of(rows), [7, 8, 9]), []
        for _ in range(4):
            following = decoder.repeat(begun)
            found.append(decoder.finish(begun))
            begun = following
        found.append(decoder.finish(begun))
        decoder.forget()
        positions = [row.cache.num_tokens for row in rows]
        for row in rows:
            row.cache.release()
        return [*found, positions]

    graphs, eager = (DraftDecoder(model, BUCKETS[-1], model.config.vocab_size) for _ in range(2))
    captured(graphs)
    eager.buckets = BUCKETS
    assert run(graphs) == run(eager)
    assert (graphs.num_replays, eager.num_replays) == (5, 0)
