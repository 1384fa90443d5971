"""Decode steps with several rows of a request: the twins' line against one shot, drafts that are taken back, mixtures.

The model is in float64: what may differ is the order of sums alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.attention.interface import DecodeStep
from ownpath.cache.layout import MOST_ROWS_PER_REQUEST, NAN_BYTE
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

MOST_ROWS, NUM_TOKENS = 4, 280
"""Past windows of 4, of 128 and the sliding one, a block of 256, and the indexer's top-k of 48."""
FLOAT64_TOLERANCE = 1e-9
"""As in ``test_incremental``."""
WRONG = 95
"""A draft that is not taken: no text has it."""
PROMPTS = (0, 122, 250)


def load(folder: Path, device: torch.device, **settings: object) -> Model:
    engine = EngineConfig(str(device), torch.float64, 300, max_num_seqs=4, rows_per_request=MOST_ROWS)
    return load_model(folder, replace(engine, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    random_checkpoint(made, "full-nvfp4", seed=9, **THREE_LAYERS)
    return made


@pytest.fixture(scope="module")
def model(folder: Path, device: torch.device) -> Model:
    return load(folder, device)


def text(seed: int) -> list[int]:
    return torch.randint(0, WRONG, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


def poisoned(model: Model) -> CachePool:
    pool = CachePool(model.cache_spec)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(NAN_BYTE)
    return pool


def step(model: Model, parts: Sequence[tuple[list[int], SequenceCache]]) -> torch.Tensor:
    """The logits of all rows of a step, which must be a decode step."""
    batch = ForwardBatch.of(parts, model.cache_spec.device, all_logits=True)
    assert isinstance(model.blocks[0].prepare(batch.tables), DecodeStep)
    return model.forward(batch)


def prefill(model: Model, cache: SequenceCache, ids: list[int]) -> None:
    model.forward(ForwardBatch.of([(ids, cache)], model.cache_spec.device))


def one_shot(model: Model, ids: list[int]) -> torch.Tensor:
    return model.forward(ForwardBatch.of([(ids, model.new_cache())], model.cache_spec.device, all_logits=True))


@pytest.fixture(scope="module")
def expected(model: Model) -> torch.Tensor:
    return one_shot(model, text(0))


def in_pieces(model: Model, pool: CachePool, ids: list[int], sizes: list[int], start: int = 0) -> torch.Tensor:
    cache, logits = pool.new_sequence(), []
    if start:
        prefill(model, cache, ids[:start])
    for size in cycle(sizes):
        logits.append(step(model, [(ids[cache.num_tokens : cache.num_tokens + size], cache)]))
        if cache.num_tokens >= len(ids):
            return torch.cat(logits)
    raise AssertionError("no sizes")


@pytest.mark.parametrize(("sizes", "start", "stop"), [([3, 1], 110, 200), ([1, 4, 2, 3], 0, 140)], ids=str)
def test_pieces_equal_one_shot(sizes: list[int], start: int, stop: int, model: Model, expected: torch.Tensor) -> None:
    """On the line, once from the first token on, past the window's end, in memory that is NaN where nothing was
    written."""
    found = in_pieces(model, poisoned(model), text(0)[:stop], sizes, start)
    assert (found - expected[start:stop]).abs().max() <= FLOAT64_TOLERANCE


def test_one_row_has_the_same_bits_in_a_ring_of_any_length(folder: Path, device: torch.device, model: Model) -> None:
    single = load(folder, device, rows_per_request=1)
    ids = text(0)[:140]
    longer, plain = (in_pieces(one, poisoned(one), ids, [1], 115) for one in (model, single))
    assert torch.equal(longer, plain)


@pytest.mark.parametrize("start", [125, 126, 253])
def test_a_prompt_of_the_reference_goes_on(start: int, model: Model, expected: torch.Tensor) -> None:
    found = in_pieces(model, poisoned(model), text(0)[: start + 12], [4], start)
    assert (found - expected[start : start + 12]).abs().max() <= FLOAT64_TOLERANCE


def test_fp8_pages_have_longer_rings_too(tmp_path: Path, device: torch.device) -> None:
    random_checkpoint(
        tmp_path, "full-nvfp4", seed=9, head_dim=512, qk_rope_head_dim=64, index_head_dim=128, **THREE_LAYERS
    )
    paged = load(tmp_path, device, cache_format=CacheFormat.FP8)
    ids = text(0)[:140]
    found = in_pieces(paged, poisoned(paged), ids, [4, 1, 3], 110)
    assert (found - one_shot(paged, ids)[110:]).abs().max() <= FLOAT64_TOLERANCE


def mixed(model: Model, pool: CachePool) -> list[torch.Tensor]:
    """Three requests after prompts, in steps of 1 to 4 rows of each: the logits of each request."""
    caches = [pool.new_sequence() for _ in PROMPTS]
    logits: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    for number, (cache, count) in enumerate(zip(caches, PROMPTS, strict=True)):
        if count:
            prefill(model, cache, text(number)[:count])
    for sizes in ((4, 1, 2), (1, 4, 3), (3, 1, 4), (1, 1, 1), (4, 4, 4)):
        listed = zip(caches, sizes, strict=True)
        parts = [(text(n)[one.num_tokens : one.num_tokens + size], one) for n, (one, size) in enumerate(listed)]
        for rows, found in zip(logits, step(model, parts).split(sizes), strict=True):
            rows.append(found)
    return [torch.cat(rows) for rows in logits]


def test_requests_with_one_and_several_rows(model: Model) -> None:
    """Together as alone; unowned memory is not read, and where blocks and slots lie changes no bit."""
    found, moved = mixed(model, poisoned(model)), poisoned(model)
    moved.slots._free_blocks.reverse()
    moved.slots._free_slots.reverse()
    for number, (rows, elsewhere) in enumerate(zip(found, mixed(model, moved), strict=True)):
        start = PROMPTS[number]
        assert (rows - one_shot(model, text(number))[start : start + len(rows)]).abs().max() <= FLOAT64_TOLERANCE
        assert torch.equal(rows, elsewhere)


def drafted(model: Model, start: int, accepted: Sequence[int]) -> torch.Tensor:
    """The logits of rows that stay: steps of four rows, of which all behind the first ``accepted`` are wrong drafts."""
    cache, ids, logits = poisoned(model).new_sequence(), text(0), []
    prefill(model, cache, ids[:start])
    for count in accepted:
        at = cache.num_tokens
        rows = ids[at : at + count] + [WRONG] * (MOST_ROWS - count)
        logits.append(step(model, [(rows, cache)])[:count])
        cache.num_tokens = at + count
    return torch.cat(logits)


@pytest.mark.parametrize("start", [121, 124, 249])
def test_rejected_drafts_leave_nothing(start: int, model: Model, expected: torch.Tensor) -> None:
    """Also where one had ended a window of 4 or 128. (Bits: in the kernels' tests; experts group rows by tokens.)"""
    accepted = (1, 1, 2, 1, 3, 4, 1, 1)
    found = drafted(model, start, accepted)
    assert (found - expected[start : start + sum(accepted)]).abs().max() <= FLOAT64_TOLERANCE


def test_rejected_drafts_before_a_prompts_next_chunk(model: Model, expected: torch.Tensor) -> None:
    """The reference reads the same rings."""
    cache, ids = poisoned(model).new_sequence(), text(0)
    prefill(model, cache, ids[:126])
    step(model, [([ids[126], WRONG, WRONG, WRONG], cache)])
    cache.num_tokens = 127
    batch = ForwardBatch.of([(ids[127:200], cache)], model.cache_spec.device, all_logits=True)
    assert (model.forward(batch) - expected[127:200]).abs().max() <= FLOAT64_TOLERANCE


def test_more_rows_go_to_the_reference(model: Model) -> None:
    pool = CachePool(model.cache_spec)
    caches = [pool.new_sequence() for _ in range(2)]
    device = model.cache_spec.device
    for rows, is_decoded in ((MOST_ROWS, True), (MOST_ROWS + 1, False)):
        batch = ForwardBatch.of([([1], caches[0]), ([2] * rows, caches[1])], device)
        assert isinstance(model.blocks[0].prepare(batch.tables), DecodeStep) == is_decoded


@pytest.mark.parametrize("count", [0, MOST_ROWS_PER_REQUEST + 1])
def test_other_numbers_are_refused(count: int, model: Model) -> None:
    with pytest.raises(ValueError, match=f"rows_per_request must be 1 to 9, found {count}"):
        CachePool(replace(model.cache_spec, rows_per_request=count))
