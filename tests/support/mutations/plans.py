"""Mutations in which something else than the plan runs, or a step of official numerics is computed otherwise."""

from typing import Any

import torch

from ownpath.assembly import LoadedPart
from ownpath.verify.layer import LoadedLayer
from support.layer_faults import with_attn
from support.mutations.mutation import LAYERS, LOAD_AND_KERNELS, Mutation, around, on_layer, on_part

LAYER = "layers.1"
SLOT = f"{LAYER}.attn.wq_b"
INDEX_SLOT = f"{LAYER}.attn.indexer.wq_b"


def another_kernel(plan: dict[str, Any]) -> None:
    (entry,) = (entry for entry in plan["ops"] if entry["slot"] == SLOT)
    entry.update(kernel="cute.nvfp4_linear", layout="packed_64x128")


def slot_lost(plan: dict[str, Any]) -> None:
    plan["ops"] = [entry for entry in plan["ops"] if entry["slot"] != SLOT]


def around_the_ledger(loaded: LoadedLayer) -> LoadedLayer:
    """The norm runs, and nobody is told."""
    norm: Any = loaded.block.attn.kv_norm
    return with_attn(loaded, kv_norm=norm.runner)


def narrow_result(loaded: LoadedLayer) -> LoadedLayer:
    mlp: Any = loaded.block.ffn.shared_experts
    mlp.w2 = around(mlp.w2, lambda run, x: run(x).bfloat16())
    return loaded


def rounds_half_up(part: LoadedPart) -> None:
    """Values are made larger by less than their distance to any other middle, so that halves go away from zero."""
    runner: Any = part.runners.get(INDEX_SLOT)
    if runner is not None:
        quantize = runner.quantize_input
        runner.quantize_input = lambda x: quantize(x * (1 + 2.0**-20))


def keys_as_they_are(loaded: LoadedLayer) -> LoadedLayer:
    return with_attn(loaded, quantize_kv=around(loaded.block.attn.quantize_kv, lambda run, x: x))


def keys_too_coarse(loaded: LoadedLayer) -> LoadedLayer:
    """To a whole row's step, where each 64 channels have their own, and the rotary channels none."""

    def coarse(run: Any, x: torch.Tensor) -> torch.Tensor:
        size = x.abs().amax(-1, keepdim=True) * 64
        return run((x + size) - size)  # type: ignore[no-any-return]

    return with_attn(loaded, quantize_kv=around(loaded.block.attn.quantize_kv, coarse))


MUTATIONS = {
    "another kernel in the plan's file": Mutation(
        "wq_b's", "LG01", SLOT, layer_idx=1, stages=("ledger",), in_plan=another_kernel
    ),
    "a slot lost from the plan's file": Mutation(
        "wq_b's entry", "LG01", SLOT, layer_idx=1, stages=("ledger",), in_plan=slot_lost
    ),
    "slot that the ledger never sees": Mutation(
        "kv_norm", "LG02", f"{LAYER}.attn.kv_norm", None, on_layer(1, around_the_ledger), 1
    ),
    "result of another dtype": Mutation(
        "the shared expert's, BF16", "K10", f"{LAYER}.ffn.shared_experts.w2", None, on_layer(1, narrow_result), 1
    ),
    "quantiser rounds halves up": Mutation(
        "the indexer's FP8 inputs",
        "K03",
        INDEX_SLOT,
        None,
        on_part(rounds_half_up),
        1,
        LOAD_AND_KERNELS,
        is_official=True,
    ),
    "keys not rounded": Mutation(
        "FP8 keys", "V10", LAYER, None, on_layer(1, keys_as_they_are), 1, LAYERS, is_official=True
    ),
    "keys rounded more coarsely": Mutation(
        "FP8 keys",
        "K03",
        f"{LAYER}.attn.key_quantizer",
        None,
        on_layer(1, keys_too_coarse),
        1,
        LOAD_AND_KERNELS,
        is_official=True,
    ),
}
