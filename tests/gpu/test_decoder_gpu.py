"""Captured decode steps on a device: the bits of eager ones, the same kernels, and nobody else's memory."""

import queue
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
import triton
from support.kernel_configs import model_configs
from support.matchers import Every

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import CachePool
from ownpath.config import CSA_RATIO, EngineConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.decoder import Decoder, make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason, Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.engine.sampler import SampleRow, choose_tokens, sample_row, warm_up_sampler
from ownpath.kernels.dsl import cache
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.registry import SPECS
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ops import OpKind
from ownpath.startup import warm_up
from ownpath.trace.launches import record_launches

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

MAX_ROWS = 8
PROMPTS = (3, 130, 259, 511, 70)
NUM_STEPS = 12


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module", params=[False, True], ids=["default", "batch-invariant"])
def model(cuda: torch.device, request: pytest.FixtureRequest) -> Model:
    engine = EngineConfig(
        str(cuda), torch.bfloat16, max_model_len=1024, max_num_seqs=2 * MAX_ROWS, is_batch_invariant=request.param
    )
    return load_model(default_model_dir(), engine)


def captured(model: Model) -> Decoder:
    decoder = Decoder(model, MAX_ROWS, model.config.vocab_size)
    with torch.inference_mode():
        decoder.capture(lambda *_: None)
    return decoder


def eager(model: Model) -> Decoder:
    return Decoder(model, MAX_ROWS, model.config.vocab_size)


def started(model: Model, lengths: Sequence[int]) -> list[DecodeRow]:
    rows = []
    for count in lengths:
        cache = model.new_cache()
        model.forward(ForwardBatch.of([(list(range(5, 5 + count)), cache)], model.cache_spec.device))
        rows.append(DecodeRow(cache, 9))
    return rows


@torch.inference_mode()
def decode(decoder: Decoder, rows: list[DecodeRow]) -> list[torch.Tensor]:
    """The logits of greedy steps; gives the rows' caches back."""
    logits = []
    for _ in range(NUM_STEPS):
        found = decoder.step(StepRows.of(rows))
        logits.append(found.logits_TV.clone())
        assert None not in found.token_ids
        rows = [DecodeRow(row.cache, token or 0) for row, token in zip(rows, found.token_ids, strict=True)]
    for row in rows:
        row.cache.release()
    return logits


@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_a_graph_has_the_bits_of_an_eager_step(model: Model, num_rows: int) -> None:
    graphs = captured(model)
    found = decode(graphs, started(model, PROMPTS[:num_rows]))
    expected = decode(eager(model), started(model, PROMPTS[:num_rows]))
    assert graphs.num_replays == NUM_STEPS
    for at, pair in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(*pair), f"step {at}"


def test_graphs_serve_other_rows_than_they_were_captured_with(model: Model) -> None:
    """One graph, other slots, blocks and lengths every time."""
    graphs = captured(model)
    for lengths in ((3, 130), (257, 4), (511, 512)):
        found = decode(graphs, started(model, lengths))
        expected = decode(eager(model), started(model, lengths))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), lengths


def test_a_step_close_to_the_reference(model: Model) -> None:
    """The line of kernels beside torch's attention over the same caches: their roundings, no more."""
    rows = started(model, PROMPTS)
    found = eager(model).step(StepRows.of(rows)).logits_TV
    for row in rows:
        row.cache.release()
    expected = []
    for count in PROMPTS:
        cache = model.new_cache()
        batch = ForwardBatch.of([([*range(5, 5 + count), 9], cache)], model.cache_spec.device)
        expected.append(model.forward(batch)[0])
        cache.release()
    wanted = torch.stack(expected)
    # Two orders of BF16 roundings through four layers; a wrong key or angle moves logits by several tenths.
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() < 0.05, errors.tolist()


def test_memory_that_a_row_does_not_own_is_never_read(model: Model) -> None:
    expected = decode(eager(model), started(model, PROMPTS))
    pool: CachePool = model.caches
    for tensor in pool.tensors.values():
        tensor.fill_(torch.nan)
    found = decode(captured(model), started(model, PROMPTS))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_padded_rows_and_neighbours_change_no_bit_of_an_invariant_plan(model: Model) -> None:
    if not _is_invariant(model):
        pytest.skip("an ordinary plan may sum in another order")
    together = decode(captured(model), started(model, PROMPTS))
    for row, count in enumerate(PROMPTS):
        alone = decode(captured(model), started(model, (count,)))
        assert all(torch.equal(one[0], all_rows[row]) for one, all_rows in zip(alone, together, strict=True)), count


def _is_invariant(model: Model) -> bool:
    return any(kernel.endswith("_invariant") for _, kernel in model.ledger.kernels.values())


