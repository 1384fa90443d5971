"""Taps: each layer shows the values that it declares, and watching changes no bit."""

from collections import defaultdict
from pathlib import Path

import torch
from support.checkpoints import random_checkpoint

from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.taps import tap_names
from ownpath.trace import Observer


class Shapes(Observer):
    def __init__(self) -> None:
        self.found: dict[str, list[torch.Size]] = defaultdict(list)

    def tapped(self, name: str, value: torch.Tensor) -> None:
        self.found[name].append(value.shape)


def test_every_layer_taps_what_it_declares(tmp_path: Path) -> None:
    """Rows of all sequences once; the indexer's mask for each sequence, with its rows and entries."""
    random_checkpoint(tmp_path, "full-nvfp4")
    model = load_model(tmp_path, EngineConfig(max_model_len=64))
    chunks = [([5] * 21, model.new_cache()), ([6], model.new_cache())]
    batch = ForwardBatch.of(chunks, "cpu")
    with model.ledger.observe(Shapes()) as shapes:
        model.forward(batch)
    declared = [name for layer in model.config.backbone_layers() for name in tap_names(layer)]
    assert set(shapes.found) == set(declared)
    for name, found in shapes.found.items():
        if name.endswith(".mask"):
            assert found == [(21, 5), (1, 0)]
        else:
            assert [shape[0] for shape in found] == [22], name


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=1)
    model = load_model(tmp_path, EngineConfig(max_model_len=64))

    def logits() -> torch.Tensor:
        return model.forward(ForwardBatch.of([([7] * 30, model.new_cache())], "cpu", all_logits=True))

    alone = logits()
    with model.ledger.observe(Shapes()) as shapes:
        watched = logits()
    assert shapes.found
    assert torch.equal(alone, watched)
