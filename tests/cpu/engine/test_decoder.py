"""The decoder: rows that stay on the device from step to step, buckets and padding, beside the model's ``forward``."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.matchers import Every

from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.decoder import Decoder, make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.graphs import no_graph_of
from ownpath.engine.request import FinishReason, Request, SamplingParams, ScoredToken, StepOutput
from ownpath.engine.rows import GREEDY, PADDED, DecodeRow, HeldRows, ResidentRows, StepRows
from ownpath.engine.sampler import SampleRow, sampler_of, warm_up_sampler
from ownpath.kernels.checks import VECTOR_BYTES
from ownpath.kernels.sample.types import NextStep, Sampled, SampleKernel, SampleRows
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.trace import Ledger

VOCAB, MAX_ROWS = 96, 5
WAIT_S = 60


@pytest.fixture(scope="module")
def config(device: torch.device) -> EngineConfig:
    return EngineConfig(
        device=str(device), dtype=torch.float64, max_model_len=512, max_num_seqs=MAX_ROWS, max_prefill_tokens=64
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, config: EngineConfig) -> Model:
    folder = tmp_path_factory.mktemp("decoder")
    random_checkpoint(folder, "full-nvfp4", seed=21)
    return load_model(folder, config)


def answers(model: Model, config: EngineConfig, decoder: Decoder | None) -> list[list[int]]:
    """Greedy and drawn answers of more requests than rows, of many lengths, so that rows come and go."""
    engine = Engine(model, config, VOCAB, end_token_ids=(), decoder=decoder)
    engine.start()
    outputs: list[queue.SimpleQueue[StepOutput]] = []
    for idx in range(9):
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        params = SamplingParams(3 + 5 * idx % 17, temperature=0.0 if idx % 3 else 0.8, seed=idx)
        engine.submit([Request([1 + idx, *range(2, 3 + 11 * idx)], params, heard.put)])
        outputs.append(heard)
    found = [tokens_of(heard) for heard in outputs]
    engine.stop()
    return found


def tokens_of(heard: "queue.SimpleQueue[StepOutput]") -> list[int]:
    return [token.token_id for token in scored_tokens_of(heard)]


def test_answers_are_those_of_forward(model: Model, config: EngineConfig) -> None:
    assert answers(model, config, Decoder(model, MAX_ROWS, VOCAB)) == answers(model, config, None)


def test_adjusted_answers_are_those_of_forward(model: Model, config: EngineConfig) -> None:
    """Rows with penalties, bias, a minimum and masks come and go beside plain ones, whose steps carry on from the
    device."""
    kinds: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.6, "presence_penalty": 0.5},
        {},
        {"frequency_penalty": 2.0},
        {"logit_bias": ((7, 4.0), (VOCAB - 1, 3.0))},
        {"min_tokens": 4, "stop_token_ids": frozenset(range(40))},
    )
    bound = {2: Every(7, VOCAB), 5: Every(3, VOCAB), 6: Every(5, VOCAB)}

    def said(decoder: Decoder | None, together: bool) -> list[list[int]]:
        engine = Engine(model, config, VOCAB, end_token_ids=(), decoder=decoder)
        engine.start()
        found, waiting = [], []
        for n in range(8):
            heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
            params = SamplingParams(4 + n, temperature=0.9 * (n % 2), seed=n, **kinds[n % len(kinds)])
            engine.submit([Request([1 + n, *range(2, 3 + 5 * n)], params, heard.put, matcher=bound.get(n))])
            waiting.append(heard)
            if not together:
                found.append(tokens_of(heard))
        found = found or [tokens_of(heard) for heard in waiting]
        engine.stop()
        for n, every in bound.items():
            places = enumerate(found[n])
            assert all(token_id % every.number == place % every.number for place, token_id in places), "each is allowed"
        return found

    by_forward = said(None, together=True)
    assert said(Decoder(model, MAX_ROWS, VOCAB), together=True) == by_forward
    assert said(Decoder(model, MAX_ROWS, VOCAB), together=False) == by_forward


def test_an_adjusted_step_goes_on_from_its_own_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step uploads no rows and runs the adjusted token, not the one of the step's first draw."""
    told = Told(model)
    decoder = Decoder(told, MAX_ROWS, VOCAB)  # type: ignore[arg-type]
    rows, adjuster = started(model, (2, 9)), Adjuster(VOCAB, model.cache_spec.device, frozenset())
    request = Request([4], SamplingParams(9, temperature=0, logit_bias=((70, 100.0),)), lambda output: None)
    adjuster.add(request)
    plain = Request([4], SamplingParams(9, temperature=0), lambda output: None)
    uploads: list[int] = []
    stage = decoder._rows.stage
    monkeypatch.setattr(
        decoder._rows, "stage", lambda rows, turn: (uploads.append(rows.num_rows), stage(rows, turn))[1]
    )
    for _ in range(3):
        found = decoder.step(StepRows.of(rows), adjuster.rows_of([plain, request])).token_ids
        assert found[1] == 70 != found[0]
        rows = [DecodeRow(row.cache, token) for row, token in zip(rows, found, strict=True) if token is not None]
    assert uploads == [2]
    assert [tokens[1] for tokens, _ in told.steps] == [4, 70, 70]
    for row in rows:
        row.cache.release()


