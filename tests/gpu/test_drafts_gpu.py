"""Steps with drafts as graphs: the answers without drafts, the bits of an eager step, and whole books.

A model of random weights. Its guesses are drawn with the target's noise, so that at a high temperature many are right
although nothing was trained.
"""

import queue
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernel_configs import plan_configs

from ownpath.bench.request import StepOptions
from ownpath.bench.step import make_model, step_config
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.inspect.memory import KINDS as DEVICES
from ownpath.kernels.dsl.cache import Config
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

MAX_ROWS, WAIT_S = 4, 60
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 2.0},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 2.0, "num_logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.3},
)


def small_config() -> ModelConfig:
    """Four layers of the published kind, and a module of drafts."""
    return replace(step_config("small", StepOptions(layers=4)), num_nextn_predict_layers=1)


def kernel_configs() -> Iterator[Config]:
    """Those of the small model, of both plans."""
    (caps,) = (caps for caps in DEVICES if caps.name == "sm_90")
    config = small_config()
    index = drawn_checkpoint(config, with_drafts=True)
    for is_invariant in (False, True):
        demands = Demands("bfloat16", is_invariant)
        yield from plan_configs(make_plan(config, index, caps, demands, loads_draft=True), index)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "batch-invariant"])
def engine_config(cuda: torch.device, request: pytest.FixtureRequest) -> EngineConfig:
    config = EngineConfig(str(cuda), torch.bfloat16, 768, MAX_ROWS, max_prefill_tokens=256)
    return replace(config, is_batch_invariant=request.param, loads_draft=True, rows_per_request=ROWS)


@pytest.fixture(scope="module")
def model(engine_config: EngineConfig) -> Model:
    return make_model(small_config(), engine_config, "nvidia", None).model


class Always(DraftPolicy):
    """Drafts in every step that may."""

    def drafts(self, num_requests: int) -> bool:
        return True


def captured(model: Model) -> DraftDecoder:
    decoder = DraftDecoder(model, MAX_ROWS, model.config.vocab_size)
    with torch.inference_mode():
        decoder.capture(lambda *_: None)
    return decoder


def plain(model: Model) -> Decoder:
    decoder = Decoder(model, MAX_ROWS, model.config.vocab_size)
    with torch.inference_mode():
        decoder.capture(lambda *_: None)
    return decoder


def answers(model: Model, config: EngineConfig, drafts: Drafts | None) -> tuple[list[list[int]], Engine]:
    """More requests than sequences, of many lengths and kinds, a third of whose answers pass a block's end."""
    engine = Engine(model, config, model.config.vocab_size, end_token_ids=(), decoder=plain(model), drafts=drafts)
    engine.start()
    rng, waiting = random.Random(7), []
    for n in range(12):
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        params = SamplingParams(rng.randrange(20, 90), seed=n, **KINDS[n % len(KINDS) if n > 5 else n % 4])
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.choice((3, 40, 230, 300)))]
        engine.submit([Request(prompt, params, heard.put)])
        waiting.append(heard)
    found = []
    for heard in waiting:
        ids: list[int] = []
        while True:
            output = heard.get(timeout=WAIT_S)
            assert output.error is None
            ids += [] if output.token is None else [output.token.token_id]
            if output.finish_reason is not None:
                assert output.finish_reason is FinishReason.LENGTH
                break
        found.append(ids)
    engine.stop()
    assert model.caches.slots.faults() == []
    assert not model.caches.slots.owned
    return found, engine


def test_answers_are_those_without_drafts(model: Model, engine_config: EngineConfig) -> None:
    """Token for token where a row has the same bits whatever its step's rows; else most, and all are whole."""
    expected, _ = answers(model, engine_config, None)
    found, engine = answers(model, engine_config, Drafts(model, captured(model), Always()))
    counts = engine.load().drafts
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    print(f"{counts}, {same} of {len(found)} answers are the same")
    assert counts.num_right > 0
    assert [*map(len, found)] == [*map(len, expected)]
    if engine_config.is_batch_invariant:
        assert found == expected


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

    graphs, eager = captured(model), DraftDecoder(model, MAX_ROWS, model.config.vocab_size)
    assert run(graphs) == run(eager)
    assert (graphs.num_replays, eager.num_replays) == (5, 0)
