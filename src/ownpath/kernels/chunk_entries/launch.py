"""The cache writes of a step with chunks, and near keys, on Hopper: one launch a layer, before it attends.

How it works. The first programs have the rows that end a window, as the host lists them: an entry's raw rows come from
the step where it has them, from the slot's ring where they are older; a decode step's code pools, norms, turns, rounds
and writes, so that both write the same bits. An entry of 128 rows is shared by several programs; the one that arrives
last norms it. Behind them each program copies one near key, of the step or of the ring. Rings are not written.

Roofline. Memory: 1 KiB read and written a near key; 4 KiB read a row and compressor of ratio 4 for the main entries, 8
times over but from L2. Limits. Those of a decode step's writes but for the number of rows. A row's bits never depend on
other requests, nor on which rows of its own are in its step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton

from ownpath.kernels.chunk_entries.checks import check_call, num_pairs_of
from ownpath.kernels.chunk_entries.types import ChunkPlaces, EndingRows
from ownpath.kernels.chunk_entries.write import chunk_entries_kernel
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.entries.launch import INDEX_FORMS, NUM_WARPS, num_slices
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows
from ownpath.kernels.entries.write import KEY_PAGES, VALUES
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MOST_PARTS = 8
"""Programs that share an entry of 128 rows, at most; the same in every step, so that no later one compiles."""
ChunkEntriesKey = tuple[object, ...]
"""Shape, strides, dtype and device of every tensor of a call."""


@dataclass
class SharedEntries:
    """Scratch of entries that several programs share. pooled: bfloat16 [E, H]; arrivals: int32 [E], zeros between
    calls. Both grow with the calls; outgrown ones are kept, as captured graphs refer to them."""

    pooled: torch.Tensor
    arrivals: torch.Tensor
    outgrown: list[torch.Tensor] = field(default_factory=list)

    def grow(self, num_ends: int) -> None:
        """Makes room for so many entries."""
        if num_ends > len(self.arrivals):
            count = 1 << (num_ends - 1).bit_length()
            self.outgrown += [self.pooled, self.arrivals]
            self.pooled = self.pooled.new_empty((count, self.pooled.shape[1]))
            self.arrivals = self.arrivals.new_zeros(count)


@dataclass(frozen=True)
class ChunkEntriesOperand:
    """launches: for calls that have passed every check."""

    weights: EntriesWeights
    scratch: SharedEntries
    launches: LaunchCache[ChunkEntriesKey, TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonChunkEntries:
    """Near keys of a step, and its finished entries, written to the pools in place."""

    def prepare(self, weights: EntriesWeights) -> ChunkEntriesOperand:
        """Makes the operand. The first call raises for a weight that does not fit."""
        weight_D = weights.kv_norm.weight_D
        if weight_D is None:
            raise ValueError("kv_norm must have a weight")
        pooled = torch.empty(1, len(weight_D), dtype=torch.bfloat16, device=weight_D.device)
        return ChunkEntriesOperand(
            weights, SharedEntries(pooled, torch.zeros(1, dtype=torch.int32, device=weight_D.device))
        )

    def configs(self, operand: ChunkEntriesOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, raw: RawRows, operand: ChunkEntriesOperand) -> str:
        """Returns the variant's name, which depends on the layer alone."""
        main = operand.weights.main
        return variant_name("chunk_entries", ratio=0 if main is None else main.ratio)

    def run(
        self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, operand: ChunkEntriesOperand
    ) -> torch.Tensor:
        """Writes to the pools and returns near keys [W, H]. Raw rows may be slices of wider ones.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        given = (*raw, *ends, *places, *pools)
        key = tuple([None if one is None else (one.shape, one.stride(), one.dtype, one.get_device()) for one in given])
        with operand.lock:
            if num_slices(operand.weights) > 1 and ends.rows_E is not None:
                operand.scratch.grow(len(ends.rows_E))
            call = operand.launches.get(key)
            # An absent tensor is not read: any address serves.
            addresses = [0 if one is None else one.data_ptr() for one in given]
            if call is None or any(address & 15 for address in addresses):
                return _first(raw, ends, places, pools, operand, key)
            near_WH = raw.kv_TH.new_empty((len(places.sources_W), raw.kv_TH.shape[1]))
            scratch = operand.scratch
            addresses += [near_WH.data_ptr(), scratch.pooled.data_ptr(), scratch.arrivals.data_ptr()]
            call.start(current_stream(raw.kv_TH.get_device()), *addresses)
        return near_WH

    def __call__(
        self, raw: RawRows, ends: EndingRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights
    ) -> torch.Tensor:
        """Writes to the pools and returns near keys, with the signature of the twin."""
        return self.run(raw, ends, places, pools, self.prepare(weights))


def _first(
    raw: RawRows,
    ends: EndingRows,
    places: ChunkPlaces,
    pools: LayerPools,
    operand: ChunkEntriesOperand,
    key: ChunkEntriesKey,
) -> torch.Tensor:
    """Checks everything, launches, and caches the launch of this size."""
    weights, scratch = operand.weights, operand.scratch
    check_call(raw, ends, places, pools, weights, INTERPRETED)
    near_WH = raw.kv_TH.new_empty((len(places.sources_W), raw.kv_TH.shape[1]))
    num_ends = 0 if weights.main is None or ends.rows_E is None else len(ends.rows_E)
    parts = min(MOST_PARTS, num_slices(weights))
    num_programs = num_ends * (parts + (weights.index is not None)) + len(near_WH)
    if not num_programs:
        return near_WH
    given = (*raw, *ends, *places, *pools)
    tensors = [*(raw.kv_TH if one is None else one for one in given), near_WH, scratch.pooled, scratch.arrivals]
    strides = [0 if one is None else one.stride(0) for one in raw]
    epsilons = (0.0 if one is None else one.norm.eps for one in (weights.main, weights.index))
    call = launch(
        chunk_entries_kernel,
        (num_programs,),
        (*tensors, *_fixed(weights), *strides, places.blocks_RB.shape[1], num_ends, *epsilons),
        _constants(num_pairs_of(ends), weights, pools, parts),
        moving=range(len(tensors)),
    )
    if call is not None:
        operand.launches.add(key, call)
    return near_WH


def _fixed(weights: EntriesWeights) -> tuple[torch.Tensor, ...]:
    """Returns the compressors' weights in the kernel's order; an absent one is replaced by one that is not read."""
    kv, found = weights.kv_norm.weight_D, list[torch.Tensor | None]()
    assert kv is not None
    for compressor in (weights.main, weights.index):
        found += (None, None) if compressor is None else (compressor.norm.weight_D, compressor.ape_LP)
    return tuple(kv if one is None else one for one in found)


def _constants(num_pairs: int, weights: EntriesWeights, pools: LayerPools, parts: int) -> dict[str, Any]:
    """Returns the kernel's constants and launch options."""
    main, index, kv = weights.main, weights.index, weights.kv_norm.weight_D
    assert kv is not None
    head_dim, index_dim = len(kv), 1 if index is None else index.head_dim
    return {
        "H": head_dim,
        "LOG_H": head_dim.bit_length() - 1,
        "HI": index_dim,
        "LOG_HI": index_dim.bit_length() - 1,
        "F": num_pairs,
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
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


CHUNK_ENTRIES = TritonChunkEntries()
"""Near keys and finished entries of a step with chunks."""
