"""Decode steps on a device over pages and under official numerics of attention, as graphs and beside the reference.

Experts stay plain: official ones are torch's, which no graph can hold.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu.test_decoder_gpu import PROMPTS, captured, decode, eager, started
from support.kernel_configs import model_configs

from ownpath.cache.layout import NAN_BYTE
from ownpath.config import EngineConfig
from ownpath.engine.rows import StepRows
from ownpath.formats import CacheFormat
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.official import PLAIN, Step

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

KEYS = frozenset({Step.KV, Step.INDEXER})
WAYS = {
    "fp8": (CacheFormat.FP8, PLAIN),
    "fp8, keys official": (CacheFormat.FP8, KEYS),
    "fp4-index": (CacheFormat.FP4_INDEX, PLAIN),
    "fp4-index, keys official": (CacheFormat.FP4_INDEX, KEYS),
    "bf16, keys official": (CacheFormat.BF16, KEYS),
    "bf16, all official": (CacheFormat.BF16, KEYS | {Step.Q_HEAD_NORM}),
}


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS.keys())
def model(cuda: torch.device, request: pytest.FixtureRequest) -> Model:
    cache_format, official = request.param
    engine = EngineConfig(str(cuda), torch.bfloat16, max_model_len=1024, max_num_seqs=16)
    return load_model(default_model_dir(), replace(engine, cache_format=cache_format, official=official))


def test_a_graph_has_the_bits_of_an_eager_step(model: Model) -> None:
    """Over a pool that was full of NaN for the graph."""
    expected = decode(eager(model), started(model, PROMPTS))
    for tensor in model.caches.tensors.values():
        tensor.view(torch.uint8).fill_(NAN_BYTE)
    graphs = captured(model)
    found = decode(graphs, started(model, PROMPTS))
    assert graphs.num_replays == len(found)
    for at, pair in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(*pair), f"step {at}"


def test_a_step_close_to_the_reference(model: Model) -> None:
    """As in test_decoder_gpu; keys that a BF16 rounding moves over the middle between two codes differ by a code."""
    rows = started(model, PROMPTS)
    found = eager(model).step(StepRows.of(rows)).logits_TV.clone()
    for row in rows:
        row.cache.release()
    expected = []
    for count in PROMPTS:
        cache = model.new_cache()
        batch = ForwardBatch.of([([*range(5, 5 + count), 9], cache)], model.cache_spec.device)
        expected.append(model.forward(batch)[0])
        cache.release()
    wanted = torch.stack(expected)
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() < 0.1, errors.tolist()
