"""Chooses how many CTAs share a row's keys on Hopper, and who merges their sums. Importable without the DSL."""

from typing import NamedTuple

from ownpath.kernels.attend.config_sm90 import (
    MAX_SPLITS,
    TILE_HEADS,
    TILE_KEYS,
    AttendCombineConfig,
    AttendConfig,
)
from ownpath.kernels.attend.types import WINDOW_ROWS, DecodeKeys, DecodeRows

SELECTED_BLOCK = 64
"""Entries of a block where a row's come as a list of rows."""
FEW_PROGRAMS, FEW_CTAS = 8, 72
"""Up to so many CTAs without splits, keys are split among CTAs that write partial sums: so many in all."""
MOST_SPLIT_PROGRAMS, MOST_SPLIT_PROGRAMS_FP8, MOST_SPLITS = 16, 32, 8
"""Up to so many CTAs without splits, of keys in BF16 and in FP8 pages, there are as many as SMs: the most of a row."""
MOST_MERGED = 3
"""CTAs of a cluster that merges its sums."""
INVARIANT_SPLITS = {0: 1, 4: 2, 128: 2}
"""Compress ratio -> CTAs that share a row's keys, whatever the call."""


class AttendPlan(NamedTuple):
    """splits: CTAs that share a row's keys. merges: they are a cluster and merge their sums; otherwise a second launch
    does."""

    splits: int
    merges: bool

    def config(self, keys: DecodeKeys, spare: int = 0) -> AttendConfig:
        """Returns the kernel of a call with these keys. spare: rows of a ring beyond the window."""
        per_block, is_selected = (0 if keys.entries is None else keys.per_block), keys.ratio == 4
        is_shared = self.splits > 1
        return AttendConfig(
            per_block, is_selected, is_shared and not self.merges, is_shared and self.merges, keys.is_fp8, spare
        )


WHOLE = AttendPlan(1, False)


def most_tiles(keys: DecodeKeys, rows: DecodeRows) -> int:
    """Returns the tiles of the longest row that the arrays allow."""
    num_keys = WINDOW_ROWS
    if keys.ratio:
        width = rows.blocks_TB.shape[1] * keys.per_block
        num_keys += width if rows.selected_TK is None else rows.selected_TK.shape[1]
    return -(-num_keys // TILE_KEYS)


def choose_plan(num_rows: int, num_heads: int, tiles: int, num_sms: int, *, is_fp8: bool) -> AttendPlan:
    """Chooses from the number of rows and the longest row's tiles, never from positions, as measured on an H200.

    With few rows a second launch merges the sums of up to ``FEW_CTAS`` CTAs; more only wait for each other. With more
    rows one CTA on each SM has the fewest tiles. From there a cluster of two or three merges its own; FP8 pages, whose
    tiles take longer, gain by the splits for longer. Two tiles are soonest done by one CTA.
    tiles: of the longest row that the arrays allow. is_fp8: keys lie in FP8 pages.
    """
    programs = num_rows * -(-num_heads // TILE_HEADS)
    if tiles <= WINDOW_ROWS // TILE_KEYS:
        return WHOLE
    if programs <= FEW_PROGRAMS:
        return AttendPlan(_even(tiles, min(FEW_CTAS // programs, MAX_SPLITS)), False)
    splits = min(tiles, num_sms // programs, MOST_SPLITS)
    if programs <= MOST_SPLIT_PROGRAMS or (is_fp8 and programs <= MOST_SPLIT_PROGRAMS_FP8 and tiles >= 2 * splits):
        return AttendPlan(splits, False)
    wanted = min(MOST_MERGED, num_sms // programs)
    return WHOLE if wanted < 2 or tiles < 2 * wanted else AttendPlan(wanted, True)


def _even(tiles: int, splits: int) -> int:
    """Returns the fewest splits whose largest is no larger."""
    return -(-tiles // -(-tiles // splits))


def invariant_plan(ratio: int) -> AttendPlan:
    """Returns the plan by which a row's bits depend on the row alone."""
    splits = INVARIANT_SPLITS[ratio]
    return AttendPlan(splits, True) if splits > 1 else WHOLE


def reachable_configs(is_invariant: bool, spare: int = 0) -> tuple[AttendConfig | AttendCombineConfig, ...]:
    """Returns every kernel that a call may launch: keys and their format come with the call. spare: as in
    ``AttendPlan.config``."""
    found: list[AttendConfig | AttendCombineConfig] = []
    for ratio, per_block, is_selected in ((0, 0, False), (4, SELECTED_BLOCK, True), (128, 2, False)):
        for fp8 in (False, True):
            whole, merged, split = (
                AttendConfig(per_block, is_selected, is_split, is_merged, fp8, spare)
                for is_split, is_merged in ((False, False), (False, True), (True, False))
            )
            if is_invariant:
                found.append(merged if INVARIANT_SPLITS[ratio] > 1 else whole)
            else:
                found += [whole] if ratio == 0 else [whole, merged, split]
    return tuple(found) if is_invariant else (*found, AttendCombineConfig())
