"""Torch reference of decode attention over the caches, in any floating dtype: all rows at once, each from its own keys.

Pools may have the dtype of the queries, bfloat16 or FP8 pages; a row's memory is gathered, nothing else is read.

Legend: T rows, N heads, H head dim, K keys of a row, R keys of a page.
"""

from collections.abc import Sequence

import torch

from ownpath.kernels.attend.types import KEY_BYTES, WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.norms.ref import rms_norm, rms_norm_stepwise
from ownpath.kernels.reference import Reference, filled
from ownpath.numerics import KEY_PAGES, rotate_pairs, wide_dtype


def decode_pages(pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decodes FP8 pages uint8 [P, R * 584] to keys [P * R, 512]; exact in bfloat16 and wider."""
    num_rows = len(pages) * (pages.shape[1] // KEY_BYTES)
    return KEY_PAGES.read(pages, torch.arange(num_rows, device=pages.device), dtype)


def gather_keys(keys: DecodeKeys, rows: DecodeRows, t: int, dtype: torch.dtype, spare: int = 0) -> torch.Tensor:
    """Returns the keys of row t [K, H]: its window's, by position modulo 128, then its entries. spare: of the ring."""
    numbers = torch.arange(min(int(rows.positions_T[t]) + 1, WINDOW_ROWS), device=keys.window.device)
    found = [take_keys(keys.window, _window_places(rows.positions_T[t].long(), rows.slots_T[t], numbers, spare), dtype)]
    if keys.entries is not None:
        found.append(take_keys(keys.entries, entry_rows(keys, rows, t), dtype))
    return torch.cat(found)


def _window_places(positions: torch.Tensor, slots: torch.Tensor, numbers: torch.Tensor, spare: int) -> torch.Tensor:
    """Returns the rows of the pool that hold keys of a window: number j is of the position, among the last 128, that is
    j modulo 128. So the keys' order does not depend on the length of the ring."""
    ring = WINDOW_ROWS + spare
    return slots.long() * ring + (positions - (positions - numbers) % WINDOW_ROWS) % ring


def entry_rows(keys: DecodeKeys, rows: DecodeRows, t: int) -> torch.Tensor:
    """Returns the rows of ``entries`` that row t attends to, int64: the selected ones, or all that it sees."""
    if rows.selected_TK is not None and rows.num_selected_T is not None:
        return rows.selected_TK[t, : int(rows.num_selected_T[t])].long()
    entries = torch.arange((int(rows.positions_T[t]) + 1) // keys.ratio, device=rows.blocks_TB.device)
    return rows.blocks_TB[t, entries // keys.per_block].long() * keys.per_block + entries % keys.per_block


def take_keys(pool: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reads rows of a pool of values or of FP8 pages."""
    return KEY_PAGES.read(pool, rows, dtype) if pool.dtype is torch.uint8 else pool[rows].to(dtype)


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
    groups = _groups_of_keys(keys, rows, wide_dtype(q_TNH.dtype), weights.spare)
    return attend_to_groups(q_TNH, (cos_TF, sin_TF), groups, weights)


def attend_to_groups(
    q_TNH: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    groups: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights: AttendWeights,
) -> torch.Tensor:
    """Attends from raw queries to groups of keys: of each the keys [T, K, H], at least float32, and which each row sees
    [T, K]."""
    norm = rms_norm_stepwise if weights.is_stepwise else rms_norm
    cos_TF, sin_TF = angles
    q_TNH = rotate_pairs(norm(q_TNH, None, weights.eps), cos_TF, sin_TF)
    wide = wide_dtype(q_TNH.dtype)
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


def _groups_of_keys(
    keys: DecodeKeys, rows: DecodeRows, wide: torch.dtype, spare: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the window's keys of all rows [T, K, H] and which are visible [T, K], then the entries'.

    What is not visible repeats the row's newest key, or its first entry, or is zero: memory that a row does not own is
    not used.
    """
    longest = min(int(rows.positions_T.max()) + 1, WINDOW_ROWS)
    numbers, positions_T1 = torch.arange(longest, device=keys.window.device), rows.positions_T.long()[:, None]
    visible_TK = numbers <= positions_T1
    shown_TK = torch.where(visible_TK, numbers, positions_T1 % WINDOW_ROWS)
    place_TK = _window_places(positions_T1, rows.slots_T[:, None], shown_TK, spare)
    found = [(take_keys(keys.window, place_TK, wide), visible_TK)]
    if keys.entries is not None:
        place_TK, visible_TK = entries_of_all(keys, rows)
        if place_TK.shape[1]:
            keys_TKH = take_keys(keys.entries, place_TK, wide)
            has_none_T = ~visible_TK[:, 0]
            keys_TKH = keys_TKH.masked_fill(has_none_T[:, None, None], 0.0) if has_none_T.any() else keys_TKH
            found.append((keys_TKH, visible_TK))
    return found


def entries_of_all(keys: DecodeKeys, rows: DecodeRows) -> tuple[torch.Tensor, torch.Tensor]:
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
