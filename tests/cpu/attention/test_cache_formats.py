"""The caches' formats in the model: FP8 pages and BF16, plain and official numerics, however steps are cut.

Prompts run on the attention reference and decode steps on the twins of the kernels, over one pool. A model in float64
leaves no room for a difference between them but a rounding at the edge of a code.
"""

from dataclasses import replace

import pytest
import torch

from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.official import PLAIN, Step

MAX_TOKENS = 300
PROMPT, NUM_STEPS = 250, 12
"""The steps pass the ends of windows of 4 and of 128 tokens, and of a block of 256."""
FLOAT64_TOLERANCE = 1e-9
"""As in ``test_decode``."""
ATTENTION = frozenset({Step.KV, Step.INDEXER, Step.Q_HEAD_NORM})


def load(cache_format: CacheFormat, official: frozenset[Step], dtype: torch.dtype = torch.float64) -> Model:
    engine = EngineConfig(dtype=dtype, max_model_len=MAX_TOKENS, max_num_seqs=2)
    return load_model(default_model_dir(), replace(engine, cache_format=cache_format, official=official))


def token_ids(count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def in_chunks(model: Model, pool: CachePool, chunks: list[int]) -> torch.Tensor:
    """The logits of all rows of one sequence, cut into chunks."""
    ids, cache, device = token_ids(sum(chunks)), pool.new_sequence(), pool.spec.device
    logits = []
    for size in chunks:
        batch = ForwardBatch.of([(ids[cache.num_tokens : cache.num_tokens + size], cache)], device, all_logits=True)
        logits.append(model.forward(batch))
    return torch.cat(logits)


def poisoned(model: Model) -> CachePool:
    """A pool all of whose bytes are 255: NaN in E4M3, E8M0, BF16 and float32."""
    pool = CachePool(model.cache_spec)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(255)
    return pool


@pytest.mark.parametrize("official", [PLAIN, ATTENTION], ids=["plain", "official"])
@pytest.mark.parametrize("cache_format", list(CacheFormat))
def test_chunks_and_decode_steps_equal_one_shot(cache_format: CacheFormat, official: frozenset[Step]) -> None:
    model = load(cache_format, official)
    total = PROMPT + NUM_STEPS
    whole = in_chunks(model, CachePool(model.cache_spec), [total])
    found = in_chunks(model, poisoned(model), [100, PROMPT - 100, *[1] * NUM_STEPS])
    assert model.decodes
    assert {slot for slot in model.ledger.calls if slot.endswith("attn.decode.attend")}
    assert bool(found.isfinite().all())
    print((found-whole).abs().max())
    assert (found - whole).abs().max() < FLOAT64_TOLERANCE