@dataclass
class Told:
    """A model that notes what each decode step was given."""

    inner: Model
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        self.steps.append((token_ids_T.tolist(), tables.positions_T.tolist()))
        return self.inner.decode(token_ids_T, tables)


def started(model: Model, lengths: Sequence[int], room: int | None = None) -> list[DecodeRow]:
    rows = []
    for count in lengths:
        cache = model.new_cache(room)
        model.forward(ForwardBatch.of([([3] * count, cache)], model.cache_spec.device))
        rows.append(DecodeRow(cache, 4))
    return rows


def test_the_next_step_of_the_same_rows_uploads_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model, MAX_ROWS, VOCAB)
    rows = started(model, (2, 9))
    uploads: list[int] = []
    stage = decoder._rows.stage
    monkeypatch.setattr(
        decoder._rows, "stage", lambda rows, turn: (uploads.append(rows.num_rows), stage(rows, turn))[1]
    )
    for _ in range(3):
        tokens = decoder.step(StepRows.of(rows)).token_ids
        rows = [DecodeRow(row.cache, token) for row, token in zip(rows, tokens, strict=True) if token is not None]
    assert uploads == [2]
    decoder.step(StepRows.of([DecodeRow(rows[0].cache, 7), rows[1]]))  # another token than the device chose
    decoder.step(StepRows.of(rows[1:]))  # the first row left
    assert uploads == [2, 2, 1]
    for row in rows:
        row.cache.release()


def test_what_a_row_draws_with_is_compared_where_it_draws(model: Model) -> None:
    """A greedy row reads neither seed nor count; one that draws goes on from the device's count alone."""
    (row,) = started(model, (5,))
    drawing = SampleRow(SamplingParams(9, temperature=0.5), seed=3, num_drawn=2)
    for sample, others in ((GREEDY, []), (drawing, [drawing._replace(seed=4), drawing._replace(num_drawn=2)])):
        held = resident(row._replace(sample=sample))
        going_on = HeldRows([row.cache], held)
        going_on.advance()
        going_on.token_ids = [8]
        after = going_on.rows()
        ahead = sample._replace(num_drawn=sample.num_drawn + 1)
        assert resident(DecodeRow(row.cache, 8, ahead), 6).continues(after)
        assert not resident(DecodeRow(row.cache, 7, ahead), 6).continues(after)
        assert not resident(DecodeRow(row.cache, 8, ahead), 5).continues(after)
        assert not held.continues(None)
        for other in others:
            assert not resident(DecodeRow(row.cache, 8, other), 6).continues(after)
    assert resident(row._replace(sample=GREEDY._replace(seed=9, num_drawn=7))).continues(resident(row))
    row.cache.release()


