"""The indexer's scores on Hopper: one launch over paged keys.

How it works. A row's programs share its blocks of 64 keys: program g takes blocks g, g + G, and so on, so that a short
row uses few programs and a long one all of them. A program rotates its row's queries once and keeps them in shared
memory; each block's keys, 16 KiB in one piece, are the other operand of a tensor-core product whose 64 x heads results
are clamped, weighted and summed in registers.

Roofline. 256 bytes a key (bfloat16), 132 (FP8) or 68 (FP4), read once. Limits. Keys of 128 channels, 64 to a block; up
to 128 heads, padded to 16. Codes become bfloat16 in registers, exactly; a NaN is seen in a scale alone. An FP8 key's
scale multiplies its sum over heads. An FP4 key has one for 32 channels, which multiplies its codes: exact from 2^-63 to
2^64, and NaN above, where no key behind a norm is. Under official numerics queries are rotated by Hadamard and rounded
to FP4, as the keys are stored. Sums have one order for any grid: a score's bits depend on its row and key alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton
import triton.language as tl

from ownpath.kernels.checks import check, check_alignment, check_rank
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.scores.codes import (
    FP4_QUERY,
    FP4_WEIGHT,
    FP8_QUERY,
    FP8_WEIGHT,
    enlarged,
    in_fours,
    spread_scales,
    weighted_sums,
    widen_fp4,
    widen_fp8,
)
from ownpath.kernels.scores.queries import official_queries, rotated_queries
from ownpath.kernels.scores.types import (
    CSA_PAGES,
    FP4_KEY_BYTES,
    FP8_KEY_BYTES,
    INDEX_DIM,
    ROTARY_DIM,
    EntryPages,
    IndexQuery,
    PagedRows,
)
from ownpath.kernels.variants import variant_name

INTERPRETED = triton.knobs.runtime.interpret
MAX_HEADS = 128
NUM_SMS = 132
"""Of an H200."""
PROGRAMS_PER_SM = (3, 4, 4)
"""By the form of the keys: as many as run at a time."""
NUM_STAGES = (3, 5, 6)
"""By the form of the keys: blocks of keys in flight, and one."""
PER_BLOCK = 64
WORDS, PAGE_KEY_BYTES = (torch.bfloat16, torch.int32, torch.int16), (2 * INDEX_DIM, FP8_KEY_BYTES, FP4_KEY_BYTES)
"""By the form of the keys: the dtype that they are read as, four codes to a word, and the bytes of a key."""
WEIGHT_FACTORS = (1.0, FP8_WEIGHT, FP4_WEIGHT)
"""By the form of the keys: what weights make up for of the powers of two that keys are multiplied by."""
VALUES, FP8_PAGES, FP4_PAGES = (tl.constexpr(form) for form in range(3))
"""The forms of keys: bfloat16 rows, or pages."""


@triton.jit
def _fetch_ahead(keys_ptr, LINES: tl.constexpr, LINE: tl.constexpr):
    """Asks for a block of keys, to be in the L2 cache when it is copied. LINE: elements of 128 bytes."""
    lines = keys_ptr + tl.arange(0, LINES) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _read_ahead(table, first, step, last, COUNT: tl.constexpr):
    """Brings a program's first entries of a block table into the L1 cache, all at a time; its loop asks one by one."""
    entries = table + tl.minimum(first + tl.arange(0, COUNT) * step, last)
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [entries.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["table_blocks"])
def index_scores_kernel(
    q_ptr,
    weights_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    positions_ptr,
    blocks_ptr,
    out_ptr,
    q_pitch,
    weights_pitch,
    num_heads,
    table_blocks,
    scale,
    RATIO: tl.constexpr,
    I_PAD: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    LINE: tl.constexpr,
    FORM: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scores the visible keys of a row's blocks g, g + G, ... Pages are read as words of four codes."""
    tl.static_assert(DIM == 128 and HALF == 32, "128 channels, the second half rotated")
    first, step, t = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    table = blocks_ptr + t * table_blocks
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    visible = tl.minimum((tl.load(positions_ptr + t) + 1) // RATIO, table_blocks * ROWS)
    block = tl.load(table + first)
    if first * ROWS < visible:
        if PDL:  # while queries come and are rotated
            _read_ahead(table, first, step, table_blocks - 1, 32)
            _fetch_ahead(keys_ptr + block.to(tl.int64) * PAGE, ROWS * WIDTH // LINE, LINE)
        row_ptr, cos_ptr, sin_ptr = q_ptr + t * q_pitch, cos_ptr + t * HALF, sin_ptr + t * HALF
        if ROUNDS:
            q = official_queries(row_ptr, cos_ptr, sin_ptr, num_heads, I_PAD, DIM, HALF, 16)
        else:
            q = rotated_queries(row_ptr, cos_ptr, sin_ptr, num_heads, I_PAD, DIM, HALF)
        if FORM == VALUES:
            q_across = tl.trans(q)
        else:
            q_across = in_fours(enlarged(q, FP8_QUERY if FORM == FP8_PAGES else FP4_QUERY), I_PAD, DIM)
        i, r = tl.arange(0, I_PAD), tl.arange(0, ROWS)
        weights = tl.load(weights_ptr + t * weights_pitch + i, mask=i < num_heads, other=0.0).to(tl.float32) * scale
        offsets = r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        scores_ptr = out_ptr + t * table_blocks * ROWS
        for number in tl.range(first, tl.cdiv(visible, ROWS), step, num_stages=STAGES):
            page = keys_ptr + block.to(tl.int64) * PAGE
            keys = tl.load(page + offsets)
            if FORM == FP8_PAGES:
                key_scales = tl.load((page + ROWS * WIDTH).to(tl.pointer_type(tl.float32)) + r)
                products = tl.dot(widen_fp8(keys, PDL), q_across)
            elif FORM == FP4_PAGES:
                packed = tl.load((page + ROWS * WIDTH).to(tl.pointer_type(tl.int32)) + r)
                scales = spread_scales(packed, ROWS, WIDTH)
                products = tl.dot(widen_fp4(keys, scales, PDL), q_across)
            else:
                products = tl.dot(keys, q_across)
            block = tl.load(table + tl.minimum(number + step, table_blocks - 1))
            # A NaN passes: the plain maximum would make it 0.
            products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL)
            scores = weighted_sums(products, weights, ROWS, I_PAD)
            if FORM == FP8_PAGES:
                scores *= key_scales  # of no sign, so that relu may come first
            c = number * ROWS + r
            tl.store(scores_ptr + c, scores, mask=c < visible)


ScoresCallKey = tuple[torch.Size, int, torch.dtype, int, torch.dtype, torch.Size, int]
"""Shape and pitch of q, dtype and pitch of the weights, dtype of the keys, shape of the block table, device."""


@dataclass(frozen=True)
class ScoresOperand:
    """launches: by ``ScoresCallKey``, for inputs that have passed every check."""

    pages: EntryPages
    launches: LaunchCache[ScoresCallKey, tuple[TritonCall, EmptyOutput]] = field(
        default_factory=LaunchCache, compare=False
    )
    lock: Lock = field(default_factory=Lock, compare=False)


class TritonIndexScores:
    """Scores [T, C]: sum over heads of weight * relu(rotated query . key), for the entries that each row sees.

    rounds_queries: to FP4 behind a Hadamard rotation, as the keys are stored under official numerics.
    """

    def __init__(self, rounds_queries: bool) -> None:
        self._rounds_queries = rounds_queries

    def prepare(self, weights: EntryPages) -> ScoresOperand:
        """Makes the operand. Errors: ValueError for blocks of another number of entries than 64."""
        if weights.per_block != PER_BLOCK:
            raise ValueError(f"per_block is {weights.per_block}; this kernel reads blocks of {PER_BLOCK} keys")
        return ScoresOperand(weights)

    def configs(self, operand: ScoresOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def variant(self, query: IndexQuery, operand: ScoresOperand) -> str:
        """Returns the variant's name, which depends on the number of heads."""
        name = "index_scores_fp4" if self._rounds_queries else "index_scores"
        return variant_name(name, heads=padded_heads(query.q_TIH.shape[1]))

    def run(
        self,
        query: IndexQuery,
        keys: torch.Tensor,
        rows: PagedRows,
        operand: ScoresOperand,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes scores float32 [T, B * 64]; what follows a row's visible entries is not written.

        Errors: ValueError naming the operand for a wrong shape, dtype, device, stride or alignment.
        """
        check_query(query, rows)
        device, width = query.q_TIH.device, rows.blocks_TB.shape[1] * PER_BLOCK
        check_keys(keys, device)
        if out is not None:
            check("out", out, (torch.float32,), (len(query.q_TIH), width), device)
        q, weights = query.q_TIH, query.weights_TI
        key = q.shape, q.stride(0), weights.dtype, weights.stride(0), keys.dtype, rows.blocks_TB.shape, q.get_device()
        prepared = operand.launches.get(key)
        if prepared is None:
            out = torch.empty(len(q), width, device=device) if out is None else out
            call = _first_launch(query, keys, rows, out, operand.pages.ratio, self._rounds_queries)
            if call is not None:
                operand.launches.add(key, (call, EmptyOutput(out.shape, out.dtype, key[6])))
            return out
        call, empty = prepared
        out = empty.new() if out is None else out
        with operand.lock:
            addresses = (tensor.data_ptr() for tensor in (*query, keys, *rows, out))
            call.start(current_stream(key[6]), *addresses)
        return out

    def __call__(
        self,
        query: IndexQuery,
        keys: torch.Tensor,
        rows: PagedRows,
        pages: EntryPages = CSA_PAGES,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes ``run`` with the signature of the twin."""
        return self.run(query, keys, rows, self.prepare(pages), out=out)


def padded_heads(num_heads: int) -> int:
    """Returns the number of heads that the product is computed for."""
    padded: int = max(16, triton.next_power_of_2(num_heads))
    return padded


def num_programs(num_rows: int, num_blocks: int, per_sm: int) -> int:
    """Returns the programs of each row: all at work at once, with equal numbers of blocks in the longest row.

    Where each would have one block, three an SM are enough: the rotation of its queries takes a program longer.
    """
    most = max(1, NUM_SMS * per_sm // max(num_rows, 1))
    if num_blocks <= most:
        most = max(1, NUM_SMS * min(per_sm, 3) // max(num_rows, 1))
    programs: int = triton.cdiv(num_blocks, triton.cdiv(num_blocks, most))
    return programs


def check_rows(rows: PagedRows, num_rows: int, device: torch.device) -> None:
    """Checks positions and block tables. Errors: ValueError naming the operand."""
    check("positions_T", rows.positions_T, (torch.int32,), (num_rows,), device)
    if rows.blocks_TB.ndim != 2 or not rows.blocks_TB.shape[1]:
        raise ValueError(f"blocks_TB must be [rows, blocks], found shape {list(rows.blocks_TB.shape)}")
    check("blocks_TB", rows.blocks_TB, (torch.int32,), (num_rows, rows.blocks_TB.shape[1]), device)


def check_keys(keys: torch.Tensor, device: torch.device) -> None:
    """Checks a pool of keys: bfloat16 rows or pages. Errors: ValueError naming it."""
    form = form_of(keys)
    if form == VALUES.value:
        check("keys", keys, (torch.bfloat16,), (len(keys), INDEX_DIM), device)
    else:
        check("keys", keys, (torch.uint8,), (len(keys), PER_BLOCK * PAGE_KEY_BYTES[form]), device)


def form_of(keys: torch.Tensor) -> int:
    """Returns the form of a pool of keys; pages that are not FP4 are taken for FP8."""
    if keys.dtype is not torch.uint8:
        return int(VALUES.value)
    return int((FP4_PAGES if keys.shape[-1] == PER_BLOCK * FP4_KEY_BYTES else FP8_PAGES).value)


def check_query(query: IndexQuery, rows: PagedRows) -> None:
    """Checks a step's operands. Errors: ValueError naming the operand."""
    q, weights, cos, sin = query
    check_rank("q_TIH", q, 3, INTERPRETED)
    num_rows, num_heads, dim = q.shape
    if dim != INDEX_DIM or not 0 < num_heads <= MAX_HEADS or q.dtype is not torch.bfloat16:
        raise ValueError(f"q_TIH must be bfloat16 [rows, 1 to {MAX_HEADS}, {INDEX_DIM}], found {list(q.shape)}")
    if q.stride()[1:] != (INDEX_DIM, 1) or q.stride(0) % 8:
        raise ValueError(f"q_TIH must have dense heads, rows at multiples of 8 elements, found strides {q.stride()}")
    check_alignment("q_TIH", q)
    if weights.dtype not in (torch.bfloat16, torch.float32) or weights.shape != (num_rows, num_heads):
        raise ValueError(f"weights_TI must be bfloat16 or float32 {[num_rows, num_heads]}, found {list(weights.shape)}")
    if weights.device != q.device or (weights.stride(1) != 1 and num_heads > 1):
        raise ValueError(f"weights_TI must have dense rows on {q.device}, found strides {weights.stride()}")
    check_alignment("weights_TI", weights)
    check("cos_TF", cos, (torch.float32,), (num_rows, ROTARY_DIM // 2), q.device)
    check("sin_TF", sin, (torch.float32,), (num_rows, ROTARY_DIM // 2), q.device)
    check_rows(rows, num_rows, q.device)


def _first_launch(
    query: IndexQuery, keys: torch.Tensor, rows: PagedRows, out: torch.Tensor, ratio: int, rounds_queries: bool
) -> TritonCall | None:
    """Launches through Triton, which compiles; ``None`` where there are no rows, or where Triton interprets."""
    num_rows, num_heads, dim = query.q_TIH.shape
    if not num_rows:
        return None
    table_blocks, pdl, form = rows.blocks_TB.shape[1], not INTERPRETED, form_of(keys)
    words, word_bytes = WORDS[form], WORDS[form].itemsize
    pitches = query.q_TIH.stride(0), query.weights_TI.stride(0)
    scale = dim**-0.5 * num_heads**-0.5 * WEIGHT_FACTORS[form]
    return launch(
        index_scores_kernel,
        (num_programs(num_rows, table_blocks, PROGRAMS_PER_SM[form]), num_rows),
        (*query, keys.view(words), *rows, out, *pitches, num_heads, table_blocks, scale),
        {
            "RATIO": ratio,
            "I_PAD": padded_heads(num_heads),
            "DIM": INDEX_DIM,
            "HALF": ROTARY_DIM // 2,
            "ROWS": PER_BLOCK,
            "WIDTH": INDEX_DIM if form == VALUES.value else INDEX_DIM // 4,
            "PAGE": PER_BLOCK * PAGE_KEY_BYTES[form] // word_bytes,
            "LINE": 128 // word_bytes,
            "FORM": form,
            "ROUNDS": rounds_queries,
            "STAGES": NUM_STAGES[form],
            "PDL": pdl,
            "num_warps": 4,
            "launch_pdl": pdl,
            # Products of a rotation are rounded one by one, as torch does: the same queries, bit for bit.
            "enable_fp_fusion": False,
        },
        moving=range(8),
    )


INDEX_SCORES = TritonIndexScores(rounds_queries=False)
INDEX_SCORES_FP4 = TritonIndexScores(rounds_queries=True)
