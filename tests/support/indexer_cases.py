"""Decode rows for the indexer's kernels: random block tables over a pool whose other memory is NaN, and hard scores."""

from collections.abc import Callable, Sequence

import torch

from ownpath.kernels.scores.ref import entry_rows, visible_entries
from ownpath.kernels.scores.types import CSA_PAGES as PAGES
from ownpath.kernels.scores.types import IndexQuery, PagedRows
from ownpath.kernels.select.types import Selected
from ownpath.numerics import INDEX_FORMS


def make_rows(positions: Sequence[int], width: int, num_blocks: int, g: torch.Generator) -> PagedRows:
    """Rows whose blocks are distinct, block 0 where a row needs none; position 0 pads the step."""
    order = torch.randperm(num_blocks - 1, generator=g, device=g.device) + 1
    blocks_TB = torch.zeros(len(positions), width, dtype=torch.int32, device=g.device)
    taken = 0
    for row, position in enumerate(positions):
        count = position // 256 + 1 if position else 0
        blocks_TB[row, :count] = order[taken : taken + count]
        taken += count
    return PagedRows(torch.tensor(positions, dtype=torch.int32, device=g.device), blocks_TB)


def make_query(num_rows: int, num_heads: int, weights_dtype: torch.dtype, g: torch.Generator) -> IndexQuery:
    """Raw queries and weights as slices of wider rows, and angles of far positions."""
    q = torch.randn(num_rows, 3 * num_heads * 128, generator=g, device=g.device).bfloat16()
    weights = torch.randn(num_rows, 40 + num_heads, generator=g, device=g.device).to(weights_dtype)
    angles_TF = torch.rand(num_rows, 32, generator=g, device=g.device) * 1e5
    q_TIH = q[:, num_heads * 128 : 2 * num_heads * 128].unflatten(1, (num_heads, 128))
    return IndexQuery(q_TIH, weights[:, 40:], angles_TF.cos(), angles_TF.sin())


def make_keys(rows: PagedRows, num_blocks: int, g: torch.Generator) -> torch.Tensor:
    """A pool that holds what the rows see, and NaN everywhere else."""
    keys = torch.full((num_blocks * 64, 128), torch.nan, device=g.device)
    seen = entry_rows(rows.blocks_TB, 64)[visible_entries(rows, PAGES)]
    keys[seen] = torch.randn(len(seen), 128, generator=g, device=g.device)
    return keys.bfloat16()


def make_pages(rows: PagedRows, num_blocks: int, g: torch.Generator) -> torch.Tensor:
    """The same as FP8 pages: any code but NaN's, scales of several magnitudes."""
    codes = torch.randint(0, 256, (num_blocks * 64, 128), generator=g, device=g.device, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0x80
    scales = 2.0 ** torch.randint(-9, 5, (num_blocks * 64, 1), generator=g, device=g.device)
    unseen = torch.ones(num_blocks * 64, dtype=torch.bool, device=g.device)
    unseen[entry_rows(rows.blocks_TB, 64)[visible_entries(rows, PAGES)]] = False
    codes[unseen], scales[unseen] = 0x7F, torch.nan
    parts = codes.view(num_blocks, -1), scales.float().view(num_blocks, -1).view(torch.uint8)
    return torch.cat(parts, dim=1)


def make_fp4_pages(rows: PagedRows, num_blocks: int, g: torch.Generator) -> torch.Tensor:
    """The same as FP4 pages: any code, scales of several magnitudes, which differ within a key."""
    codes = torch.randint(0, 256, (num_blocks * 64, 64), generator=g, device=g.device, dtype=torch.uint8)
    scales = torch.randint(118, 132, (num_blocks * 64, 4), generator=g, device=g.device, dtype=torch.uint8)
    unseen = torch.ones(num_blocks * 64, dtype=torch.bool, device=g.device)
    unseen[entry_rows(rows.blocks_TB, 64)[visible_entries(rows, PAGES)]] = False
    scales[unseen, 3] = 255
    return torch.cat((codes.view(num_blocks, -1), scales.view(num_blocks, -1)), dim=1)


def in_every_form(keys: torch.Tensor) -> list[torch.Tensor]:
    """Keys, bfloat16, as rows, as FP8 pages and as FP4 pages."""
    every, num_blocks = torch.arange(len(keys), device=keys.device), len(keys) // 64
    pools = [keys]
    for form in INDEX_FORMS.values():
        pools.append(torch.zeros(num_blocks, 64 * form.key_bytes, dtype=torch.uint8, device=keys.device))
        form.write(pools[-1], every, keys)
    return pools


POOLS = (make_keys, make_pages, make_fp4_pages)
"""A pool in each form of keys."""


def hide_unseen(scores_TC: torch.Tensor, rows: PagedRows) -> torch.Tensor:
    """Puts NaN where a row sees no entry."""
    return scores_TC.masked_fill(~visible_entries(rows, PAGES), torch.nan)


def _normal(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=g, device=g.device)


def _ties(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    return (_normal(num_rows, width, g) * 2).round() / 2


def _zeros(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    return torch.where(_normal(num_rows, width, g) < 0, -0.0, 0.0)


def _equal(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    return _normal(num_rows, 1, g).expand(-1, width).contiguous()


def _ordered(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    return _normal(num_rows, width, g).sort(1).values


def _extreme(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Every magnitude of both signs, subnormal numbers and the largest included."""
    bits = torch.randint(-(2**31), 2**31, (num_rows, width), generator=g, device=g.device)
    scores = bits.to(torch.int32).view(torch.float32)
    return torch.where(scores.isfinite(), scores, 1.0)


def _non_finite(num_rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    scores = _normal(num_rows, width, g)
    scores[0::4, ::5] = torch.nan
    scores[1::4, 2] = torch.inf
    scores[2::4, ::3] = -torch.inf
    scores[-1] = torch.nan
    return scores


SCORES: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "ties": _ties,
    "zeros": _zeros,
    "equal": _equal,
    "ordered": _ordered,
    "extreme": _extreme,
    "non-finite": _non_finite,
}


def unset(num_rows: int, topk: int, device: torch.device) -> Selected:
    """Outputs that hold what no kernel writes."""
    shapes = (num_rows, topk), (num_rows,), (num_rows,)
    return Selected(*(torch.full(shape, -7, dtype=torch.int32, device=device) for shape in shapes))
