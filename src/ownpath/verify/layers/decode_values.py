"""Values of a line of kernels under the names of the model's taps and slots, from what its kernels take and return.

Lines, of decode steps and of chunks, have no taps but of keys: norms, rotations, masks and the gate's logits never
exist as tensors outside their kernels.

Legend: T rows; C entries of a row's table, K selected rows.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch

from ownpath.kernels.norms.ref import rms_norm, rms_norm_stepwise
from ownpath.kernels.scores.ref import entry_rows, visible_entries
from ownpath.kernels.scores.types import CSA_PAGES, IndexQuery, PagedRows
from ownpath.numerics import rotate_pairs, wide_dtype
from ownpath.ops import OpKind
from ownpath.runners import ChunkAttention, Route
from ownpath.trace.observers import CallArguments, Watched


def decode_values(call: Watched, kind: OpKind, args: CallArguments, result: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, value) pairs of one call of a line; none for kernels that show no such value."""
    slot = call.slot
    line = slot.rpartition(".")[0]
    attn = line.rpartition(".")[0]
    indexer = f"{attn}.indexer"
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
        masks = [*_masks(args[1], result[0], result[1])]
        for of in _sequences(args[1]) if line.endswith(".chunk") else map(_one, range(len(masks))):
            width = masks[of.stop - 1].shape[1]
            padded = [torch.nn.functional.pad(mask_1C, (0, width - mask_1C.shape[1])) for mask_1C in masks[of]]
            yield f"{indexer}.mask", torch.cat(padded)
    elif kind is OpKind.ATTEND_CHUNK:
        q_TNH, cos_TF, sin_TF = args[:3]
        weights = cast(ChunkAttention, call.runner).weights
        norm = rms_norm_stepwise if weights.is_stepwise else rms_norm
        yield f"{attn}.q", rotate_pairs(norm(q_TNH, None, weights.eps), cos_TF, sin_TF)
        yield f"{attn}.core", rotate_pairs(result, cos_TF, sin_TF)


def _one(row: int) -> slice:
    return slice(row, row + 1)


def _sequences(rows: PagedRows) -> Iterator[slice]:
    """Yields the rows of each sequence of a step with chunks: they have one table, at consecutive positions."""
    positions_T, blocks_TB = rows.positions_T, rows.blocks_TB
    follows_T = (positions_T[1:] == positions_T[:-1] + 1) & (blocks_TB[1:] == blocks_TB[:-1]).all(1)
    starts = [0, *((~follows_T).nonzero().flatten() + 1).tolist(), len(positions_T)]
    yield from (slice(*pair) for pair in pairwise(starts))


def _masks(rows: PagedRows, selected_TK: torch.Tensor, count_T: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the entries that each row attends to: bool [1, visible entries]."""
    pages = CSA_PAGES
    places_TC, visible_T = entry_rows(rows.blocks_TB, pages.per_block), visible_entries(rows, pages).sum(dim=1)
    for places_C, chosen_K, count, visible in zip(places_TC, selected_TK, count_T, visible_T, strict=True):
        yield torch.isin(places_C[: int(visible)], chosen_K[: int(count)].to(places_C.dtype))[None]
