"""The cache writes of a decode step on Hopper: one launch a layer.

How it works. A row has several programs, each with a role: the key and the raw rows; the main entry; the index entry.
The last two end at once unless the row ends a window, which is decided on the device, so that a captured graph serves
every position. An entry of 128 rows (512 KiB) is shared by several programs, each with slices of the channels, all
loads in flight at once; the one that arrives last norms it. A program never reads a row of a ring that this launch
writes: rows of the step come from the step, and what they replace is too old to be read. Where a request may have
several rows, an entry's row is of the step if the row at its distance has its slot and position.

Roofline. Launch latency: under 30 KB a row, and 768 KB where a window of 128 ends. Limits. 1 + ``spare`` rows of a
request, bfloat16 keys and float32 raw rows, head dims a power of two up to 512, ratios a power of two up to 128, 256
rows. A row's bits never depend on other requests, nor on which rows of its own are in its step. Fusion of products and
sums is off: rotations have torch's bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton

from ownpath.formats import KeyFormat
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.entries.checks import MAX_ROWS, check_call
from ownpath.kernels.entries.types import EntriesWeights, EntryAngles, LayerPools, RawRows, RowPlaces
from ownpath.kernels.entries.write import FP4_INDEX_PAGES, INDEX_PAGES, KEY_PAGES, VALUES, entries_kernel
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
NUM_WARPS = 4
TILE = 4096
"""Raw values that a program averages at a time: 32 a thread, for kv and scores each."""

INDEX_FORMS = {KeyFormat.BF16: VALUES, KeyFormat.FP8: INDEX_PAGES, KeyFormat.FP4: FP4_INDEX_PAGES}
EntriesCallKey = tuple[object, ...]
"""Shape, strides, dtype and device of every tensor of a call."""


@dataclass(frozen=True)
class EntriesOperand:
    """pooled: bfloat16 scratch [rows, H] for entries that several programs share; arrivals: int32 [rows], zeros between
    calls. launches: for calls that have passed every check."""

    weights: EntriesWeights
    pooled: torch.Tensor
    arrivals: torch.Tensor
    launches: LaunchCache[EntriesCallKey, TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonEntries:
    """Writes a step's keys, raw rows and finished entries to the pools, in place."""

    def prepare(self, weights: EntriesWeights) -> EntriesOperand:
        """Makes the operand. The first call raises for a weight that does not fit."""
        weight_D = weights.kv_norm.weight_D
        if weight_D is None:
            raise ValueError("kv_norm must have a weight")
        device = weight_D.device
        pooled = torch.empty(
            MAX_ROWS if num_slices(weights) > 1 else 1, len(weight_D), dtype=torch.bfloat16, device=device
        )
        return EntriesOperand(weights, pooled, torch.zeros(MAX_ROWS, dtype=torch.int32, device=device))

    def configs(self, operand: EntriesOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, raw: RawRows, operand: EntriesOperand) -> str:
        """Returns the variant's name, which depends on the layer alone."""
        main = operand.weights.main
        return variant_name("entries", ratio=0 if main is None else main.ratio)

    def run(
        self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, operand: EntriesOperand
    ) -> None:
        """Writes to the pools. Shapes: see the arguments' types; raw rows may be slices of wider ones.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        tensors = (*raw, *angles, *rows, *pools)
        key = tuple(
            [None if one is None else (one.shape, one.stride(), one.dtype, one.get_device()) for one in tensors]
        )
        call = operand.launches.get(key)
        # An absent tensor is not read: any address serves.
        addresses = [0 if one is None else one.data_ptr() for one in tensors]
        if call is None or any(address & 15 for address in addresses):
            _first(raw, angles, rows, pools, operand, key)
            return
        with operand.lock:
            call.start(current_stream(raw.kv_TH.get_device()), *addresses)

    def __call__(
        self, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools, weights: EntriesWeights
    ) -> None:
        """Writes to the pools, with the signature of the twin."""
        self.run(raw, angles, rows, pools, self.prepare(weights))


def num_slices(weights: EntriesWeights) -> int:
    """Returns how many slices a main entry's channels are averaged in; 0 in a layer without entries."""
    main = weights.main
    return 0 if main is None else max(1, main.num_rows * main.head_dim // TILE)


def num_parts(num_rows: int, weights: EntriesWeights) -> int:
    """Returns how many programs share a main entry: fewer where a step has many rows. A slice's bits do not depend on
    it."""
    most = 16 if num_rows <= 16 else 8 if num_rows <= 64 else 4
    return min(most, num_slices(weights))


def _first(
    raw: RawRows,
    angles: EntryAngles,
    rows: RowPlaces,
    pools: LayerPools,
    operand: EntriesOperand,
    key: EntriesCallKey,
) -> None:
    """Checks everything, launches, and caches the launch of this size."""
    weights, num_rows = operand.weights, len(raw.kv_TH)
    check_call(raw, angles, rows, pools, weights, INTERPRETED)
    if not num_rows:
        return
    tensors = [raw.kv_TH if one is None else one for one in (*raw, *angles, *rows, *pools)]
    strides = [0 if one is None else one.stride(0) for one in raw]
    parts = num_parts(num_rows, weights)
    call = launch(
        entries_kernel,
        (parts + (weights.index is not None) + 1, num_rows),
        (*tensors, *_fixed(operand), *strides, rows.blocks_TB.shape[1], *_epsilons(weights)),
        _constants(angles, weights, pools, parts),
        moving=range(len(tensors)),
    )
    if call is not None:
        operand.launches.add(key, call)


def _fixed(operand: EntriesOperand) -> tuple[torch.Tensor, ...]:
    """Returns the weights in the kernel's order; an absent one is replaced by a tensor that is not read."""
    weights, kv = operand.weights, operand.weights.kv_norm.weight_D
    assert kv is not None
    found = [kv]
    for compressor in (weights.main, weights.index):
        pair = (kv, kv) if compressor is None else (compressor.norm.weight_D, compressor.ape_LP)
        found += [kv if one is None else one for one in pair]
    return (*found, operand.pooled, operand.arrivals)


def _epsilons(weights: EntriesWeights) -> tuple[float, float, float]:
    main, index = (0.0 if one is None else one.norm.eps for one in (weights.main, weights.index))
    return weights.kv_norm.eps, main, index


def _constants(angles: EntryAngles, weights: EntriesWeights, pools: LayerPools, parts: int) -> dict[str, Any]:
    """Returns the kernel's constants and launch options."""
    main, index, pdl = weights.main, weights.index, not INTERPRETED
    kv = weights.kv_norm.weight_D
    assert kv is not None
    head_dim, index_dim = len(kv), 1 if index is None else index.head_dim
    return {
        "H": head_dim,
        "LOG_H": head_dim.bit_length() - 1,
        "HI": index_dim,
        "LOG_HI": index_dim.bit_length() - 1,
        "F": angles.cos_TF.shape[1],
        "WINDOW": weights.window_rows,
        "SPARE": weights.spare,
        "RATIO": 0 if main is None else main.ratio,
        "WINDOWS": 1 if main is None else main.num_windows,
        "PER_BLOCK": 1 if main is None else main.per_block,
        "HAS_INDEX": index is not None,
        "SLICE": head_dim // max(1, num_slices(weights)),
        "PARTS": parts,
        "FORM": KEY_PAGES.value if pools.has_key_pages else VALUES.value,
        "KEYS": str(weights.keys),
        "INDEX_FORM": INDEX_FORMS[pools.index_format(index_dim)].value,
        "INDEX_KEYS": str(weights.index_keys),
        "PDL": pdl,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
        "launch_pdl": pdl,
    }


ENTRIES = TritonEntries()
