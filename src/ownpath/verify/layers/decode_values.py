"""Values of a decode step under the names of the model's taps and slots, from what its kernels take and return.

A decode step has no taps: norms, rotations, masks and the gate's logits never exist as tensors outside its kernels.

Legend: T rows, one for each sequence; C entries of a row's table, K selected rows.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch

from ownpath.kernels.scores.ref import entry_rows, visible_entries
from ownpath.kernels.scores.types import CSA_PAGES, IndexQuery, PagedRows
from ownpath.numerics import rotate_pairs, wide_dtype
from ownpath.ops import OpKind
from ownpath.runners import Route
from ownpath.trace.observers import CallArguments, Watched


def decode_values(call: Watched, kind: OpKind, args: CallArguments, result: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, value) pairs of one call of a decode step; none for kernels that show no such value."""
    slot = call.slot
    indexer = slot.replace(".decode.", ".indexer.").rpartition(".")[0]
    if kind is OpKind.INDEX_SCORES:
        query: IndexQuery = args[0]
        num_heads, dim = query.q_TIH.shape[1:]
        wide = wide_dtype(query.weights_TI.dtype)
        yield f"{indexer}.q", rotate_pairs(query.q_TIH, query.cos_TF, query.sin_TF)
        yield f"{indexer}.weights", query.weights_TI.to(wide) * (dim**-0.5 * num_heads**-0.5)
    elif kind is OpKind.ROUTE:
        ffn, route = slot.removesuffix(".decode.route"), cast(Route, call.runner)
        yield f"{ffn}.gate", route.logits(args[0])
        yield f"{ffn}.router.ids", result[0]
        yield f"{ffn}.router.weights", result[1]
    elif kind is OpKind.SELECT:
        for mask_1C in _masks(args[1], result[0], result[1]):
            yield f"{indexer}.mask", mask_1C


def _masks(rows: PagedRows, selected_TK: torch.Tensor, count_T: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the entries that each row attends to: bool [1, visible entries]."""
    pages = CSA_PAGES
    places_TC, visible_T = entry_rows(rows.blocks_TB, pages.per_block), visible_entries(rows, pages).sum(dim=1)
    for places_C, chosen_K, count, visible in zip(places_TC, selected_TK, count_T, visible_T, strict=True):
        yield torch.isin(places_C[: int(visible)], chosen_K[: int(count)].to(places_C.dtype))[None]
