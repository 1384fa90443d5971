"""An observer is one object: attached to the ledger, it is told of every planned slot and every tap of a run."""

from typing import Any

import torch

from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.taps import tap_names
from ownpath.trace import Observer
from ownpath.trace.observers import CallArguments, Watched


class Toy(Observer):
    """Records the open calls, the slots and the taps that it sees."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.slots: set[str] = set()
        self.taps: set[str] = set()

    def before(self, call: Watched, args: CallArguments) -> None:
        self.open.append(call.slot)

    def after(self, call: Watched, args: CallArguments, result: Any) -> None:
        assert self.open.pop() == call.slot, "calls nest"
        self.slots.add(call.slot)

    def tapped(self, name: str, value: torch.Tensor) -> None:
        assert value.isfinite().all()
        self.taps.add(name)


def test_another_observer() -> None:
    model = load_model(default_model_dir(), EngineConfig(max_model_len=64))
    with model.ledger.observe(Toy()) as toy:
        model.forward(ForwardBatch.of([([5, 6, 7], model.new_cache())], "cpu"))
    assert not toy.open
    assert toy.slots == {slot for slot, count in model.ledger.calls.items() if count}
    assert toy.taps == {name for layer in model.config.backbone_layers() for name in tap_names(layer)}
    seen = set(toy.slots)
    model.forward(ForwardBatch.of([([5], model.new_cache())], "cpu"))
    assert toy.slots == seen
