"""Streaming: a layer is let go before the next is loaded, and the reference adds less than the layer itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.live_bytes import PeakBytes
from torch.multiprocessing.reductions import StorageWeakRef

from ownpath.config import EngineConfig
from ownpath.finding import Finding, failed
from ownpath.verify import layer_stage as stage
from ownpath.verify.layer import LoadedLayer, load_layer
from ownpath.verify.subject import Selection, Subject


def buffers_of(loaded: LoadedLayer) -> Iterator[torch.Tensor]:
    """A layer's weights as they were loaded."""
    for operand in loaded.weights.operands:
        for parts in operand.buffers.values():
            yield from parts
    yield from loaded.weights.params.values()


def test_a_layer_is_gone_before_the_next_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path, "modelopt-experts-only", seed=1)
    held: list[StorageWeakRef] = []

    def load(subject: Subject, layer_idx: int) -> LoadedLayer:
        assert all(storage.expired() for storage in held), f"something of a layer before {layer_idx} is still there"
        loaded = load_layer(subject, layer_idx)
        held.extend(StorageWeakRef(buffer.untyped_storage()) for buffer in buffers_of(loaded))
        return loaded

    monkeypatch.setattr(stage, "load_layer", load)
    subject = Subject.of(tmp_path, EngineConfig(max_model_len=20))
    findings = [found for found in stage.layer_stage(subject) if isinstance(found, Finding)]
    assert not failed(findings)
    assert len(held) > 5 * 20
    assert all(storage.expired() for storage in held)


def test_a_wide_layer_needs_less_than_two(tmp_path: Path) -> None:
    """Experts that outweigh a short text's streams, in buffers small enough to be torch's own, which are counted."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 24, "num_experts_per_tok": 2}
    random_checkpoint(tmp_path, "full-nvfp4", num_hidden_layers=2, compress_ratios=[0, 4], **wide)
    subject = Subject.of(tmp_path, EngineConfig(max_model_len=4), Selection(frozenset({1})))
    layer = sum(buffer.nbytes for buffer in buffers_of(load_layer(subject, 1)))
    with PeakBytes() as live:
        findings = [found for found in stage.layer_stage(subject) if isinstance(found, Finding)]
    assert not failed(findings)
    assert layer < live.peak <= 2 * layer, (live.peak, layer)
