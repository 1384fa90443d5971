"""Checks of a decode attention call: a wrong argument raises a ValueError that names it."""

import torch

from ownpath.kernels.attend.types import KEY_BYTES, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.checks import VECTOR_BYTES, check, check_alignment, check_rank, check_spare

HEAD_DIM, NUM_ROTARY, MOST_HEADS = 512, 64, 128
PER_BLOCK = {4: 64, 128: 2}
"""Compress ratio -> entries of a block of 256 tokens."""
INT32 = (torch.int32,)
FLOAT32 = (torch.float32,)


def check_call(
    q_TNH: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    keys: DecodeKeys,
    rows: DecodeRows,
    weights: AttendWeights,
    runs_on_cpu: bool,
) -> None:
    """Checks everything but output and workspace. Errors: ValueError naming the argument."""
    check_queries(q_TNH, runs_on_cpu)
    (num_rows, num_heads, _), device = q_TNH.shape, q_TNH.device
    for name, angle in zip(("cos_TF", "sin_TF"), angles, strict=True):
        check(name, angle, FLOAT32, (num_rows, NUM_ROTARY // 2), device)
    check("sink_N", weights.sink_N, FLOAT32, (num_heads,), device)
    if weights.num_rotary != NUM_ROTARY:
        raise ValueError(f"num_rotary must be {NUM_ROTARY}, found {weights.num_rotary}")
    check("positions_T", rows.positions_T, INT32, (num_rows,), device)
    check("slots_T", rows.slots_T, INT32, (num_rows,), device)
    if rows.blocks_TB.ndim != 2 or not rows.blocks_TB.shape[1]:
        raise ValueError(f"blocks_TB must be [{num_rows}, B], found {list(rows.blocks_TB.shape)}")
    check("blocks_TB", rows.blocks_TB, INT32, (num_rows, rows.blocks_TB.shape[1]), device)
    check_spare(weights.spare)
    _check_keys(keys, weights.ring_rows, device)
    _check_selection(keys, rows, num_rows, device)


def check_queries(q_TNH: torch.Tensor, runs_on_cpu: bool) -> None:
    """Checks raw queries. Errors: ValueError."""
    check_rank("q_TNH", q_TNH, 3, runs_on_cpu)
    if q_TNH.dtype is not torch.bfloat16 or q_TNH.shape[2] != HEAD_DIM or not 0 < q_TNH.shape[1] <= MOST_HEADS:
        found = f"{q_TNH.dtype} {list(q_TNH.shape)}"
        raise ValueError(f"q_TNH must be bfloat16 [T, up to {MOST_HEADS}, {HEAD_DIM}], found {found}")
    row, head, step = q_TNH.stride()
    if step != 1 or 2 * row % VECTOR_BYTES or 2 * head % VECTOR_BYTES:
        raise ValueError(f"q_TNH must have contiguous heads at multiples of 16 bytes, found {list(q_TNH.stride())}")
    check_alignment("q_TNH", q_TNH)


def _check_keys(keys: DecodeKeys, ring_rows: int, device: torch.device) -> None:
    if keys.ratio not in (0, *PER_BLOCK):
        raise ValueError(f"ratio must be 0, 4 or 128, found {keys.ratio}")
    if keys.ratio and keys.per_block != PER_BLOCK[keys.ratio]:
        raise ValueError(f"per_block must be {PER_BLOCK[keys.ratio]} at ratio {keys.ratio}, found {keys.per_block}")
    if (keys.entries is None) != (keys.ratio == 0):
        raise ValueError(f"entries must {'not ' if keys.ratio == 0 else ''}be given at ratio {keys.ratio}")
    check_pool("window", keys.window, ring_rows, keys.is_fp8, device)
    if keys.entries is not None:
        check_pool("entries", keys.entries, keys.per_block, keys.is_fp8, device)


def check_pool(name: str, pool: torch.Tensor, num_keys: int, is_fp8: bool, device: torch.device) -> None:
    """Checks a pool of pages of ``num_keys`` keys. Errors: ValueError."""
    dtype, width = (torch.uint8, num_keys * KEY_BYTES) if is_fp8 else (torch.bfloat16, HEAD_DIM)
    check(name, pool, (dtype,), (len(pool), width), device)
    if not is_fp8 and len(pool) % num_keys:
        raise ValueError(f"{name} must have a multiple of {num_keys} rows, found {len(pool)}")


def _check_selection(keys: DecodeKeys, rows: DecodeRows, num_rows: int, device: torch.device) -> None:
    selected, counts = rows.selected_TK, rows.num_selected_T
    if keys.ratio != 4:
        if selected is not None or counts is not None:
            raise ValueError("selected_TK and num_selected_T are given at ratio 4 only")
        return
    if selected is None or counts is None or selected.ndim != 2:
        raise ValueError("selected_TK [T, K] and num_selected_T [T] must be given at ratio 4")
    check("selected_TK", selected, INT32, (num_rows, selected.shape[1]), device)
    check("num_selected_T", counts, INT32, (num_rows,), device)


def check_out(out: torch.Tensor, q_TNH: torch.Tensor) -> None:
    """Checks the output. Errors: ValueError."""
    check("out", out, (torch.bfloat16,), tuple(q_TNH.shape), q_TNH.device)


def check_workspace(workspace: torch.Tensor, num_floats: int, device: torch.device) -> None:
    """Checks that the workspace is large enough. Errors: ValueError."""
    if workspace.dtype is not torch.float32 or workspace.ndim != 1 or len(workspace) < num_floats:
        found = f"{workspace.dtype} {list(workspace.shape)}"
        raise ValueError(f"workspace must be float32 [{num_floats}] or longer, found {found}")
    if workspace.device != device or not workspace.is_contiguous():
        raise ValueError(f"workspace must be contiguous on {device}")
    check_alignment("workspace", workspace)
