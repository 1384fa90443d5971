"""The rows that a step with chunks leaves in the rings, on Hopper: one launch a layer, behind its other kernels.

How it works. A program has a row of the step. It copies the row's key and raw rows to the rings of its slot unless a
later row of its request goes to the same place, which it sees from the request of the row that is a ring's length on:
of a prompt's thousands of rows all but the last 128 end at once. So no two programs write to the same row.

Roofline. Launch latency: at most 128 keys and 136 raw rows of a request, 1.2 MB. Limits. Those of ``chunk_entries``.
FP8 pages get the bits that a decode step writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton

from ownpath.kernels.chunk_entries.checks import NUM_PAIRS, check_rings
from ownpath.kernels.chunk_entries.types import ChunkPlaces
from ownpath.kernels.chunk_entries.write import chunk_rings_kernel
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.entries.launch import NUM_WARPS
from ownpath.kernels.entries.types import EntriesWeights, LayerPools, RawRows
from ownpath.kernels.entries.write import KEY_PAGES, VALUES
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
ChunkRingsKey = tuple[object, ...]
"""Shape, strides, dtype and device of every tensor of a call."""


@dataclass(frozen=True)
class ChunkRingsOperand:
    """launches: for calls that have passed every check."""

    weights: EntriesWeights
    launches: LaunchCache[ChunkRingsKey, TritonCall] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonChunkRings:
    """The last rows of each request, written to the rings in place."""

    def prepare(self, weights: EntriesWeights) -> ChunkRingsOperand:
        """Makes the operand."""
        return ChunkRingsOperand(weights)

    def configs(self, operand: ChunkRingsOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, raw: RawRows, operand: ChunkRingsOperand) -> str:
        """Returns the variant's name, which depends on the layer alone."""
        main = operand.weights.main
        return variant_name("chunk_rings", ratio=0 if main is None else main.ratio)

    def run(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools, operand: ChunkRingsOperand) -> None:
        """Writes to the pools. Raw rows may be slices of wider ones.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        tensors = _tensors(raw, places, pools)
        key = tuple([(one.shape, one.stride(), one.dtype, one.get_device()) for one in tensors])
        call, addresses = operand.launches.get(key), [one.data_ptr() for one in tensors]
        if call is None or any(address & 15 for address in addresses):
            _first(raw, places, pools, operand, key)
            return
        with operand.lock:
            call.start(current_stream(raw.kv_TH.get_device()), *addresses)

    def __call__(self, raw: RawRows, places: ChunkPlaces, pools: LayerPools, weights: EntriesWeights) -> None:
        """Writes to the pools, with the signature of the twin."""
        self.run(raw, places, pools, self.prepare(weights))


def _tensors(raw: RawRows, places: ChunkPlaces, pools: LayerPools) -> list[torch.Tensor]:
    """Returns what the kernel reads and writes, in its order; an absent tensor is replaced by one that is not read."""
    found = (*raw, *places[:3], pools.window, pools.main_state, pools.index_state)
    return [raw.kv_TH if one is None else one for one in found]


def _first(
    raw: RawRows, places: ChunkPlaces, pools: LayerPools, operand: ChunkRingsOperand, key: ChunkRingsKey
) -> None:
    """Checks everything, launches, and caches the launch of this size."""
    weights, num_rows = operand.weights, len(raw.kv_TH)
    check_rings(raw, places, pools, weights, INTERPRETED)
    if not num_rows:
        return
    tensors = _tensors(raw, places, pools)
    call = launch(
        chunk_rings_kernel,
        (num_rows,),
        (*tensors, *(one.stride(0) for one in tensors[: len(raw)]), num_rows),
        _constants(raw.kv_TH.shape[1], weights, pools),
        moving=range(len(tensors)),
    )
    if call is not None:
        operand.launches.add(key, call)


def _constants(head_dim: int, weights: EntriesWeights, pools: LayerPools) -> dict[str, Any]:
    """Returns the kernel's constants and launch options."""
    main, index = weights.main, weights.index
    return {
        "H": head_dim,
        "HI": 1 if index is None else index.head_dim,
        "F": NUM_PAIRS,
        "WINDOW": weights.window_rows,
        "RAW_ROWS": 0 if main is None else weights.state_rows(main),
        "WINDOWS": 1 if main is None else main.num_windows,
        "HAS_INDEX": index is not None,
        "FORM": KEY_PAGES.value if pools.has_key_pages else VALUES.value,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


CHUNK_RINGS = TritonChunkRings()
"""The rows that a step with chunks leaves in the rings."""
