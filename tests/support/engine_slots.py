"""One layer of the engine, run alone on given streams, with every slot's result on record."""

from typing import Any

import torch

from ownpath.config import EngineConfig
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.model.caches import CacheSpec, SequenceCache
from ownpath.runners.companions import HyperBoundary
from ownpath.trace.observers import Arguments, Observer, Watched
from ownpath.verify.layer import LoadedLayer


def engine_slots(
    layer: LoadedLayer, engine: EngineConfig, x_TSD: torch.Tensor, token_ids_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What every slot of the engine's layer returned, and ``out``, by the oracle's names."""
    results = Results()
    cache = SequenceCache(CacheSpec.of(layer.plan.config, engine))
    batch = ForwardBatch.of([(token_ids_T.tolist(), cache)], x_TSD.device)
    with torch.inference_mode(), layer.ledger.observe(results):
        after = layer.block(Residual(x_TSD), layer.rope.at(batch.positions_T), batch)
    with torch.inference_mode():
        boundary: HyperBoundary = layer.block.hc_attn.runner  # type: ignore[attr-defined]
        results.found[f"layers.{layer.layer_idx}.out"] = boundary(after.x_TSD, after.y_TD, after.mix).x_TSD
    return results.found


class Results(Observer):
    """Copies of what slots returned, each called once."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def after(self, call: Watched, args: Arguments, result: Any) -> None:
        slot = call.slot
        if slot.rpartition(".")[2] in ("hc_attn", "hc_ffn"):
            self.found |= {f"{slot}.x": result.x_TSD.clone(), f"{slot}.h": result.h_TD.clone()}
        elif slot.endswith(".router"):
            self.found |= {f"{slot}.ids": result[0].clone(), f"{slot}.weights": result[1].clone()}
        else:
            assert slot not in self.found, "called once"
            self.found[slot] = result.clone()
