"""Torch reference of attention over chunks, in any floating dtype: 64 rows at a time, each from its own keys.

Legend: T rows, N heads, H head dim, K keys of a row.
"""

import torch

from ownpath.kernels.attend.ref import attend_to_groups, entries_of_all, take_keys
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows
from ownpath.kernels.reference import Reference, filled
from ownpath.numerics import wide_dtype

ROWS_AT_ONCE = 64


def attend_chunk(
    q_TNH: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    keys: ChunkKeys,
    rows: ChunkRows,
    weights: AttendWeights,
) -> torch.Tensor:
    """Computes o [T, N, H], as ``ChunkKernel.run`` says, in the dtype of q."""
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    for start in range(0, len(q_TNH), ROWS_AT_ONCE):
        of = slice(start, start + ROWS_AT_ONCE)
        groups = _groups_of_keys(keys, rows_of(rows, of), wide_dtype(q_TNH.dtype))
        out_TNH[of] = attend_to_groups(q_TNH[of], (cos_TF[of], sin_TF[of]), groups, weights)
    return out_TNH


def rows_of(rows: ChunkRows, of: slice) -> ChunkRows:
    """Returns some rows, with all block tables."""
    selected_TK, num_T = rows.selected_TK, rows.num_selected_T
    if selected_TK is not None and num_T is not None:
        selected_TK, num_T = selected_TK[of], num_T[of]
    own = rows.positions_T[of], rows.places_T[of], rows.requests_T[of]
    return ChunkRows(*own, rows.blocks_RB, selected_TK, num_T)


def _groups_of_keys(keys: ChunkKeys, rows: ChunkRows, wide: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the near keys of all rows [T, K, H] and which are visible [T, K], then the entries'.

    What is not visible repeats the row's own key, or its first entry, or is zero: other memory is not used.
    """
    age_K = torch.arange(min(int(rows.positions_T.max()) + 1, WINDOW_ROWS), device=keys.near_WH.device)
    visible_TK = age_K <= rows.positions_T[:, None]
    places_T1 = rows.places_T.long()[:, None]
    found = [(take_keys(keys.near_WH, torch.where(visible_TK, places_T1 - age_K, places_T1), wide), visible_TK)]
    if keys.entries is None:
        return found
    of_decode = DecodeKeys(keys.near_WH, *keys[1:])
    blocks_TB = rows.blocks_RB[rows.requests_T.long()]
    place_TK, visible_TK = entries_of_all(of_decode, DecodeRows(rows.positions_T, rows.places_T, blocks_TB, *rows[4:]))
    if place_TK.shape[1]:
        keys_TKH, has_none_T = take_keys(keys.entries, place_TK, wide), ~visible_TK[:, 0]
        keys_TKH = keys_TKH.masked_fill(has_none_T[:, None, None], 0.0) if has_none_T.any() else keys_TKH
        found.append((keys_TKH, visible_TK))
    return found


class AttendChunkReference(Reference):
    """``attend_chunk`` as a kernel. The operand is the weights."""

    def prepare(self, weights: AttendWeights) -> AttendWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, q_TNH: torch.Tensor, keys: ChunkKeys, rows: ChunkRows, operand: AttendWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: ChunkKeys,
        rows: ChunkRows,
        operand: AttendWeights,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes o [T, N, H] in the dtype of q."""
        return filled(out, attend_chunk(q_TNH, cos_TF, sin_TF, keys, rows, operand))


ATTEND_CHUNK = AttendChunkReference()
"""Attention over chunks in torch."""
