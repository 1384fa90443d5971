"""Decode steps over the pool: the line of kernels' twins against the reference, one request or several.

``test_incremental`` proves that token by token equals one shot. Here: what a row does not own is never read, blocks may
lie anywhere, and padded rows change nothing.
"""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.attention.interface import DecodeStep
from ownpath.cache.layout import NOBODY
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.official import Step

MAX_TOKENS = 600
PROMPTS = (3, 127, 300)
FLOAT64_TOLERANCE = 1e-9
"""As in ``test_incremental``: 2^-52 grown through 5 layers of sums of some 500 terms, with a margin of 1e3."""


def load(tmp_path_factory: pytest.TempPathFactory, device: torch.device, **settings: object) -> Model:
    folder = tmp_path_factory.mktemp("decode")
    random_checkpoint(folder, "full-nvfp4", seed=9)
    engine = EngineConfig(device=str(device), dtype=torch.float64, max_model_len=MAX_TOKENS, max_num_seqs=4)
    return load_model(folder, replace(engine, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    return load(tmp_path_factory, device)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def fill(pool: CachePool, value: float) -> None:
    for tensor in pool.tensors.values():
        tensor.fill_(value)


def with_prompts(model: Model, pool: CachePool) -> list[SequenceCache]:
    """One sequence for each prompt, after its prefill on the reference."""
    caches = [pool.new_sequence() for _ in PROMPTS]
    for seed, (count, cache) in enumerate(zip(PROMPTS, caches, strict=True)):
        model.forward(ForwardBatch.of([(ids(count, seed), cache)], pool.spec.device))
    return caches


def decode(model: Model, pool: CachePool, num_steps: int = 6) -> torch.Tensor:
    """The logits of decode steps of all sequences together, through the ends of windows of both kinds."""
    caches = with_prompts(model, pool)
    tokens = [ids(len(caches), 100 + step) for step in range(num_steps)]
    batches = ([([token], cache) for token, cache in zip(row, caches, strict=True)] for row in tokens)
    return torch.stack([model.forward(ForwardBatch.of(batch, pool.spec.device)) for batch in batches])


@pytest.fixture(scope="module")
def expected(model: Model) -> torch.Tensor:
    return decode(model, CachePool(model.cache_spec))


def test_a_step_of_single_rows_is_a_decode_step(model: Model) -> None:
    caches = with_prompts(model, CachePool(model.cache_spec))
    step = ForwardBatch.of([([1], cache) for cache in caches], model.cache_spec.device)
    assert isinstance(model.blocks[0].prepare(step.tables), DecodeStep)
    mixed = ForwardBatch.of([([1, 2], caches[0]), ([1], caches[1])], model.cache_spec.device)
    assert not isinstance(model.blocks[0].prepare(mixed.tables), DecodeStep)


def test_together_equals_alone(model: Model, expected: torch.Tensor) -> None:
    for row, count in enumerate(PROMPTS):
        cache = model.new_cache()
        token_ids = ids(count, row) + [ids(len(PROMPTS), 100 + step)[row] for step in range(len(expected))]
        batch = ForwardBatch.of([(token_ids, cache)], model.cache_spec.device, all_logits=True)
        alone = model.forward(batch)[-len(expected) :]
        assert (alone - expected[:, row]).abs().max() < FLOAT64_TOLERANCE


def test_memory_that_a_row_does_not_own_is_never_read(model: Model, expected: torch.Tensor) -> None:
    pool = CachePool(model.cache_spec)
    fill(pool, torch.nan)
    assert torch.equal(decode(model, pool), expected)


def test_blocks_may_lie_anywhere(model: Model, expected: torch.Tensor) -> None:
    pool = CachePool(model.cache_spec)
    pool.slots._free_blocks.reverse()
    pool.slots._free_slots.reverse()
    first = pool.new_sequence()  # takes what the first prompt had
    found = decode(model, pool)
    assert first.blocks != ()
    assert torch.equal(found, expected)


def test_padded_rows_change_nothing(model: Model) -> None:
    pool = CachePool(model.cache_spec)
    caches = with_prompts(model, pool)
    device, count = pool.spec.device, len(caches)
    tables = ForwardBatch.of([([5], cache) for cache in caches], device).tables.decode
    assert tables is not None
    tokens_T = torch.full((count,), 5, dtype=torch.int32, device=device)
    alone = model.decode(tokens_T, tables)
    rows = [torch.cat((rows, rows.new_zeros((2, *rows.shape[1:])))) for rows in (tables.positions_T, tables.slots_T)]
    blocks_TB = torch.cat((tables.blocks_TB, torch.full((2, tables.blocks_TB.shape[1]), NOBODY, dtype=torch.int32)))
    padded = model.decode(torch.cat((tokens_T, tokens_T.new_full((2,), -1))), DecodeTables(pool, *rows, blocks_TB))
    # The same step twice: a row writes the same values to the same places.
    assert (padded[:count] - alone).abs().max() < FLOAT64_TOLERANCE


def test_official_numerics_of_attention_have_the_line_too(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> None:
    official = load(tmp_path_factory, device, official=frozenset({Step.KV, Step.INDEXER, Step.Q_HEAD_NORM}))
    found = decode(official, CachePool(official.cache_spec))
    assert {slot for slot in official.ledger.calls if slot.endswith("attn.decode.attend")}
    for row, count in enumerate(PROMPTS):
        token_ids = ids(count, row) + [ids(len(PROMPTS), 100 + step)[row] for step in range(len(found))]
        batch = ForwardBatch.of([(token_ids, official.new_cache())], device, all_logits=True)
        assert (official.forward(batch)[-len(found) :] - found[:, row]).abs().max() < FLOAT64_TOLERANCE
