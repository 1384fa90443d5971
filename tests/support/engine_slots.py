"""One layer of the engine, run alone on given streams, with every slot's result on record."""

from typing import Any

import torch

from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.config import EngineConfig
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.runners.companions import HyperBoundary
from ownpath.verify.layer import LoadedLayer


def engine_slots(
    layer: LoadedLayer, engine: EngineConfig, x_TSD: torch.Tensor, token_ids_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What every slot of the engine's layer returned, and ``out``, by the oracle's names."""
    found: dict[str, torch.Tensor] = {}

    def saw(slot: str, _args: tuple[Any, ...], result: Any) -> None:
        if slot.rpartition(".")[2] in ("hc_attn", "hc_ffn"):
            found.update({f"{slot}.x": result.x_TSD.clone(), f"{slot}.h": result.h_TD.clone()})
        elif slot.endswith(".router"):
            found.update({f"{slot}.ids": result[0].clone(), f"{slot}.weights": result[1].clone()})
        else:
            assert slot not in found, "called once"
            found[slot] = result.clone()

    layer.ledger.saw = saw
    cache = CachePool(CacheSpec.of(layer.plan.config, engine)).new_sequence()
    batch = ForwardBatch.of([(token_ids_T.tolist(), cache)], x_TSD.device)
    with torch.inference_mode():
        after = layer.block(
            Residual(x_TSD), layer.rope.at(batch.positions_T), batch.token_ids_T, layer.block.prepare(batch.tables)
        )
        boundary: HyperBoundary = layer.block.hc_attn.runner  # type: ignore[attr-defined]
        found[f"layers.{layer.layer_idx}.out"] = boundary(after.x_TSD, after.y_TD, after.mix).x_TSD
    return found
