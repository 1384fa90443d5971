"""Checks of the operands before a launch: a wrong tensor raises a ValueError that names it."""

import torch

from ownpath.kernels.checks import check, check_rank
from ownpath.kernels.chunk_entries.types import ChunkPlaces, EndingRows
from ownpath.kernels.entries.checks import check_layer, check_rows, check_width
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows

INT32, FLOAT32 = (torch.int32,), (torch.float32,)
NUM_PAIRS = 32
"""Rotary pairs of a key where no entry's angles tell them."""


def num_pairs_of(ends: EndingRows) -> int:
    """Returns the rotary pairs of the layer's keys."""
    return NUM_PAIRS if ends.cos_EF is None else ends.cos_EF.shape[-1]


def check_call(
    raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights, on_cpu: bool
) -> None:
    """Checks all operands. Errors: ValueError naming the first that does not fit."""
    check_rank("kv_TH", raw.kv_TH, 2, on_cpu)
    (num_rows, head_dim), device = raw.kv_TH.shape, raw.kv_TH.device
    check_width("kv_TH", head_dim, num_pairs_of(ends), weights.keys)
    check_rows("kv_TH", raw.kv_TH, torch.bfloat16, (num_rows, head_dim), device)
    for name in ("positions_T", "requests_T"):
        check(name, getattr(places, name), INT32, (num_rows,), device)
    check("slots_R", places.slots_R, INT32, (len(places.slots_R),), device)
    num_blocks = places.blocks_RB.shape[1:2]
    check("blocks_RB", places.blocks_RB, INT32, (len(places.slots_R), *num_blocks), device)
    check("sources_W", places.sources_W, INT32, (len(places.sources_W),), device)
    _check_ends(ends, device, is_needed=weights.main is not None)
    check_layer(raw, pools, weights, num_pairs_of(ends))


def check_rings(raw: RawRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights, on_cpu: bool) -> None:
    """Checks the operands of what is left in the rings. Errors: ValueError naming the first that does not fit."""
    check_rank("kv_TH", raw.kv_TH, 2, on_cpu)
    (num_rows, head_dim), device = raw.kv_TH.shape, raw.kv_TH.device
    check_width("kv_TH", head_dim, NUM_PAIRS, weights.keys)
    check_rows("kv_TH", raw.kv_TH, torch.bfloat16, (num_rows, head_dim), device)
    for name in ("positions_T", "requests_T"):
        check(name, getattr(places, name), INT32, (num_rows,), device)
    check("slots_R", places.slots_R, INT32, (len(places.slots_R),), device)
    check_layer(raw, pools, weights, NUM_PAIRS)


def _check_ends(ends: EndingRows, device: torch.device, is_needed: bool) -> None:
    if not is_needed:
        return
    rows_E, *angles = ends
    if rows_E is None:
        raise ValueError("rows_E is needed in a layer with a compressor")
    check("rows_E", rows_E, INT32, (len(rows_E),), device)
    for name, angle in zip(("cos_EF", "sin_EF"), angles, strict=True):
        if angle is None:
            raise ValueError(f"{name} is needed in a layer with a compressor")
        check(name, angle, FLOAT32, (len(rows_E), num_pairs_of(ends)), device)
