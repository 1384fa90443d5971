"""Checks of the operands before a launch: a wrong tensor raises a ValueError that names it."""

from collections.abc import Iterator

import torch

from ownpath.formats import FP4_INDEX_BYTES, KeyFormat
from ownpath.kernels.checks import VECTOR_BYTES, check, check_alignment, check_rank, check_spare
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.types import (
    CompressorWeights,
    EntriesWeights,
    EntryAngles,
    KeyRounding,
    LayerPools,
    RawRows,
    RowPlaces,
)

MAX_ROWS = 256
"""Rows of a step: the operand has a counter, and scratch, for each."""
MAX_HEAD_DIM = 512
FLOATS = (torch.float32, torch.bfloat16)
FP8_BLOCK, FP4_BLOCK = 64, 32
KEY_EXTRA, INDEX_EXTRA = 72, 4
"""Bytes of a key in FP8 pages beyond one for each channel: 64 for the BF16 channels and 8 of scales; one scale."""
FP4_INDEX_DIM = 128
"""Channels of index keys in FP4 pages."""
CompressorCall = tuple[str, CompressorWeights, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""A compressor's name, its weights, the step's raw rows, its state and its entries."""


def check_call(
    raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, weights: EntriesWeights, on_cpu: bool
) -> None:
    """Checks all operands. Errors: ValueError naming the first that does not fit."""
    check_rank("kv_TH", raw.kv_TH, 2, on_cpu)
    (num_rows, head_dim), device = raw.kv_TH.shape, raw.kv_TH.device
    if num_rows > MAX_ROWS:
        raise ValueError(f"a step may have {MAX_ROWS} rows, found {num_rows}")
    num_pairs = angles.cos_TF.shape[-1]
    check_width("kv_TH", head_dim, num_pairs, weights.keys)
    check_rows("kv_TH", raw.kv_TH, torch.bfloat16, (num_rows, head_dim), device)
    _check_norm("kv_norm", weights.kv_norm, head_dim, device)
    check("positions_T", rows.positions_T, (torch.int32,), (num_rows,), device)
    check("slots_T", rows.slots_T, (torch.int32,), (num_rows,), device)
    check("blocks_TB", rows.blocks_TB, (torch.int32,), (num_rows, *rows.blocks_TB.shape[1:2]), device)
    _check_angles(angles, num_rows, device, has_first=weights.main is not None)
    check_layer(raw, pools, weights, num_pairs)


def check_layer(raw: RawRows, pools: LayerPools, weights: EntriesWeights, num_pairs: int) -> None:
    """Checks a layer's weights and pools, and the raw rows of its compressors. num_pairs: rotary pairs of a key.
    Errors: ValueError naming the first that does not fit."""
    (num_rows, head_dim), device = raw.kv_TH.shape, raw.kv_TH.device
    check_spare(weights.spare)
    _check_pool("window", pools.window, torch.bfloat16, (weights.window_rows, head_dim), device)
    if pools.has_key_pages and (head_dim, num_pairs) != (512, 32):
        raise ValueError(f"FP8 pages hold keys of 512 channels, 64 of them rotary, found {head_dim}")
    entries = pools.main_entries
    if entries is not None and entries.itemsize != pools.window.itemsize:
        raise ValueError(f"main_entries must have the window's form, found {entries.dtype} and {pools.window.dtype}")
    if weights.main is None and weights.index is not None:
        raise ValueError("an index compressor needs a main compressor")
    if weights.main is not None and weights.index is not None and weights.index.ratio != weights.main.ratio:
        raise ValueError(f"the compressors' ratios differ: {weights.main.ratio} and {weights.index.ratio}")
    for call in _compressors(raw, pools, weights):
        _check_compressor(call, num_rows, weights.spare, device)
    if weights.main is not None and weights.main.head_dim != head_dim:
        raise ValueError(f"the main compressor has entries of {weights.main.head_dim} channels, keys have {head_dim}")
    if pools.has_index_pages and weights.index is not None:
        is_fp4 = pools.index_format(weights.index.head_dim) is KeyFormat.FP4
        if is_fp4 and weights.index.head_dim != FP4_INDEX_DIM:
            raise ValueError(f"FP4 pages hold index keys of {FP4_INDEX_DIM} channels, not {weights.index.head_dim}")
    if weights.index is not None:
        check_width("index entries", weights.index.head_dim, num_pairs, weights.index_keys)


def _compressors(raw: RawRows, pools: LayerPools, weights: EntriesWeights) -> Iterator[CompressorCall]:
    if weights.main is not None:
        yield "main", weights.main, raw.main_TP2, pools.main_state, pools.main_entries
    if weights.index is not None:
        yield "index", weights.index, raw.index_TP2, pools.index_state, pools.index_entries


def _check_compressor(call: CompressorCall, num_rows: int, spare: int, device: torch.device) -> None:
    name, weights, raw, state, entries = call
    width = weights.num_windows * weights.head_dim
    if raw is None or state is None or entries is None:
        raise ValueError(f"the {name} compressor needs its raw rows, state and entries")
    if not 0 < weights.ratio <= 128 or weights.ratio & (weights.ratio - 1):
        raise ValueError(f"ratio must be a power of two up to 128, found {weights.ratio}")
    check_rows(f"{name}_TP2", raw, torch.float32, (num_rows, 2 * width), device)
    check(f"{name} ape_LP", weights.ape_LP, (torch.float32,), (weights.ratio, width), device)
    _check_norm(f"{name} norm", weights.norm, weights.head_dim, device)
    _check_pool(f"{name}_state", state, torch.float32, (weights.num_rows + spare, 2 * width), device)
    _check_pool(f"{name}_entries", entries, torch.bfloat16, (weights.per_block, weights.head_dim), device)


def check_width(name: str, width: int, num_pairs: int, rounding: KeyRounding) -> None:
    """Checks the channels of a key that is rounded in blocks. Errors: ValueError."""
    num_rotary = 2 * num_pairs
    if width & (width - 1) or not 0 < num_rotary <= width <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: {width} channels, must be a power of two from {num_rotary} to {MAX_HEAD_DIM}")
    if rounding is KeyRounding.FP8 and (width % FP8_BLOCK or num_rotary % FP8_BLOCK):
        raise ValueError(f"{name}: {width} channels, {num_rotary} rotary: FP8 takes multiples of {FP8_BLOCK}")
    if rounding is KeyRounding.FP4 and width % FP4_BLOCK:
        raise ValueError(f"{name}: {width} channels: FP4 takes multiples of {FP4_BLOCK}")


def check_rows(name: str, rows: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    """Checks rows that may be slices of wider ones."""
    if rows.dtype is not dtype or rows.shape != shape or rows.device != device:
        found = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, found {found}")
    pitch = rows.stride(0) * rows.element_size()
    if rows.stride(1) != 1 or (len(rows) > 1 and pitch % VECTOR_BYTES):
        raise ValueError(f"{name} must have contiguous rows at multiples of 16 bytes, found {list(rows.stride())}")
    check_alignment(name, rows)


def _check_pool(name: str, pool: torch.Tensor, dtype: torch.dtype, page: tuple[int, int], device: torch.device) -> None:
    """Checks that a pool consists of whole pages. page: its rows and channels.

    A pool of bfloat16 may have pages instead, of rows as the main or the index entries have them.
    """
    num_rows, width = page
    if dtype is torch.bfloat16 and pool.dtype is torch.uint8:
        num_bytes = width + INDEX_EXTRA if name == "index_entries" else width + KEY_EXTRA
        if name == "index_entries" and pool.shape[-1] == num_rows * FP4_INDEX_BYTES:
            num_bytes = FP4_INDEX_BYTES
        check(name, pool, (torch.uint8,), (len(pool), num_rows * num_bytes), device)
        return
    if pool.ndim != 2 or not len(pool) or len(pool) % num_rows:
        raise ValueError(f"{name} must consist of pages of {num_rows} rows, found {list(pool.shape)}")
    check(name, pool, (dtype,), (len(pool), width), device)


def _check_norm(name: str, norm: NormWeights, width: int, device: torch.device) -> None:
    if norm.weight_D is None:
        raise ValueError(f"{name} must have a weight")
    check(name, norm.weight_D, FLOATS, (width,), device)


def _check_angles(angles: EntryAngles, num_rows: int, device: torch.device, has_first: bool) -> None:
    shape = (num_rows, angles.cos_TF.shape[-1])
    for name, tensor in zip(angles._fields, angles, strict=True):
        if tensor is not None:
            check(name, tensor, (torch.float32,), shape, device)
        elif has_first:
            raise ValueError(f"{name} is needed in a layer with a compressor")
