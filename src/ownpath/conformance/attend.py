"""Operands of decode attention in poisoned memory, and the judging of its results. Tests and bench share it.

Pools are full of NaN except for what the rows own: keys they see, entries they select. So are lists and tables behind
their ends, with rows that do not exist.

Legend: T rows, N heads, H head dim, K keys of a row, B blocks of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ownpath.conformance.bounds import (
    EXP_STEPS,
    FLOAT32_ROUND,
    SPREAD,
    Exact,
    assert_allowed,
    rounding,
    sum_rounding,
)
from ownpath.kernels.attend.cases import AttendCase
from ownpath.kernels.attend.ref import entry_rows, gather_keys
from ownpath.kernels.attend.types import WINDOW_ROWS, AttendWeights, DecodeKeys, DecodeRows
from ownpath.kernels.checks import SPARE_MULTIPLE
from ownpath.kernels.norms.ref import rms_norm, rms_norm_stepwise
from ownpath.numerics import E4M3_MAX, decode_e8m0, encode_e4m3, encode_e8m0_ceil, rotate_pairs

HEAD_DIM, NUM_PAIRS, BLOCK_TOKENS = 512, 32, 256
PLAIN, SCALE_BLOCK = 448, 64
"""Channels of an FP8 key that are E4M3, and that share a scale."""
NOT_A_ROW = 2**30
"""Fills lists and tables behind their ends: a row far outside of every pool."""
TELLING_POSITIONS = (0, 3, 62, 63, 64, 126, 127, 128, 191, 255, 256, 259, 511)
"""Ends of tiles, windows, entries and blocks, and their neighbours."""
MAX_REL_L2 = 5e-3
"""Two roundings to BF16, of weights and of the result, are 1.7e-3 each in the root mean square, at worst: together
2.4e-3, and as much again for rows that are short or whose queries were rounded to a neighbour."""


def map_rows(change: Callable[[torch.Tensor], torch.Tensor], rows: DecodeRows) -> DecodeRows:
    """Returns the rows with copies of the changed arrays."""
    positions_T, slots_T, blocks_TB = (change(part).clone() for part in rows[:3])
    selection = (None if part is None else change(part).clone() for part in rows[3:])
    return DecodeRows(positions_T, slots_T, blocks_TB, *selection)


@dataclass(frozen=True)
class AttendInputs:
    """The arguments of a call."""

    q_TNH: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    keys: DecodeKeys
    rows: DecodeRows
    weights: AttendWeights

    @property
    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DecodeKeys, DecodeRows, AttendWeights]:
        """The arguments in the order of ``run``."""
        return self.q_TNH, self.cos_TF, self.sin_TF, self.keys, self.rows, self.weights

    def first(self, count: int) -> "AttendInputs":
        """Returns the first rows of the call; the pools stay."""
        return self.part(slice(count))

    def sliced(self) -> "AttendInputs":
        """Returns the same call with queries that are slices of wider rows, full of NaN besides."""
        wide = self.q_TNH.new_full((len(self.q_TNH), self.q_TNH[0].numel() + 8192), torch.nan)
        q_TNH = wide[:, : self.q_TNH[0].numel()].unflatten(1, self.q_TNH.shape[1:])
        q_TNH.copy_(self.q_TNH)
        return replace(self, q_TNH=q_TNH)

    def part(self, part: slice) -> "AttendInputs":
        """Returns some of the rows, with queries and lists in memory of their own."""
        q, cos, sin = (of_all[part].clone() for of_all in (self.q_TNH, self.cos_TF, self.sin_TF))
        return replace(self, q_TNH=q, cos_TF=cos, sin_TF=sin, rows=map_rows(lambda of_all: of_all[part], self.rows))


def make_attend_inputs(
    case: AttendCase,
    num_rows: int,
    device: torch.device,
    seed: int = 0,
    positions: torch.Tensor | None = None,
    group: int = 1,
) -> AttendInputs:
    """Draws the operands of a case: queries of several magnitudes, keys of unit variance, all in poisoned memory.

    positions: int64 [T] below the case's context; by default those of the case. group: the most rows of a request: each
    request has so many, the last perhaps fewer, from the position of its first row on; rings are longer where there are
    several.
    """
    g = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    positions_T = _positions(case, num_rows, host) if positions is None else positions
    slots_T = 1 + torch.randperm(num_rows, generator=host)
    number_T = torch.arange(num_rows)
    first_T = number_T - number_T % group
    positions_T = (positions_T[first_T].clamp(max=case.context - group) + number_T % group).clamp(min=0)
    slots_T, spare = slots_T[first_T], 0 if group == 1 else SPARE_MULTIPLE
    blocks_TB, num_blocks = draw_blocks(positions_T[(first_T + group - 1).clamp(max=num_rows - 1)], case.context, host)
    blocks_TB = blocks_TB[first_T]
    per_block = BLOCK_TOKENS // case.ratio if case.ratio else 0
    ring = WINDOW_ROWS + spare
    window = make_pool(_window_rows(positions_T, slots_T, ring).unique(), (num_rows + 1) * ring, ring, case.fp8, g)
    rows = DecodeRows(*(part.to(device, torch.int32) for part in (positions_T, slots_T, blocks_TB)))
    keys = DecodeKeys(window)
    if case.ratio:
        visible = visible_rows(positions_T, blocks_TB, case.ratio)
        entries = make_pool(torch.cat(visible).unique(), num_blocks * per_block, per_block, case.fp8, g)
        keys = DecodeKeys(window, entries, per_block, case.ratio)
        if case.ratio == 4:
            rows = rows._replace(**draw_selection(visible, case.topk, host, device))
    angles_TF = positions_T.to(device)[:, None] * 10.0 ** (-4 * torch.rand(NUM_PAIRS, generator=g, device=device))
    q = torch.randn(num_rows, case.num_heads, HEAD_DIM, generator=g, device=device)
    q *= 10 ** (2 * torch.rand(num_rows, case.num_heads, 1, generator=g, device=device) - 1)
    sink_N = 2 * torch.randn(case.num_heads, generator=g, device=device)
    weights = AttendWeights(sink_N, HEAD_DIM**-0.5, 1e-6, spare=spare)
    return AttendInputs(q.bfloat16(), angles_TF.cos(), angles_TF.sin(), keys, rows, weights)


def _positions(case: AttendCase, num_rows: int, host: torch.Generator) -> torch.Tensor:
    last = torch.full((num_rows,), case.context - 1)
    if case.is_full:
        return last
    mixed = torch.randint(0, case.context, (num_rows,), generator=host)
    telling = torch.tensor([place for place in TELLING_POSITIONS if place < case.context])[: num_rows // 2]
    return torch.cat((last[:1], telling, mixed))[:num_rows]


def draw_blocks(positions_T: torch.Tensor, context: int, host: torch.Generator) -> tuple[torch.Tensor, int]:
    """Returns tables of blocks in random order, and the number of blocks of a pool."""
    counts_T = positions_T // BLOCK_TOKENS + 1
    shuffled = 1 + torch.randperm(int(counts_T.sum()), generator=host)
    blocks_TB = torch.full((len(positions_T), -(-context // BLOCK_TOKENS)), NOT_A_ROW)
    for table_B, owned in zip(blocks_TB, shuffled.split(counts_T.tolist()), strict=True):
        table_B[: len(owned)] = owned
    return blocks_TB, len(shuffled) + 1


def _window_rows(positions_T: torch.Tensor, slots_T: torch.Tensor, ring: int) -> torch.Tensor:
    """Returns the rows of the rings that hold a key that some row sees."""
    position_TK = positions_T[:, None] - torch.arange(WINDOW_ROWS)
    return (slots_T[:, None] * ring + position_TK % ring)[position_TK >= 0]


def visible_rows(positions_T: torch.Tensor, blocks_TB: torch.Tensor, ratio: int) -> list[torch.Tensor]:
    """Returns each row's entries as rows of the pool, by entry number."""
    keys = DecodeKeys(torch.empty(0), None, BLOCK_TOKENS // ratio, ratio)
    rows = DecodeRows(positions_T, positions_T, blocks_TB)
    return [entry_rows(keys, rows, t) for t in range(len(positions_T))]


def draw_selection(
    visible: list[torch.Tensor], topk: int, host: torch.Generator, device: torch.device
) -> dict[str, torch.Tensor]:
    """Selects up to ``topk`` entries of each row at random, as ascending rows of the pool."""
    selected_TK = torch.full((len(visible), topk), NOT_A_ROW, dtype=torch.int32)
    counts_T = torch.tensor([min(topk, len(rows)) for rows in visible], dtype=torch.int32)
    for selected_K, rows_C, count in zip(selected_TK, visible, counts_T.tolist(), strict=True):
        chosen = rows_C[torch.randperm(len(rows_C), generator=host)[:count]]
        selected_K[:count] = chosen.sort().values
    return {"selected_TK": selected_TK.to(device), "num_selected_T": counts_T.to(device)}


def make_pool(owned: torch.Tensor, num_rows: int, page_keys: int, is_fp8: bool, g: torch.Generator) -> torch.Tensor:
    """Makes a pool that holds keys in the owned rows and NaN elsewhere."""
    owned = owned.to(g.device)
    keys = torch.randn(len(owned), HEAD_DIM, generator=g, device=g.device).bfloat16()
    if not is_fp8:
        pool = torch.full((num_rows, HEAD_DIM), torch.nan, dtype=torch.bfloat16, device=g.device)
        pool[owned] = keys
        return pool
    pages = torch.full((num_rows // page_keys, page_keys * 584), 255, dtype=torch.uint8, device=g.device)
    write_pages(pages, owned, keys)
    return pages


def write_pages(pages: torch.Tensor, rows_K: torch.Tensor, keys_KH: torch.Tensor) -> None:
    """Rounds keys to the published FP8 format and writes them to rows of pages uint8 [P, R * 584]."""
    num_keys, width = pages.shape[1] // 584, PLAIN + 128
    blocks = keys_KH[:, :PLAIN].float().unflatten(1, (-1, SCALE_BLOCK))
    scales = encode_e8m0_ceil(blocks.abs().amax(-1).clamp(min=1e-4), E4M3_MAX)
    codes = encode_e4m3(blocks / decode_e8m0(scales)[:, :, None]).view(torch.uint8).flatten(1)
    rotary = keys_KH[:, PLAIN:].bfloat16().contiguous().view(torch.uint8)
    page_K, place_K = (rows_K // num_keys)[:, None], (rows_K % num_keys)[:, None]
    spread = torch.arange(width, device=pages.device)
    pages[page_K, place_K * width + spread] = torch.cat((codes, rotary), dim=1)
    at = num_keys * width + place_K * 8 + torch.arange(scales.shape[1], device=pages.device)
    pages[page_K, at] = scales.view(torch.uint8)


def exact_attention(inputs: AttendInputs) -> Exact:
    """Computes o in float64 from queries rounded as the operation says, with the error that rounding may cause."""

    def keys_of(t: int) -> torch.Tensor:
        return gather_keys(inputs.keys, inputs.rows, t, torch.float64, inputs.weights.spare)

    return exact_rows(inputs.q_TNH, (inputs.cos_TF, inputs.sin_TF), keys_of, inputs.weights)


def exact_rows(
    q_TNH: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    keys_of: Callable[[int], torch.Tensor],
    weights: AttendWeights,
) -> Exact:
    """Computes o from raw queries. keys_of: returns the float64 keys [K, H] of a row."""
    is_stepwise = weights.is_stepwise
    q_TNH = (rms_norm_stepwise if is_stepwise else rms_norm)(q_TNH, None, weights.eps)
    q_TNH = rotate_pairs(q_TNH, *angles).double()
    value, bound = torch.empty_like(q_TNH), torch.empty_like(q_TNH)
    for t, q_NH in enumerate(q_TNH):
        keys_KH = keys_of(t)
        sink_N, scale = weights.sink_N.double(), weights.softmax_scale
        # Stepwise, a mean or a root at the edge of two numbers may be either.
        error_NH = 2 * rounding(torch.bfloat16) * q_NH.abs() if is_stepwise else None
        value[t], bound[t] = exact_row(q_NH, keys_KH, sink_N, scale, error_NH=error_NH)
    cos, sin = (angle.double() for angle in angles)
    turned = rotate_pairs(value, cos, -sin)
    # Both channels of a pair may be off, by as much as either: |cos| + |sin| is below 1.5.
    pairs = bound[..., -2 * NUM_PAIRS :].unflatten(-1, (-1, 2)).amax(-1, keepdim=True).expand(-1, -1, -1, 2)
    bound[..., -2 * NUM_PAIRS :] = 1.5 * pairs.flatten(-2)
    return Exact(turned, bound)


def exact_row(
    q_NH: torch.Tensor,
    keys_KH: torch.Tensor,
    sink_N: torch.Tensor,
    scale: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    error_NH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one row's exact sums [N, H] and their bounds. All in float64; dtype: of queries and weights.

    A query's channel may round to a neighbour where the sum of squares is in another order: two do, at worst. Beyond
    that it may be off by ``error_NH``. Scores are float32 sums of H products. Weights are rounded before the sum over
    values, each by itself.
    """
    unit, width = rounding(dtype), q_NH.shape[1]
    scores_NK = q_NH @ keys_KH.T * scale
    p_NK = torch.cat((scores_NK, sink_N[:, None]), dim=1).softmax(dim=1)[:, :-1]
    o_NH = p_NK @ keys_KH
    largest_N1, magnitude_NK = q_NH.abs().amax(1, keepdim=True), q_NH.abs() @ keys_KH.abs().T
    shift_NK = 4 * unit * scale * largest_N1 * keys_KH.abs().amax(1)
    if error_NH is not None:
        shift_NK = shift_NK + scale * error_NH @ keys_KH.abs().T
    shift_NK = shift_NK + scale * magnitude_NK * sum_rounding(width)
    shift_NK = shift_NK + (EXP_STEPS + scores_NK.abs()) * FLOAT32_ROUND
    spread = SPREAD * unit * (p_NK.square() @ keys_KH.square()).sqrt()
    moved = (p_NK * shift_NK) @ keys_KH.abs() + (p_NK * shift_NK).sum(1, keepdim=True) * o_NH.abs()
    return o_NH, moved + spread + sum_rounding(len(keys_KH)) * (p_NK @ keys_KH.abs())


def judge_attend(result: torch.Tensor, inputs: AttendInputs) -> None:
    """Judges a result. Errors: AssertionError when it is not what the operation defines."""
    assert_attention(result, exact_attention(inputs))


def assert_attention(result: torch.Tensor, exact: Exact, what: object = "") -> None:
    """Judges one of several results against the same exact sums. Errors: AssertionError naming ``what``."""
    assert_allowed(result, exact, what)
    error_T, norm_T = (part.flatten(1).norm(dim=1) for part in (result.double() - exact.value, exact.value))
    distance, t = (error_T / norm_T).max(dim=0)
    assert distance <= MAX_REL_L2, f"{what}: row {int(t)}: relative L2 {float(distance):.2e}"
