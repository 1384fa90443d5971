"""A prompt of a million tokens through attention of three V4-Flash layers, beside the reference at sampled rows."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import plan_configs

from ownpath.attention.decode import PagedAttention
from ownpath.bench.request import StepOptions
from ownpath.bench.step import make_model, step_config
from ownpath.cache.pools import SequenceCache
from ownpath.cache.tables import StepTables
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.kernels.contract import Config
from ownpath.loading import planned_caps
from ownpath.model.model import Model
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands

pytestmark = [pytest.mark.gpu, pytest.mark.sm90, pytest.mark.slow]

LENGTH, CHUNK, NUM_ROWS = 2**20, 8192, 16
LAYERS = (1, 2, 3)
"""A layer with its window alone, one that selects entries (of 4 tokens), and one that reads all (of 128)."""
SAMPLED = (0, 7 * CHUNK, 64 * CHUNK, LENGTH - CHUNK, LENGTH - NUM_ROWS)
"""Positions where rows are compared. At the last one a row scores 262,144 entries and reads 8,192."""
TOLERANCE = 10 * 2**-9
"""Ten operations behind each other that round to BF16 at different places."""
OPTIONS = StepOptions(layers=1 + max(LAYERS), expert_sets=1)


def kernel_configs() -> Iterator[Config]:
    config = step_config("flash", OPTIONS)
    index = drawn_checkpoint(config, OPTIONS.export)
    yield from plan_configs(make_plan(config, index, planned_caps("sm_90"), Demands("bfloat16")), index)


def drawn(num_rows: int, model: Model, generator: torch.Generator) -> torch.Tensor:
    shape = num_rows, model.config.hidden_size
    return torch.randn(shape, generator=generator, device=generator.device).to(model.cache_spec.dtype)


def caches_of(model: Model, layer_idx: int) -> list[torch.Tensor]:
    """Returns the layer's tensors of the pool."""
    layer = model.caches.layers[layer_idx]
    parts = [one for one in (layer.compressor, layer.indexer) if one is not None]
    return [layer.window, *(one.state for one in parts), *(one.entries for one in parts)]


def read(model: Model, cache: SequenceCache, num_rows: int, generator: torch.Generator) -> None:
    """Reads some more rows in every layer, each of its own random input."""
    assert isinstance(model.paged, PagedAttention)
    tables = StepTables.of([cache], [num_rows])
    step = model.paged.prepare_chunks(tables)
    for layer_idx in LAYERS:
        rope = model.compress_rope if model.config.compress_ratios[layer_idx] else model.sliding_rope
        model.blocks[layer_idx].attn(drawn(num_rows, model, generator), rope.at(tables.positions_T), step)
    tables.extend()


def compare(model: Model, cache: SequenceCache, generator: torch.Generator) -> None:
    """Compares the next rows' results, and all that they write; leaves the caches as they were."""
    assert isinstance(model.paged, PagedAttention)
    tables = StepTables.of([cache], [NUM_ROWS])
    for layer_idx in LAYERS:
        caches, x_TD = caches_of(model, layer_idx), drawn(NUM_ROWS, model, generator)
        rope = model.compress_rope if model.config.compress_ratios[layer_idx] else model.sliding_rope
        before, written, results = [one.clone() for one in caches], [], []
        for step in (model.paged.prepare_chunks(tables), model.paged.reference.prepare(tables)):
            results.append(model.blocks[layer_idx].attn(x_TD, rope.at(tables.positions_T), step).double())
            written.append([one.clone() for one in caches])
            for one, old in zip(caches, before, strict=True):
                one.copy_(old)
        where = f"layer {layer_idx} at {cache.num_tokens}"
        errors_T = (results[0] - results[1]).norm(dim=1) / results[1].norm(dim=1)
        assert errors_T.max() < TOLERANCE, (where, errors_T.tolist())
        for found, wanted in zip(*written, strict=True):
            if found.dtype is torch.uint8:  # pages: codes may be a step apart
                continue
            # Row 0 is nobody's: the reference writes there what later rows replace.
            norms = wanted[1:].double().norm(dim=1)
            errors = (found[1:].double() - wanted[1:].double()).norm(dim=1) / norms.clamp(min=1e-30)
            assert errors.max() < TOLERANCE, (where, int(errors.argmax()))


@pytest.mark.parametrize("cache_format", [CacheFormat.BF16, CacheFormat.FP8], ids=str)
@torch.inference_mode()
def test_a_million_tokens(cache_format: CacheFormat, cuda: torch.device) -> None:
    """Caches are what the kernels wrote for every token before. A key missed, an angle off by a token or an entry of
    another place moves a row by a tenth and more."""
    engine = EngineConfig("cuda", torch.bfloat16, LENGTH, max_num_seqs=1, cache_format=cache_format)
    model = make_model(step_config("flash", OPTIONS), engine, OPTIONS.export, OPTIONS.expert_sets).model
    for tensor in model.caches.tensors.values():
        tensor.zero_()
    cache, generator = model.new_cache(), torch.Generator(cuda).manual_seed(9)
    for start in range(0, LENGTH, CHUNK):
        if start in SAMPLED:
            compare(model, cache, generator)
        read(model, cache, CHUNK - NUM_ROWS if start + CHUNK == LENGTH else CHUNK, generator)
    assert cache.num_tokens == SAMPLED[-1]
    compare(model, cache, generator)
