"""The prefix cache on a device: what goes on from a snapshot has the bits of what it was taken of.

Chunks are cut alike in both runs, so kernels compute the same rows side by side. Rings and blocks of the second were
full of NaN before.
"""

import queue
from collections.abc import Iterator

import pytest
import torch
from gpu.test_decoder_gpu import MAX_ROWS, captured, decode
from support.kernel_configs import model_configs

from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.snapshot import SnapshotStore
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder, make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.formats import CacheFormat
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

IDS = [7 + n * n % 1999 for n in range(1000)]
WAYS = [(one, is_invariant) for one in CacheFormat for is_invariant in (False, True)]


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module", params=WAYS, ids=[f"{one}{', invariant' if it else ''}" for one, it in WAYS])
def model(cuda: torch.device, request: pytest.FixtureRequest) -> Model:
    cache_format, is_invariant = request.param
    engine = EngineConfig(
        str(cuda),
        torch.bfloat16,
        max_model_len=1024,
        max_num_seqs=2 * MAX_ROWS,
        cache_format=cache_format,
        is_batch_invariant=is_invariant,
    )
    return load_model(default_model_dir(), engine)


def run(model: Model, cache: SequenceCache, ids: list[int]) -> torch.Tensor:
    return model.forward(ForwardBatch.of([(ids, cache)], model.cache_spec.device, all_logits=True))


def poison(pool: CachePool, slot: int, but: tuple[int, ...]) -> None:
    """Fills a slot, and every block but these, with NaN."""
    for member, tensor in pool.tensors.items():
        num_rows = 1 if member.page_bytes else member.num_rows
        of = [one for one in range(len(tensor) // num_rows) if one not in but] if member.group.is_paged else [slot]
        for number in of:
            tensor[number * num_rows : (number + 1) * num_rows].view(torch.uint8).fill_(NAN_BYTE)


@pytest.mark.parametrize("length", [515, 640])
def test_a_hit_has_the_bits_of_a_cold_run(model: Model, length: int) -> None:
    """The rest of the prompt, and then steps of a graph."""
    pool, store, decoder = model.caches, SnapshotStore(model.caches, 1), captured(model)
    first = model.new_cache()
    run(model, first, IDS[:512])
    store.save(first.slot, 0)
    expected = run(model, first, IDS[512:length])
    other = pool.new_sequence(1024, shared=first.blocks[:2])
    poison(pool, other.slot, but=first.blocks)
    store.load(0, other.slot)
    assert torch.equal(run(model, other, IDS[512:length]), expected)
    steps = decode(decoder, [DecodeRow(first, 9)])
    for at, pair in enumerate(zip(decode(decoder, [DecodeRow(other, 9)]), steps, strict=True)):
        assert torch.equal(*pair), f"step {at}"


def read_last(decoder: Decoder, cache: SequenceCache, token_id: int) -> tuple[torch.Tensor, int]:
    """Runs one token as a graph's row. Returns its logits and what it draws."""
    found = decoder.step(StepRows.of([DecodeRow(cache, token_id)]))
    assert found.token_ids[0] is not None
    return found.logits_TV.clone(), found.token_ids[0]


@pytest.mark.parametrize("length", [100, 383, 512])
def test_a_tail_has_the_bits_of_a_cold_run(model: Model, length: int) -> None:
    """The last token of a prompt, and steps behind it. The tail is copied when that token's row has been written."""
    pool, store, decoder = model.caches, SnapshotStore(model.caches, 1, num_tails=1), captured(model)
    first, shared = model.new_cache(), (length - 1) // 256
    run(model, first, IDS[: length - 1])
    expected, token_id = read_last(decoder, first, IDS[length - 1])
    store.save_tail(first.slot, first.blocks[shared], 0)
    other = pool.new_sequence(1024, shared=first.blocks[:shared])
    steps = decode(decoder, [DecodeRow(first, token_id)])
    poison(pool, other.slot, but=other.blocks[:shared])
    store.load_tail(0, other.slot, other.blocks[shared])
    other.num_tokens = length - 1
    assert torch.equal(read_last(decoder, other, IDS[length - 1])[0], expected)
    for at, pair in enumerate(zip(decode(decoder, [DecodeRow(other, token_id)]), steps, strict=True)):
        assert torch.equal(*pair), f"step {at}"


def answer(engine: Engine, ids: list[int], num_tokens: int) -> tuple[list[int], int]:
    heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    request = Request(ids, SamplingParams(num_tokens, temperature=0.0), heard.put)
    engine.submit([request])
    while (output := heard.get(timeout=120)).finish_reason is None:
        pass
    assert output.error is None
    return list(request.output_ids), request.num_cached


def found_again(num_tokens: int, num_tails: int) -> int:
    """Tokens of a prompt that it does not compute when it is sent again: a tail stands for 32 or more."""
    behind = (num_tokens - 1) % 256
    return num_tokens - 1 - (behind if not num_tails or behind < 32 else 0)


@pytest.mark.parametrize("num_tails", [0, 4])
def test_answers_of_the_engine_are_the_cold_ones(model: Model, num_tails: int) -> None:
    """Graphs fill the block at whose end the answer's snapshot is taken. Snapshots cut a prompt alike when it is cold
    and when it is a hit, so that its bits, and so its tokens, are bound to be equal."""
    config = EngineConfig(
        str(model.cache_spec.device),
        torch.bfloat16,
        max_model_len=1024,
        max_num_seqs=MAX_ROWS,
        cache_format=model.cache_spec.cache_format,
    )
    prefix = PrefixCache(model.caches, PrefixSettings(16, num_tails=num_tails))
    num_vocab = model.config.vocab_size
    decoder = make_decoder(model, config, num_vocab)
    engine = Engine(model, config, num_vocab, end_token_ids=(), decoder=decoder, prefix=prefix)
    engine.start()
    try:
        for length in (257, 259, 508, 512, 640):
            prefix.clear()
            cold = answer(engine, IDS[:length], 24)
            again = answer(engine, IDS[:length], 24)
            assert (cold[1], again[1]) == (0, found_again(length, num_tails))
            assert again[0] == cold[0], length
            longer = [*IDS[:length], *cold[0], 9]
            found = answer(engine, longer, 8)
            assert found[1] == max((length + 23) // 256 * 256, found_again(length, num_tails))
    finally:
        engine.stop()
    assert prefix.faults() == []
    prefix.clear()