def resident(row: DecodeRow, position: int = 5) -> ResidentRows:
    return ResidentRows([row.cache.slot], [row.cache.blocks], [position], *StepRows.of([row])[1:])


def test_a_new_sequence_in_an_old_slot_brings_its_own_blocks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same slot, position and token as the row on the device, other blocks: a stale table reads nobody's memory."""
    decoder = Decoder(model, MAX_ROWS, VOCAB)
    (row,) = started(model, (6,))
    token = decoder.step(StepRows.of([row])).token_ids[0]
    assert token is not None
    old = row.cache.slot, row.cache.num_tokens, row.cache.blocks
    row.cache.release()
    free = model.caches.slots._free_blocks
    free.insert(0, free.pop())
    (other,) = started(model, (7,))
    assert (other.cache.slot, other.cache.num_tokens) == old[:2]
    assert other.cache.blocks != old[2]
    tables: list[list[int]] = []
    decode = model.decode
    monkeypatch.setattr(
        type(model), "decode", lambda _, ids, given: (tables.append(given.blocks_TB[0].tolist()), decode(ids, given))[1]
    )
    decoder.step(StepRows.of([DecodeRow(other.cache, token)]))
    assert tables == [list(other.cache.blocks)]
    other.cache.release()


def test_a_row_that_grows_has_its_new_block_before_it_writes_there(model: Model) -> None:
    """Across the end of a block: the tokens of a row that has room from the start, and its table on the device."""
    with torch.inference_mode():
        reserved, growing = (model.new_cache(count) for count in (None, 253))
        found = []
        for cache in (reserved, growing):
            model.forward(ForwardBatch.of([([3] * 253, cache)], model.cache_spec.device))
            decoder = Decoder(model, MAX_ROWS, VOCAB)
            tokens: list[int | None] = [4]
            for position in range(253, 260):
                if cache is growing:
                    cache.grow(position + 1)
                tokens.append(decoder.step(StepRows.of([DecodeRow(cache, tokens[-1] or 0)])).token_ids[0])
            found.append(tokens)
            assert decoder._rows.columns.blocks[0].tolist() == list(cache.blocks)
    assert found[0] == found[1]
    assert len(growing.blocks) == 2
    (full,) = started(model, (256,), 256)
    with torch.inference_mode(), pytest.raises(AssertionError, match="no room"):
        decoder.step(StepRows.of([full]))
    for cache in (reserved, growing, full.cache):
        cache.release()


def test_an_upload_leaves_what_its_rows_say(model: Model) -> None:
    """Rows come, go, move and change their parameters; nothing of an earlier upload stays."""
    decoder, caches = Decoder(model, MAX_ROWS, VOCAB), [model.new_cache() for _ in range(MAX_ROWS)]
    for cache in caches:
        cache.num_tokens = 7 * cache.slot
    for step, picked in enumerate([(0, 1, 2), (2, 0), (), (4,), (0, 1, 2, 3, 4), (4, 3, 2, 1), (4, 3, 2, 1)]):
        params = SamplingParams(9, temperature=0.25 * step, top_p=0.25 * (step % 4) + 0.1)
        rows = [DecodeRow(caches[n], 10 * step + n, SampleRow(params, 2**62 + n, step + n)) for n in picked]
        decoder.upload(StepRows.of(rows))
        columns, some = decoder._rows.columns, slice(len(rows))
        assert columns.tokens[some].tolist() == [10 * step + n for n in picked]
        assert columns.positions[some].tolist() == [7 * caches[n].slot for n in picked]
        assert columns.slots[some].tolist() == [caches[n].slot for n in picked]
        assert columns.seeds[some].tolist() == [2**62 + n for n in picked]
        assert columns.drawn[some].tolist() == [step + n for n in picked]
        assert columns.temperatures[some].tolist() == [0.25 * step] * len(rows)
        assert torch.equal(columns.top_p[some].cpu(), torch.tensor([params.top_p] * len(rows)))
        assert columns.blocks[some].tolist() == [list(caches[n].blocks) for n in picked]
        rest = slice(len(rows), None)
        assert set(columns.tokens[rest].tolist()) == {PADDED}
        for nothing in (columns.positions, columns.slots, columns.blocks, columns.temperatures):
            assert not nothing[rest].any()
    for cache in caches:
        cache.release()


