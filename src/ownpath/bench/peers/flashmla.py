"""FlashMLA's sparse decode, of the library that vLLM ships: the window as its list, entries as its extra list.

It takes normed, rotated queries and leaves the result rotated; both are done outside of the timed call, and so is its
plan, which a step's layers share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.contender import Missing
from ownpath.bench.kernel import Bound, NotApplicable
from ownpath.bench.peers import missing_library
from ownpath.conformance.attend import HEAD_DIM, AttendInputs, exact_attention
from ownpath.conformance.bounds import relative_l2
from ownpath.kernels.attend.ref import entry_rows
from ownpath.kernels.attend.types import KEY_BYTES, WINDOW_ROWS
from ownpath.kernels.norms.ref import rms_norm
from ownpath.numerics import rotate_pairs

FILE = "_flashmla_C.abi3.so"
LIST_MULTIPLE = 64
JUDGED_ROWS = 16


class FlashMla:
    """``sparse_decode_fwd``, on FP8 pages only."""

    name, is_peer = "flashmla", True
    max_rel_l2 = 1e-2
    """Weights and result rounded to BF16, and its own order of sums."""

    def __init__(self, library: Path | None) -> None:
        self._library = library

    def missing(self, device: str) -> Missing | None:
        """Requires CUDA and the library."""
        return missing_library("flashmla", FILE, self._library, device)

    def bind(self, sets: Sequence[AttendInputs]) -> Bound:
        if not sets[0].keys.is_fp8:
            raise NotApplicable("takes FP8 keys only; the case of FP8 keys has its time")
        if not sets[0].q_TNH.shape[1] >= 64:
            raise NotApplicable("takes 64 or 128 heads")
        torch.ops.load_library(str(self._library))
        operation = torch.ops._flashmla_C.sparse_decode_fwd
        calls, outs = zip(*(_call(operation, one) for one in sets), strict=True)

        def judge() -> None:
            first, out = sets[0].first(JUDGED_ROWS), outs[0][:JUDGED_ROWS]
            turned = rotate_pairs(out, first.cos_TF, -first.sin_TF)
            distance = relative_l2(turned, exact_attention(first).value)
            assert distance <= self.max_rel_l2, f"relative L2 {distance:.2e}"

        return Bound(calls, judge)


def _call(operation: Any, inputs: AttendInputs) -> tuple[Any, torch.Tensor]:
    """Returns a call with its plan made, and the first result."""
    rows, keys, device = inputs.rows, inputs.keys, inputs.q_TNH.device
    q = rotate_pairs(rms_norm(inputs.q_TNH, None, inputs.weights.eps), inputs.cos_TF, inputs.sin_TF).unsqueeze(1)
    ring = (rows.slots_T[:, None] * WINDOW_ROWS + torch.arange(WINDOW_ROWS, device=device)).int().unsqueeze(1)
    length = (rows.positions_T + 1).clamp(max=WINDOW_ROWS).int()
    window = keys.window.view(-1, WINDOW_ROWS, 1, KEY_BYTES)
    extra = _extra(inputs)
    more = (None,) if len(operation.default._schema.arguments) > 12 else ()

    def run(plan: Any, splits: Any) -> Any:
        fixed = (*extra, HEAD_DIM, inputs.weights.softmax_scale, *more)
        return operation(q, window, ring, length, inputs.weights.sink_N, plan, splits, *fixed)

    out, _, plan, splits = run(None, None)
    return lambda: run(plan, splits), out.squeeze(1)


def _extra(inputs: AttendInputs) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns the entries' pages, each row's list of them, and the lists' lengths."""
    keys, device = inputs.keys, inputs.q_TNH.device
    if keys.entries is None:
        return None, None, None
    listed = [entry_rows(keys, inputs.rows, row) for row in range(len(inputs.q_TNH))]
    width = -(-max(map(len, listed)) // LIST_MULTIPLE) * LIST_MULTIPLE
    lists = torch.zeros(len(listed), 1, width, dtype=torch.int32, device=device)
    for row, entries in enumerate(listed):
        lists[row, 0, : len(entries)] = entries
    lengths = torch.tensor([len(entries) for entries in listed], dtype=torch.int32, device=device)
    return keys.entries.view(-1, keys.per_block, 1, KEY_BYTES), lists, lengths
