"""Index scores that are not finite: the request that they belong to is told, whatever kind of step finds them."""

import queue
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.attention.select import EntrySelector
from ownpath.cache.pools import SequenceCache
from ownpath.cache.tables import first_flagged
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, NonFinite, Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

VOCAB, MAX_ROWS, WAIT_S = 96, 5, 60
FIRST, SECOND = 1, 3
"""The CSA layers of the checkpoint; it selects 48 of its entries."""
BAD = [torch.nan, torch.inf]
MESSAGE = "the indexer of layer {} produced a score that is not finite"
Answer = tuple[list[int], StepOutput]
"""An answer's tokens and the report that ends it."""


@pytest.fixture(scope="module")
def config(device: torch.device) -> EngineConfig:
    return EngineConfig(
        device=str(device), dtype=torch.float64, max_model_len=512, max_num_seqs=MAX_ROWS, max_prefill_tokens=64
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, config: EngineConfig) -> Model:
    folder = tmp_path_factory.mktemp("flags")
    random_checkpoint(folder, "full-nvfp4", seed=22)
    return load_model(folder, config)


def poison(cache: SequenceCache, value: float, layer_idx: int = SECOND) -> None:
    """Spoils a sequence's first index key: its window is long past, so logits stay finite."""
    indexer = cache.pool.layers[layer_idx].indexer
    assert indexer is not None
    with torch.inference_mode():
        indexer.entries[cache.blocks[0] * 64] = value


def heal(model: Model) -> None:
    """Leaves no NaN in memory that a later test's sequence may take."""
    for layer_idx in (FIRST, SECOND):
        indexer = model.caches.layers[layer_idx].indexer
        assert indexer is not None
        indexer.entries.zero_()


def started(model: Model, lengths: Sequence[int]) -> list[DecodeRow]:
    rows = []
    for count in lengths:
        cache = model.new_cache()
        model.forward(ForwardBatch.of([([3] * count, cache)], model.cache_spec.device))
        rows.append(DecodeRow(cache, 4))
    return rows


@pytest.mark.parametrize("value", BAD)
def test_a_decode_step_flags_its_row_alone(model: Model, value: float) -> None:
    """In short rows, of which all entries are selected, and in long ones. The flag does not stay."""
    decoder = Decoder(model, MAX_ROWS, VOCAB)
    rows = started(model, (9, 230, 40))
    clean = decoder.step(StepRows.of(rows))
    assert clean.flagged == {}
    for row in rows:
        row.cache.num_tokens -= 1
    poison(rows[0].cache, value, SECOND)
    poison(rows[1].cache, value, SECOND)
    poison(rows[1].cache, value, FIRST)
    found = decoder.step(StepRows.of(rows))
    assert found.flagged == {0: SECOND, 1: FIRST}
    assert found.token_ids[2] == clean.token_ids[2]
    assert None not in found.token_ids, "the logits are finite: nothing else would tell"
    heal(model)
    assert decoder.step(StepRows.of(rows)).flagged == {}
    for row in rows:
        row.cache.release()


class _Watched:
    """A model whose steps are told to ``before`` first."""

    def __init__(self, model: Model, before: Callable[[ForwardBatch], None]) -> None:
        self._model, self._before = model, before

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self._before(batch)
        return self._model.forward(batch)


def answers(
    model: Model, config: EngineConfig, prompts: Sequence[int], spoiled: int | None, at_token: int, with_decoder: bool
) -> list[Answer]:
    """Greedy answers of 8 tokens to prompts of these lengths. The cache of one is spoiled before the first step that
    finds ``at_token`` tokens in it."""
    heard: list[queue.SimpleQueue[StepOutput]] = [queue.SimpleQueue() for _ in prompts]
    requests = [
        Request([5 + idx] * count, SamplingParams(8, temperature=0), heard[idx].put)
        for idx, count in enumerate(prompts)
    ]
    held: list[SequenceCache] = []

    def before(_: object = None) -> None:
        if spoiled is not None and not held and (cache := requests[spoiled].cache) and cache.num_tokens >= at_token:
            poison(cache, torch.nan)
            held.append(cache)

    decoder = Decoder(model, MAX_ROWS, VOCAB) if with_decoder else None
    if decoder is not None:
        begin = decoder.begin
        decoder.begin = lambda *rows: (before(), begin(*rows))[1]  # type: ignore[method-assign]
    watched: Model = _Watched(model, before)  # type: ignore[assignment]
    engine = Engine(watched, config, VOCAB, end_token_ids=(), decoder=decoder)
    engine.start()
    engine.submit(requests)
    found = [_answer(one) for one in heard]
    engine.stop()
    assert len(held) == (spoiled is not None)
    heal(model)
    assert not model.caches.slots.owned
    return found


def _answer(heard: "queue.SimpleQueue[StepOutput]") -> Answer:
    tokens: list[int] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        tokens += [output.token.token_id] if output.token else []
        if output.finish_reason is not None:
            return tokens, output


@pytest.mark.parametrize("with_decoder", [False, True])
@pytest.mark.parametrize(
    ("at_token", "num_told"),
    [(260, 5), (128, 0)],
    ids=["while it is answered", "in the middle of its prompt"],
)
def test_one_request_ends_with_an_error_and_the_others_go_on(
    model: Model, config: EngineConfig, with_decoder: bool, at_token: int, num_told: int
) -> None:
    """A prompt of 256 tokens is read in chunks of at most 64: the reference selects in it, the kernels after it."""
    prompts = (10, 256, 33)
    clean = answers(model, config, prompts, None, 0, with_decoder)
    found = answers(model, config, prompts, 1, at_token, with_decoder)
    assert [found[0], found[2]] == [clean[0], clean[2]]
    tokens, last = found[1]
    assert tokens == clean[1][0][:num_told]
    assert last == StepOutput(
        finish_reason=FinishReason.ERROR, error=MESSAGE.format(SECOND), non_finite=NonFinite.INDEX_SCORES
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_reference_flags_what_decides(value: float) -> None:
    """Only visible scores count, and only where there is something to choose."""
    selector, flags_T = EntrySelector(topk=2), torch.full((3,), 9, dtype=torch.int32)
    q_TIH, weights_TI = torch.ones(3, 1, 1), torch.ones(3, 1)
    keys_CH = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    visible_TC = torch.tensor([[True] * 4, [True] * 3 + [False], [False] * 4])
    selector.select(q_TIH, weights_TI, keys_CH, visible_TC, flags_T)
    assert flags_T.tolist() == [0, 0, 0]
    keys_CH[3] = abs(value)
    selector.select(q_TIH, weights_TI.copysign(torch.tensor(value)), keys_CH, visible_TC, flags_T)
    assert flags_T.tolist() == [1, 0, 0]
    flags_T.fill_(0)
    selector.select(q_TIH, weights_TI, keys_CH[2:], visible_TC[:, 2:], flags_T)
    assert flags_T.tolist() == [0, 0, 0], "all entries are attended to, whatever their scores"


def test_the_first_layer_is_told() -> None:
    flags_LT = np.zeros((5, 4), np.int32)
    assert first_flagged(flags_LT) == {}
    flags_LT[1, 2] = flags_LT[3, 2] = flags_LT[4, 0] = 1
    assert first_flagged(flags_LT) == {2: 1, 0: 4}