def test_rows_up_to_the_bucket_are_padded(model: Model) -> None:
    told = Told(model)
    decoder = Decoder(told, 16, VOCAB)  # type: ignore[arg-type]
    rows = started(model, (1, 2, 3, 4, 5))
    decoder.buckets = (2, 8)
    decoder.step(StepRows.of(rows))
    tokens, positions = told.steps[0]
    assert tokens == [4] * 5 + [PADDED] * 3
    assert positions == [1, 2, 3, 4, 5, 0, 0, 0]
    decoder.step(StepRows.of([DecodeRow(row.cache, 4) for row in rows]))
    assert told.steps[1][1] == [2, 3, 4, 5, 6, 0, 0, 0]
    for row in rows:
        row.cache.release()


def test_torch_experts_and_twins_are_in_no_graph(model: Model) -> None:
    assert no_graph_of(model.ledger) == (
        "layers.0.ffn.experts runs on ref.nvfp4_moe, which waits for values on the host"
    )
    kept = {slot: names for slot, names in model.ledger.kernels.items() if "experts" not in slot}
    told = no_graph_of(Ledger(kept))
    assert told is not None
    assert "attn.decode." in told
    assert no_graph_of(Ledger({slot: names for slot, names in kept.items() if "decode" not in slot})) is None


def test_a_cpu_has_no_decoder(model: Model, config: EngineConfig) -> None:
    if torch.device(config.device).type == "cpu":
        assert make_decoder(model, config, VOCAB) is None


