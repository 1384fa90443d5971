"""The seam and its first backend: the order of calls, what rings keep, and that nothing unwritten is read."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.checkpoints import SMALL, random_checkpoint

from ownpath.attention.interface import AttentionLayer, AttentionStep, Projected
from ownpath.attention.reference import ReferenceAttention
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.cache.tables import StepTables
from ownpath.config import EngineConfig, ModelConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.runners import SharedKeyAttention


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    folder = tmp_path_factory.mktemp("attention")
    random_checkpoint(folder, "bf16", seed=5)
    return load_model(folder, EngineConfig(device=str(device), max_model_len=512, max_num_seqs=3))


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Told:
    """A backend that notes what it is asked for, and has the reference do it."""

    inner: ReferenceAttention
    notes: list[Any]

    @property
    def reference(self) -> ReferenceAttention:
        return self.inner

    def prepare(self, tables: StepTables) -> AttentionStep:
        self.notes.append("prepare")
        return ToldStep(self.inner.prepare(tables), self.notes)


@dataclass(frozen=True)
class ToldStep:
    inner: AttentionStep
    notes: list[Any]

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        self.notes.append((layer.layer_idx, "write_entries"))
        self.inner.write_entries(layer, rows)

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        self.notes.append((layer.layer_idx, "attend"))
        return self.inner.attend(layer, rows)

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        self.notes.append((layer.layer_idx, "write_rows"))
        self.inner.write_rows(layer, rows)


def test_a_backend_prepares_once_and_then_goes_layer_by_layer(model: Model) -> None:
    """Any object with these methods serves; the model knows no other way to its caches."""
    notes: list[Any] = []
    first = model.blocks[0]
    backend = Told(ReferenceAttention(model.config.sliding_window), notes)
    told = replace(model, blocks=(replace(first, attn=replace(first.attn, backend=backend)), *model.blocks[1:]))
    chunks = [tokens(140), tokens(5, seed=2)]
    found = told.forward(ForwardBatch.of([(ids, told.new_cache()) for ids in chunks], told.cache_spec.device))
    calls = ("write_entries", "attend", "write_rows")
    assert notes == ["prepare", *((idx, call) for idx in range(len(model.blocks)) for call in calls)]
    expected = model.forward(ForwardBatch.of([(ids, model.new_cache()) for ids in chunks], model.cache_spec.device))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ring_keeps_the_newest_rows(size: int, device: torch.device) -> None:
    """Chunks shorter and longer than the window: the next step's queries see the newest keys, oldest first."""
    config = replace(ModelConfig.from_dict(SMALL), compress_ratios=(0,), sliding_window=size, head_dim=1)
    pool = CachePool(CacheSpec(config, 64, torch.float32, device, max_sequences=2))
    layer = AttentionLayer(0, SharedKeyAttention(torch.zeros(1), 1.0))
    backend = ReferenceAttention(size)
    pool.new_sequence().release()
    cache = pool.new_sequence()
    for count in (1, 2, 5, 20, 1):
        tables = StepTables.of([cache], [count])
        step = backend.prepare(tables)
        older = pool.layers[0].window[step.requests[0].window_rows].flatten()
        assert older.tolist() == list(range(max(0, cache.num_tokens - size + 1), cache.num_tokens))
        keys = torch.arange(cache.num_tokens, cache.num_tokens + count, device=device, dtype=torch.float32)[:, None]
        step.write_rows(layer, Projected(keys[:, None], keys))
        tables.extend()
        kept = cache.window(0).flatten().tolist()
        newest = range(max(0, cache.num_tokens - size), cache.num_tokens)
        assert [kept[position % size] for position in newest] == list(newest)


def test_a_place_that_another_sequence_left_gives_the_same_bits(model: Model) -> None:
    """Memory full of NaN, nobody's included, and then of another sequence's rows: the logits of a fresh pool."""
    device, ids, steps = model.cache_spec.device, tokens(300), (131, 1, 120, 1, 47)

    def run() -> torch.Tensor:
        cache, other, logits, start = model.new_cache(), model.new_cache(), [], 0
        for size in steps:
            parts = [(ids[start : start + size], cache), (tokens(2), other)]
            logits.append(model.forward(ForwardBatch.of(parts, device, all_logits=True))[:size])
            start += size
        return torch.cat(logits)

    clean = run()
    for tensor in model.caches.tensors.values():
        tensor.fill_(torch.nan)
    assert torch.isfinite(clean).all()
    assert torch.equal(run(), clean)
    model.forward(ForwardBatch.of([(tokens(400, seed=9), model.new_cache())], device))
    assert torch.equal(run(), clean)
    assert model.caches.slots.faults() == []


def test_more_sequences_than_the_engine_runs_are_refused(model: Model) -> None:
    held = [model.new_cache() for _ in range(3)]
    with pytest.raises(RuntimeError, match="all 3 slots of the caches are taken"):
        model.new_cache()
    held.pop()
    model.new_cache()
