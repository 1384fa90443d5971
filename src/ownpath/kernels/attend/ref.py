"""Torch reference of decode attention over the caches, in any floating dtype: all rows at once, each from its own keys.

Pools may have the dtype of the queries, bfloat16 or FP8 pages; a row's memory is gathered, nothing else is read.

Legend: T rows, N heads, H head dim, K keys of a row, R keys of a page.
"""

import torch

from ownpath.kernels.attend.types import KEY_BYTES, WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.norms.ref import rms_norm
from ownpath.kernels.reference import Reference, filled
from ownpath.numerics import decode_e4m3, decode_e8m0, rotate_pairs, wide_dtype

PLAIN, ROTARY, SCALE_BLOCK = 448, 64, 64
"""Channels of an FP8 key that are E4M3, that are BF16, and that share a scale."""


def decode_pages(pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decodes FP8 pages uint8 [P, R * 584] to keys [P * R, 512]; exact in bfloat16 and wider."""
    num_pages, num_keys = len(pages), pages.shape[1] // KEY_BYTES
    width = PLAIN + 2 * ROTARY
    data = pages[:, : num_keys * width].reshape(-1, width)
    raw_scales = pages[:, num_keys * width :].reshape(num_pages * num_keys, 8)[:, : PLAIN // SCALE_BLOCK]
    scales = decode_e8m0(raw_scales.contiguous().view(torch.float8_e8m0fnu), torch.float64)
    codes = decode_e4m3(data[:, :PLAIN].contiguous().view(torch.float8_e4m3fn), torch.float64)
    plain = (codes.unflatten(1, (-1, SCALE_BLOCK)) * scales[:, :, None]).flatten(1)
    rotary = data[:, PLAIN:].contiguous().view(torch.bfloat16)
    return torch.cat((plain.to(dtype), rotary.to(dtype)), dim=1)


def gather_keys(keys: DecodeKeys, rows: DecodeRows, t: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the keys of row t [K, H]: its ring's, in the ring's order, then its entries."""
    position, slot = int(rows.positions_T[t]), int(rows.slots_T[t])
    ring = slot * WINDOW_ROWS + torch.arange(min(position + 1, WINDOW_ROWS), device=keys.window.device)
    found = [_take(keys.window, ring, WINDOW_ROWS, dtype)]
    if keys.entries is not None:
        found.append(_take(keys.entries, entry_rows(keys, rows, t), keys.per_block, dtype))
    return torch.cat(found)


def entry_rows(keys: DecodeKeys, rows: DecodeRows, t: int) -> torch.Tensor:
    """Returns the rows of ``entries`` that row t attends to, int64: the selected ones, or all that it sees."""
    if rows.selected_TK is not None and rows.num_selected_T is not None:
        return rows.selected_TK[t, : int(rows.num_selected_T[t])].long()
    entries = torch.arange((int(rows.positions_T[t]) + 1) // keys.ratio, device=rows.blocks_TB.device)
    return rows.blocks_TB[t, entries // keys.per_block].long() * keys.per_block + entries % keys.per_block


def _take(pool: torch.Tensor, rows_K: torch.Tensor, num_page_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Reads rows of a pool, of FP8 pages by decoding the pages they are in."""
    if pool.dtype is not torch.uint8:
        return pool[rows_K].to(dtype)
    pages, inverse = torch.unique(rows_K // num_page_keys, return_inverse=True)
    return decode_pages(pool[pages], dtype)[inverse * num_page_keys + rows_K % num_page_keys]


def attend(
    q_TNH: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    keys: DecodeKeys,
    rows: DecodeRows,
    weights: AttendWeights,
) -> torch.Tensor:
    """Computes o [T, N, H], as ``AttendKernel.run`` says, in the dtype of q.

    Weights are rounded before they are divided by their sum, relative to the row's largest score.
    """
    q_TNH = rotate_pairs(rms_norm(q_TNH, None, weights.eps), cos_TF, sin_TF)
    wide = wide_dtype(q_TNH.dtype)
    groups = _groups_of_keys(keys, rows, wide)
    scaled_TNH = q_TNH.to(wide) * weights.softmax_scale
    scores_TNK = torch.cat([_scores(scaled_TNH, *group) for group in groups], dim=2)
    largest_TN1 = scores_TNK.amax(dim=2, keepdim=True)
    weights_TNK = (scores_TNK - largest_TN1).exp()
    sums_TN1 = weights_TNK.sum(dim=2, keepdim=True) + (weights.sink_N.to(wide)[:, None] - largest_TN1).exp()
    parts = weights_TNK.to(q_TNH.dtype).to(wide).split([keys_TKH.shape[1] for keys_TKH, _ in groups], dim=2)
    o_TNH = sum(part_TNK @ keys_TKH for part_TNK, (keys_TKH, _) in zip(parts, groups, strict=True)) / sums_TN1
    return rotate_pairs(o_TNH, cos_TF, -sin_TF).to(q_TNH.dtype)


def _scores(scaled_TNH: torch.Tensor, keys_TKH: torch.Tensor, visible_TK: torch.Tensor) -> torch.Tensor:
    scores_TNK = scaled_TNH @ keys_TKH.transpose(1, 2)
    return scores_TNK if visible_TK.all() else scores_TNK.masked_fill(~visible_TK[:, None], -torch.inf)


def _groups_of_keys(keys: DecodeKeys, rows: DecodeRows, wide: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the window's keys of all rows [T, K, H] and which are visible [T, K], then the entries'.

    What is not visible repeats the row's newest key, or its first entry, or is zero: memory that a row does not own is
    not used.
    """
    longest = min(int(rows.positions_T.max()) + 1, WINDOW_ROWS)
    ring, positions_T1 = torch.arange(longest, device=keys.window.device), rows.positions_T.long()[:, None]
    visible_TK = ring <= positions_T1
    place_TK = rows.slots_T.long()[:, None] * WINDOW_ROWS + torch.where(visible_TK, ring, positions_T1 % WINDOW_ROWS)
    found = [(_take(keys.window, place_TK, WINDOW_ROWS, wide), visible_TK)]
    if keys.entries is not None:
        place_TK, visible_TK = _entries_of_all(keys, rows)
        if place_TK.shape[1]:
            keys_TKH = _take(keys.entries, place_TK, keys.per_block, wide)
            has_none_T = ~visible_TK[:, 0]
            keys_TKH = keys_TKH.masked_fill(has_none_T[:, None, None], 0.0) if has_none_T.any() else keys_TKH
            found.append((keys_TKH, visible_TK))
    return found


def _entries_of_all(keys: DecodeKeys, rows: DecodeRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows of ``entries`` that each row attends to, as many as the longest has, and which are there."""
    entries = torch.arange(rows.blocks_TB.shape[1] * keys.per_block, device=rows.blocks_TB.device)
    place_TK = rows.blocks_TB.long()[:, entries // keys.per_block] * keys.per_block + entries % keys.per_block
    count_T = (rows.positions_T + 1) // keys.ratio
    if rows.selected_TK is not None and rows.num_selected_T is not None:
        place_TK, count_T = rows.selected_TK.long(), rows.num_selected_T
    place_TK = place_TK[:, : int(count_T.max())]
    visible_TK = torch.arange(place_TK.shape[1], device=place_TK.device) < count_T[:, None]
    return torch.where(visible_TK, place_TK, place_TK[:, :1] * (count_T > 0)[:, None]), visible_TK


class AttendReference(Reference):
    """``attend`` as a kernel. The operand is the weights."""

    def prepare(self, weights: AttendWeights) -> AttendWeights:
        """Returns the weights unchanged."""
        return weights

    def variant(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows, operand: AttendWeights) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, q_TNH: torch.Tensor, keys: DecodeKeys, rows: DecodeRows, operand: AttendWeights) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        q_TNH: torch.Tensor,
        cos_TF: torch.Tensor,
        sin_TF: torch.Tensor,
        keys: DecodeKeys,
        rows: DecodeRows,
        operand: AttendWeights,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes o [T, N, H] in the dtype of q."""
        return filled(out, attend(q_TNH, cos_TF, sin_TF, keys, rows, operand))


ATTEND = AttendReference()
"""Decode attention in torch."""
