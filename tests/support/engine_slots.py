"""One layer of the engine, run alone on given streams, with every slot's result on record."""

from collections.abc import Mapping
from typing import Any

import torch

from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.trace.observers import CallArguments, Observer, Watched
from ownpath.verify.layer import LoadedLayer


@torch.inference_mode()
def engine_slots(layer: LoadedLayer, x_TSD: torch.Tensor, token_ids_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the engine's layer on the reference of attention, also where there is one token, which is no decode step
    then. Returns every slot's result, and ``out``, by the oracle's names."""
    cache = layer.new_pool(len(token_ids_T), max_sequences=1).new_sequence()
    batch = ForwardBatch.of([(token_ids_T.tolist(), cache)], x_TSD.device)
    columns = {op.spec.slot: op.spec.columns for op in layer.plan.ops}
    with layer.ledger.observe(Results(columns)) as results:
        rotation, step = layer.rope.at(batch.positions_T), layer.reference_step(batch.tables)
        after = layer.block(Residual(x_TSD), rotation, batch.token_ids_T, step)
    out = after.enter(layer.block.hc_attn)
    return results.found | {f"layers.{layer.layer_idx}.out": out.x_TSD}


class Results(Observer):
    """Copies of what slots returned, each called once. columns: of the products that a slot joins, by their names."""

    def __init__(self, columns: Mapping[str, Mapping[str, slice]]) -> None:
        self.columns = columns
        self.found: dict[str, torch.Tensor] = {}

    def after(self, call: Watched, args: CallArguments, result: Any) -> None:
        slot = call.slot
        if slot.rpartition(".")[2] in ("hc_attn", "hc_ffn"):
            self.found |= {f"{slot}.x": result.x_TSD.clone(), f"{slot}.h": result.h_TD.clone()}
        elif slot.endswith(".router"):
            self.found |= {f"{slot}.ids": result[0].clone(), f"{slot}.weights": result[1].clone()}
        else:
            assert slot not in self.found, "called once"
            parts = self.columns.get(slot) or {slot: slice(None)}
            self.found |= {name: result[..., own].clone() for name, own in parts.items()}
