"""Checks of a call of attention over chunks: a wrong argument raises a ValueError that names it."""

import torch

from ownpath.kernels.attend.checks import (
    FLOAT32,
    HEAD_DIM,
    INT32,
    NUM_ROTARY,
    PER_BLOCK,
    check_pool,
    check_queries,
)
from ownpath.kernels.attend.types import AttendWeights
from ownpath.kernels.checks import check
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows


def check_call(
    q_TNH: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    keys: ChunkKeys,
    rows: ChunkRows,
    weights: AttendWeights,
    runs_on_cpu: bool,
) -> None:
    """Checks everything but the output. Errors: ValueError naming the argument."""
    check_queries(q_TNH, runs_on_cpu)
    (num_rows, num_heads, _), device = q_TNH.shape, q_TNH.device
    for name, angle in zip(("cos_TF", "sin_TF"), angles, strict=True):
        check(name, angle, FLOAT32, (num_rows, NUM_ROTARY // 2), device)
    check("sink_N", weights.sink_N, FLOAT32, (num_heads,), device)
    if weights.num_rotary != NUM_ROTARY:
        raise ValueError(f"num_rotary must be {NUM_ROTARY}, found {weights.num_rotary}")
    for name in ("positions_T", "places_T", "requests_T"):
        check(name, getattr(rows, name), INT32, (num_rows,), device)
    if rows.blocks_RB.ndim != 2 or not rows.blocks_RB.numel():
        raise ValueError(f"blocks_RB must be [R, B], found {list(rows.blocks_RB.shape)}")
    check("blocks_RB", rows.blocks_RB, INT32, tuple(rows.blocks_RB.shape), device)
    _check_keys(keys, device)
    _check_selection(keys, rows, num_rows, device)


def _check_keys(keys: ChunkKeys, device: torch.device) -> None:
    if keys.ratio not in (0, *PER_BLOCK):
        raise ValueError(f"ratio must be 0, 4 or 128, found {keys.ratio}")
    if keys.ratio and keys.per_block != PER_BLOCK[keys.ratio]:
        raise ValueError(f"per_block must be {PER_BLOCK[keys.ratio]} at ratio {keys.ratio}, found {keys.per_block}")
    if (keys.entries is None) != (keys.ratio == 0):
        raise ValueError(f"entries must {'not ' if keys.ratio == 0 else ''}be given at ratio {keys.ratio}")
    check("near_WH", keys.near_WH, (torch.bfloat16,), (len(keys.near_WH), HEAD_DIM), device)
    if keys.entries is not None:
        check_pool("entries", keys.entries, keys.per_block, keys.is_fp8, device)


def _check_selection(keys: ChunkKeys, rows: ChunkRows, num_rows: int, device: torch.device) -> None:
    selected, counts = rows.selected_TK, rows.num_selected_T
    if keys.ratio != 4:
        if selected is not None or counts is not None:
            raise ValueError("selected_TK and num_selected_T are given at ratio 4 only")
        return
    if selected is None or counts is None or selected.ndim != 2:
        raise ValueError("selected_TK [T, K] and num_selected_T [T] must be given at ratio 4")
    check("selected_TK", selected, INT32, (num_rows, selected.shape[1]), device)
    check("num_selected_T", counts, INT32, (num_rows,), device)
