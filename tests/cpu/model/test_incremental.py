"""One shot, chunks of any size and token by token give the same result, alone and beside other sequences.

The equality is proved in float64, where only the order of sums differs: a wrong cache shows at 1e-3 and more.
"""

from itertools import chain, cycle, repeat

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

NUM_TOKENS = 420  # three HCA blocks and more; past the window and past the indexer's top-k
FLOAT64_TOLERANCE = 1e-9
"""2^-52 grown through 5 layers of sums of some 500 terms, with a margin of 1e3; float32 angles are equal bit by bit."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    folder = tmp_path_factory.mktemp("incremental")
    random_checkpoint(folder, "full-nvfp4", seed=5)
    return load_model(folder, EngineConfig(device=str(device), dtype=torch.float64, max_model_len=512))


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return torch.randint(0, 96, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def one_shot(model: Model, token_ids: list[int]) -> torch.Tensor:
    return run_in_chunks(model, token_ids, [len(token_ids)])


def run_in_chunks(model: Model, token_ids: list[int], sizes: list[int]) -> torch.Tensor:
    cache = model.new_cache()
    logits = []
    rest = list(token_ids)
    for size in cycle(sizes):
        chunk, rest = rest[:size], rest[size:]
        logits.append(model.forward(ForwardBatch.of([(chunk, cache)], model.cache_spec.device, all_logits=True)))
        if not rest:
            return torch.cat(logits)
    raise AssertionError("no chunk sizes")


ONE_BY_ONE = [*[1] * 12, 110, *[1] * 12, 116, *[1] * 12, 112, *[1] * 46]
"""Single tokens from the start, over the ends of all three HCA blocks and of the window, and at the end."""
SIZES = [ONE_BY_ONE, [3, 3, 3, 40], [5, 1, 33], [127, 1], [128], [129], [4, 128, 7], [300, 1]]
"""Long chunks between the short ones: a step takes as long for one token as for a hundred."""


def name_of(sizes: list[int]) -> str:
    return "one by one" if sizes == ONE_BY_ONE else str(sizes)


@pytest.mark.parametrize("sizes", [*SIZES, pytest.param([1], marks=pytest.mark.slow)], ids=name_of)
def test_chunks_equal_one_shot(sizes: list[int], model: Model, token_ids: list[int], one_shot: torch.Tensor) -> None:
    if sizes == [1] and model.cache_spec.device.type != "cpu":
        pytest.skip("all tokens one by one take a device a minute")
    chunked = run_in_chunks(model, token_ids, sizes)
    assert chunked.shape == one_shot.shape
    assert (chunked - one_shot).abs().max() <= FLOAT64_TOLERANCE


def test_sequences_side_by_side_equal_each_alone(model: Model, token_ids: list[int]) -> None:
    """Prefill of one beside decode of another: the batch changes nothing but the rows' places."""
    first, second = token_ids[:150], token_ids[150:]
    alone = [run_in_chunks(model, ids, [len(ids)]) for ids in (first, second)]
    caches = [model.new_cache(), model.new_cache()]
    together: list[list[torch.Tensor]] = [[], []]
    chunks_a = chain((first[:140],), ([t] for t in first[140:]), repeat([]))
    for chunk_b in _pieces(second, 30):
        chunk_a = next(chunks_a)
        parts = [(chunk_a, caches[0])] if chunk_a else []
        parts.append((chunk_b, caches[1]))
        logits = model.forward(ForwardBatch.of(parts, model.cache_spec.device, all_logits=True))
        together[0].append(logits[: len(chunk_a)])
        together[1].append(logits[len(chunk_a) :])
    for expected, rows in zip(alone, together, strict=True):
        found = torch.cat(rows)
        assert (found - expected[: len(found)]).abs().max() <= FLOAT64_TOLERANCE
    assert caches[1].num_tokens == len(second)


def _pieces(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_only_wanted_rows_get_logits(model: Model, token_ids: list[int], one_shot: torch.Tensor) -> None:
    batch = ForwardBatch.of([(token_ids, model.new_cache())], model.cache_spec.device)
    logits = model.forward(batch)
    assert logits.shape == (1, 96)
    assert (logits[0] - one_shot[-1]).abs().max() <= FLOAT64_TOLERANCE


def test_a_chunk_that_overruns_its_cache_is_refused(model: Model) -> None:
    cache = model.new_cache()
    with pytest.raises(ValueError, match="0 \\+ 513 tokens do not fit a cache of 512"):
        ForwardBatch.of([([1] * 513, cache)], "cpu")
    with pytest.raises(ValueError, match="no token"):
        ForwardBatch.of([([], cache)], "cpu")
