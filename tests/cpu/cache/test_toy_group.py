"""A cache group is one entry of the layout: what nothing else knows of is allocated, counted, paged and freed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.cache import layout
from ownpath.cache.layout import CacheGroup, CacheTensor, EntryKind
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.config import EngineConfig, ModelConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch

TOY = CacheGroup("toy", is_paged=True, is_wide=True)
ENGINE = EngineConfig(max_model_len=300, dtype=torch.bfloat16, max_num_seqs=2)


def listed(config: ModelConfig, layer_idx: int, ratio: int) -> Iterator[CacheTensor]:
    yield from ALL(config, layer_idx, ratio)
    yield CacheTensor(TOY, layer_idx, EntryKind.MAIN, num_rows=4, width=8, ratio=64)


ALL = layout._of_layer


def test_another_group_has_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_checkpoint(tmp_path, "bf16").config
    plain_bytes = CacheSpec.of(config, ENGINE).sequence_bytes
    monkeypatch.setattr(layout, "_of_layer", listed)
    pool = CachePool(CacheSpec.of(config, ENGINE))
    toys = [tensor for member, tensor in pool.tensors.items() if member.group is TOY]
    assert len(toys) == config.num_hidden_layers
    # Two blocks of four rows for each of two sequences, and nobody's.
    assert {(tuple(tensor.shape), tensor.dtype) for tensor in toys} == {((20, 8), torch.float32)}
    assert pool.spec.sequence_bytes - plain_bytes == len(toys) * (300 // 64) * 8 * 4
    sequences = [pool.new_sequence() for _ in range(2)]
    for number, sequence in enumerate(sequences, start=1):
        for view in (view for view in sequence.views() if view.shape == (4, 8)):
            view += number
    for tensor in toys:
        assert sorted(tensor[:, 0].tolist()) == [0] * 4 + [1] * 8 + [2] * 8, "each block is one sequence's"


def test_a_model_runs_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path, "bf16")

    def logits() -> torch.Tensor:
        model = load_model(tmp_path, ENGINE)
        return model.forward(ForwardBatch.of([([7] * 20, model.new_cache())], "cpu"))

    alone = logits()
    monkeypatch.setattr(layout, "_of_layer", listed)
    assert torch.equal(logits(), alone)