def test_index_scores_that_are_not_finite_are_told_of_their_row(model: Model) -> None:
    """By a graph and eagerly, in steps with padded rows; the tokens of the other rows stay as they are."""
    layer_idx = model.config.compress_ratios.index(CSA_RATIO)
    indexer = model.caches.layers[layer_idx].indexer
    assert indexer is not None
    for decoder in (captured(model), eager(model)):
        rows = started(model, PROMPTS)
        clean = decoder.step(StepRows.of(rows))
        assert clean.flagged == {}
        for row in rows:
            row.cache.num_tokens -= 1  # the same step once more
        indexer.entries[rows[3].cache.blocks[0] * BLOCK_TOKENS // CSA_RATIO] = torch.nan
        found = decoder.step(StepRows.of(rows))
        assert found.flagged == {3: layer_idx}
        others = [0, 1, 2, 4]
        assert [found.token_ids[n] for n in others] == [clean.token_ids[n] for n in others]
        for row in rows:
            row.cache.release()


def test_log_probs_are_those_of_the_logits(model: Model) -> None:
    for decoder in (captured(model), eager(model)):
        rows = started(model, PROMPTS)
        params = SamplingParams(9, temperature=0.8, top_p=0.7)
        drawn = [row._replace(sample=SampleRow(params, seed=n, num_drawn=0)) for n, row in enumerate(rows)]
        found = decoder.step(StepRows.of(drawn))
        exact_TV = found.logits_TV.double().log_softmax(-1)
        for n, token_id in enumerate(found.token_ids):
            assert token_id is not None
            # As in the sampler's own tests: a difference of logits below 64 in float32, and a sum over the vocabulary.
            assert abs(float(found.logprobs_T[n]) - float(exact_TV[n, token_id])) < 64 * 2**-20
        for row in rows:
            row.cache.release()


def test_adjusted_rows_are_drawn_as_the_twin_draws_them(model: Model) -> None:
    """Behind a graph and behind an eager step, over several steps: the twin's tokens from the step's own logits."""
    kinds = (
        {"repetition_penalty": 1.7},
        {},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": ((7, 3.0), (9, -100.0))},
        {"min_tokens": 4},
    )
    num_vocab, device = model.config.vocab_size, model.cache_spec.device
    for decoder in (captured(model), eager(model)):
        rows = started(model, PROMPTS)
        params = [SamplingParams(9, 0.9, seed=n, top_p=0.9, **kind) for n, kind in enumerate(kinds)]  # type: ignore[arg-type]
        requests = [Request([9, n], one, lambda output: None) for n, one in enumerate(params)]
        adjusters = [Adjuster(num_vocab, place, frozenset({5})) for place in (device, torch.device("cpu"))]
        for request in requests:
            for adjuster in adjusters:
                adjuster.add(request)
        for _ in range(NUM_STEPS):
            samples = [sample_row(request) for request in requests]
            rows = [row._replace(sample=sample) for row, sample in zip(rows, samples, strict=True)]
            on_device, on_host = (adjuster.rows_of(requests) for adjuster in adjusters)
            with torch.inference_mode():
                found = decoder.step(StepRows.of(rows), on_device)
            assert found.token_ids == choose_tokens(found.logits_TV.float().cpu(), samples, on_host).token_ids
            for request, token_id in zip(requests, found.token_ids, strict=True):
                assert token_id is not None
                request.output_ids.append(token_id)
            rows = [DecodeRow(row.cache, one.output_ids[-1]) for row, one in zip(rows, requests, strict=True)]
        for row in rows:
            row.cache.release()


def test_replays_are_counted_like_eager_steps(model: Model) -> None:
    graphs = captured(model)
    rows = started(model, (20, 30))
    model.ledger.clear()
    graphs.step(StepRows.of(rows))
    replayed = Counter(model.ledger.calls)
    model.ledger.clear()
    eager(model).step(StepRows.of([DecodeRow(row.cache, 7) for row in rows]))
    assert replayed == model.ledger.calls
    assert "layers.1.attn.decode.attend" in replayed


def test_the_device_ran_the_kernels_of_the_plan(model: Model) -> None:
    """CUPTI sees in a replay what an eager step launched, one by one."""
    graphs = captured(model)
    rows = started(model, (20, 30))
    once = eager(model)
    once.step(StepRows.of(rows))
    launched = record_launches(model.ledger, lambda: once.run(2))
    replayed = record_launches(model.ledger, lambda: graphs._graphs[2].graph.replay())
    # A copy is a transfer to an eager step and a kernel to a graph.
    names = Counter(launch.kernel for launch in replayed if not launch.kernel.startswith("memcpy"))
    assert names == Counter(launch.kernel for launch in launched)
    slots = {launch.slot for launch in launched}
    patterns = [pattern for spec in SPECS if spec.kind is not OpKind.SAMPLE for pattern in spec.launches]
    glue = {launch.kernel for launch in launched if launch.slot is None}
    assert not [kernel for kernel in glue if re.search("|".join(patterns), kernel)], "all but the sampler have a slot"
    assert "attn.decode.angles" in slots
    assert {f"layers.1.attn.decode.{name}" for name in ("entries", "scores", "select", "attend")} <= slots
    assert ("layers.1.ffn.decode.route" in slots) is not _is_invariant(model)
    assert ("layers.1.ffn.router" in slots) is _is_invariant(model)


def test_no_step_compiles_after_the_capture(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows, and however tokens are drawn: what a served step needs is compiled by then."""
    graphs = captured(model)
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["fn"]))
    monkeypatch.setattr(cache, "compile_missing", lambda configs, *_: compiled.extend(configs))
    params = SamplingParams(9, temperature=0.8, top_p=0.7)
    for count in range(1, MAX_ROWS + 1):
        rows = started(model, [3 + idx for idx in range(count)])
        compiled.clear()  # prompts are another kind of step
        drawn = [DecodeRow(row.cache, 5, SampleRow(params, seed=idx, num_drawn=0)) for idx, row in enumerate(rows)]
        assert None not in graphs.step(StepRows.of(drawn)).token_ids
        for row in rows:
            row.cache.release()
        assert compiled == [], count
    assert graphs.num_replays == MAX_ROWS


def test_no_prompt_compiles_after_the_start(model: Model) -> None:
    """Of any length, beside any number of others: what a served step launches was compiled by the sizes that a start
    tries."""
    engine = EngineConfig(model.cache_spec.device.type, torch.bfloat16, 1024, 2 * MAX_ROWS, max_prefill_tokens=512)
    warm_up(model, engine)
    warm_up_sampler(model.cache_spec.device, model.config.vocab_size, model.config.vocab_size)
    with torch.inference_mode():
        eager(model).warm_up(lambda *_: None)  # prompts of one token each are a decode step, too
    before = COMPILATIONS.count
    for lengths in ((1,), (3,), (17,), (20,), (48,), (100,), (257,), (300,), (500,), (3, 9, 70), (1, 1, 1), (200, 1)):
        rows = started_together(model, lengths)
        assert COMPILATIONS.count == before, lengths
        for row in rows:
            row.cache.release()


def test_a_served_engine_compiles_and_captures_nothing(model: Model) -> None:
    """After a start as ``serve`` makes it, whatever requests come: alone and together, greedy, drawn, scored
    with adjusted logits and with masks."""
    engine = EngineConfig(model.cache_spec.device.type, torch.bfloat16, 1024, MAX_ROWS, max_prefill_tokens=512)
    warm_up(model, engine)
    warm_up_sampler(model.cache_spec.device, model.config.vocab_size, model.config.vocab_size)
    before = COMPILATIONS.num_captured
    decoder = make_decoder(model, engine, model.config.vocab_size)
    assert decoder is not None
    assert COMPILATIONS.num_captured - before == len(decoder.buckets)
    runs = Engine(model, engine, model.config.vocab_size, end_token_ids=(), decoder=decoder)
    runs.start()
    for count in range(1, MAX_ROWS + 1):
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        kinds = (
            SamplingParams(5 + count, temperature=0.0),
            SamplingParams(5 + count, temperature=0.9, top_p=0.8, num_logprobs=0),
            SamplingParams(5 + count, num_logprobs=3, prompt_logprobs=3),
            SamplingParams(5 + count, repetition_penalty=1.2, logit_bias=((7, 2.0),), min_tokens=3),
        )
        bound = [Every(5, model.config.vocab_size) if n % 3 == 1 else None for n in range(count)]
        asked = [(kinds[n % 4], bound[n]) for n in range(count)]
        runs.submit([Request([5 + n] * (1 + 60 * n), one, heard.put, matcher=it) for n, (one, it) in enumerate(asked)])
        num_ended = 0
        while num_ended < count:
            output = heard.get(timeout=60)
            assert output.finish_reason is not FinishReason.ERROR, output.error
            num_ended += output.finish_reason is not None
    load = runs.load()
    runs.stop()
    assert (load.num_compiled, load.num_captured) == (0, 0)
    assert decoder.num_replays


def started_together(model: Model, lengths: Sequence[int]) -> list[DecodeRow]:
    """Runs prompts in one step and draws their next tokens."""
    parts = [(list(range(5, 5 + count)), model.new_cache()) for count in lengths]
    with torch.inference_mode():
        logits_RV = model.forward(ForwardBatch.of(parts, model.cache_spec.device))
        choose_tokens(logits_RV[-len(parts) :], [SampleRow(SamplingParams(9, temperature=0.8), 1, 0)] * len(parts))
    return [DecodeRow(cache, 9) for _, cache in parts]