def test_a_logit_that_is_not_finite_is_told_for_its_row_alone(model: Model) -> None:
    @dataclass
    class Broken(Told):
        def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
            logits_TV = super().decode(token_ids_T, tables).clone()
            logits_TV[1, 5] = torch.nan
            return logits_TV

    rows = started(model, (4, 5, 6))
    chosen = Decoder(Broken(model), MAX_ROWS, VOCAB).step(StepRows.of(rows)).token_ids  # type: ignore[arg-type]
    assert [token is None for token in chosen] == [False, True, False]
    for row in rows:
        row.cache.release()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probs_come_with_the_tokens(
    model: Model, config: EngineConfig, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an answer are the same with and without the likeliest tokens, and by steps of ``forward``; no second
    pass over the logits computes them."""

    def scored(num_logprobs: int | None, decoder: Decoder | None) -> list[ScoredToken]:
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        engine = Engine(model, config, VOCAB, end_token_ids=(), decoder=decoder)
        engine.start()
        params = SamplingParams(12, temperature=temperature, seed=4, num_logprobs=num_logprobs)
        engine.submit([Request([5, 6, 7], params, heard.put)])
        found = scored_tokens_of(heard)
        engine.stop()
        return found

    decoder = Decoder(model, MAX_ROWS, VOCAB)
    with_tops, silent = scored(3, decoder), scored(None, decoder)
    monkeypatch.setattr("ownpath.engine.tops.start_tops", None)
    alone, by_forward = scored(0, decoder), scored(0, None)
    assert [one.logprob for one in silent] == [None] * 12
    for one, tops, plain, other in zip(alone, with_tops, silent, by_forward, strict=True):
        assert one.token_id == tops.token_id == plain.token_id == other.token_id
        assert one.top_logprobs == () != tops.top_logprobs
        assert one.logprob is not None
        assert one.logprob == tops.logprob
        # The same logits up to float64's rounding, in float32: one step below 8.
        assert other.logprob == pytest.approx(one.logprob, abs=2**-21)


def scored_tokens_of(heard: "queue.SimpleQueue[StepOutput]") -> list[ScoredToken]:
    found: list[ScoredToken] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        assert output.finish_reason is not FinishReason.ERROR, output.error
        found += [output.token] if output.token else []
        if output.finish_reason is not None:
            return found


def test_kernels_can_read_every_array(model: Model) -> None:
    """Whatever the number of rows: ``generate`` has one, and its arrays once began where no vector load may."""
    for max_rows in range(1, 14):
        decoder = Decoder(model, max_rows, model.config.vocab_size)
        tables, sampled = decoder._rows.tables(model.caches, 1), decoder._rows.sample_rows(1)
        arrays = [tables.positions_T, tables.slots_T, tables.blocks_TB, *sampled[:3], *sampled.filters[:3]]
        arrays += [decoder._rows.columns.tokens, *decoder._results.on_device]
        assert not any(array.data_ptr() % VECTOR_BYTES for array in arrays), max_rows


class Seen:
    """A sampler that notes what a compiled one compiles for: which parts a call has."""

    def __init__(self, sampler: SampleKernel[Any]) -> None:
        self.kinds: set[tuple[bool, ...]] = set()
        self._sampler = sampler

    def prepare(self) -> object:
        return self._sampler.prepare()

    def variant(self, logits_TV: torch.Tensor, rows: SampleRows, operand: object) -> str | None:
        return None

    def run(
        self,
        logits_TV: torch.Tensor,
        rows: SampleRows,
        operand: object,
        *,
        out: Sampled | None = None,
        following: NextStep | None = None,
    ) -> Sampled:
        assert out is not None
        parts = (*rows[3:], following)  # on a GPU all have log-probs
        self.kinds.add(tuple(part is not None for part in parts))
        return self._sampler.run(logits_TV, rows, operand, out=out, following=following)


def test_no_step_draws_in_a_way_that_was_not_warmed_up(
    model: Model, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler compiles once for each combination of parts that its calls have: a start makes all of them."""
    sampler, operand = sampler_of(torch.device("cpu"))
    seen = Seen(sampler)
    for place in ("sampler", "decoder"):
        monkeypatch.setattr(f"ownpath.engine.{place}.sampler_of", lambda device: (seen, operand))
    decoder = Decoder(model, MAX_ROWS, VOCAB)
    decoder.warm_up(lambda done, count, what: None)
    warm_up_sampler("cpu", VOCAB, VOCAB)
    ready = set(seen.kinds)
    engine, heard = Engine(model, config, VOCAB, end_token_ids=(), decoder=decoder), queue.SimpleQueue[StepOutput]()
    engine.start()
    kinds = (
        SamplingParams(6, temperature=0.0, num_logprobs=0),
        SamplingParams(9, temperature=0.9, top_p=0.8, num_logprobs=0),
        SamplingParams(7, num_logprobs=3, prompt_logprobs=3),
        SamplingParams(8, repetition_penalty=1.2, logit_bias=((7, 2.0),), min_tokens=3, num_logprobs=0),
    )
    for n, params in enumerate(kinds * 2):
        engine.submit([Request([5 + n] * 3, params, heard.put, matcher=Every(5, VOCAB) if n > 3 else None)])
    num_ended = 0
    while num_ended < 2 * len(kinds):
        output = heard.get(timeout=WAIT_S)
        assert output.finish_reason is not FinishReason.ERROR, output.error
        num_ended += output.finish_reason is not None
    engine.stop()
    assert any(kind[-1] and kind[4] for kind in seen.kinds), "no row was drawn again"
    assert seen.kinds == ready
