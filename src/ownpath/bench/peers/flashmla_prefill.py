"""FlashMLA's sparse prefill, of the library that vLLM ships: one list of BF16 keys for each row.

It takes normed, rotated queries and leaves the result rotated; both are done outside of the timed call. So is, in its
bare form, the array of all keys that its lists point into: a bound of what it could do, for its users make that array
in every call. Entries in FP8 pages become BF16 by a kernel of ours (``pages``): theirs is not in its library.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.contender import Missing
from ownpath.bench.kernel import Bound, NotApplicable
from ownpath.bench.peers import missing_library
from ownpath.bench.peers.flashmla import FILE, JUDGED_ROWS
from ownpath.bench.peers.pages import bf16_keys
from ownpath.conformance.attend import HEAD_DIM
from ownpath.conformance.bounds import relative_l2
from ownpath.conformance.chunks import ChunkInputs, exact_chunk
from ownpath.kernels.attend.ref import take_keys
from ownpath.kernels.attend.types import WINDOW_ROWS
from ownpath.kernels.norms.ref import rms_norm
from ownpath.numerics import rotate_pairs

LIST_MULTIPLE = 128
"""It takes two tiles of 64 keys at a time; a list that ends before is filled with -1, whose time it pays."""


class FlashMlaPrefill:
    """``sparse_prefill_fwd``. gathers: near keys and entries are put into one BF16 array within the timed call."""

    is_peer = True
    max_rel_l2 = 1e-2
    """Weights and result rounded to BF16, and its own order of sums."""

    def __init__(self, library: Path | None, *, gathers: bool) -> None:
        self._library, self._gathers = library, gathers
        self.name = "flashmla+gather" if gathers else "flashmla"

    def missing(self, device: str) -> Missing | None:
        """Requires CUDA and the library."""
        return missing_library("flashmla", FILE, self._library, device)

    def bind(self, sets: Sequence[ChunkInputs]) -> Bound:
        first = sets[0]
        if first.q_TNH.shape[1] not in (64, 128) or len(first.rows.blocks_RB) > 1:
            raise NotApplicable("compared with 64 or 128 heads, one request")
        torch.ops.load_library(str(self._library))
        operation = torch.ops._flashmla_C.sparse_prefill_fwd
        lists, entry_rows = _lists(first)
        entry_rows = entry_rows.int() if first.keys.is_fp8 else entry_rows
        calls = [self._call(operation, one, lists, entry_rows) for one in sets]

        def judge() -> None:
            part = first.part(slice(JUDGED_ROWS))
            out = rotate_pairs(calls[0]()[0][:JUDGED_ROWS], part.cos_TF, -part.sin_TF)
            distance = relative_l2(out, exact_chunk(part).value)
            assert distance <= self.max_rel_l2, f"relative L2 {distance:.2e}"

        return Bound(calls, judge)

    def _call(self, operation: Any, inputs: ChunkInputs, lists: torch.Tensor, entry_rows: torch.Tensor) -> Any:
        weights, keys = inputs.weights, inputs.keys
        q_TNH = rotate_pairs(rms_norm(inputs.q_TNH, None, weights.eps), inputs.cos_TF, inputs.sin_TF)

        def gather() -> torch.Tensor:
            if keys.entries is None:
                return keys.near_WH[:, None]
            if not keys.is_fp8:
                return torch.cat((keys.near_WH, take_keys(keys.entries, entry_rows, torch.bfloat16)))[:, None]
            all_keys = keys.near_WH.new_empty(len(keys.near_WH) + len(entry_rows), 1, HEAD_DIM)
            all_keys[: len(keys.near_WH), 0] = keys.near_WH
            bf16_keys(keys.entries, entry_rows, keys.per_block, all_keys[len(keys.near_WH) :, 0])
            return all_keys

        ready = gather()
        behind = (lists, weights.softmax_scale, HEAD_DIM, weights.sink_N)
        optional = [None] * (len(operation.default._schema.arguments) - 2 - len(behind))

        def run() -> Any:
            return operation(q_TNH, gather() if self._gathers else ready, *behind, *optional)

        return run


def _lists(inputs: ChunkInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each row's list int32 [T, 1, K] into near keys and, behind them, the request's entries, -1 behind its
    end; and the rows of the pool of those entries, in their order."""
    keys, rows, device = inputs.keys, inputs.rows, inputs.q_TNH.device
    age_K = torch.arange(WINDOW_ROWS, device=device)
    near_TK = torch.where(age_K <= rows.positions_T[:, None], rows.places_T[:, None] - age_K, -1)
    if keys.entries is None:
        return near_TK.int()[:, None].contiguous(), age_K
    count = (int(rows.positions_T.max()) + 1) // keys.ratio
    entries_C = torch.arange(count, device=device)
    pool_C = rows.blocks_RB[0, entries_C // keys.per_block].long() * keys.per_block + entries_C % keys.per_block
    found_TC = torch.where(entries_C < ((rows.positions_T + 1) // keys.ratio)[:, None], entries_C, -1)
    if rows.selected_TK is not None and rows.num_selected_T is not None:
        number = torch.zeros(int(pool_C.max()) + 1, dtype=torch.int64, device=device)
        number[pool_C] = entries_C
        is_there = torch.arange(rows.selected_TK.shape[1], device=device) < rows.num_selected_T[:, None]
        found_TC = torch.where(is_there, number[torch.where(is_there, rows.selected_TK, pool_C[0]).long()], -1)
    listed = torch.cat((near_TK, torch.where(found_TC >= 0, found_TC + len(keys.near_WH), -1)), dim=1)
    listed = torch.nn.functional.pad(listed, (0, -listed.shape[1] % LIST_MULTIPLE), value=-1)
    return listed.int()[:, None].contiguous(), pool_C
