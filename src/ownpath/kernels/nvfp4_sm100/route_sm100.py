"""Routing of the grouped products' rows: sorts routed pairs into tiles of one expert, and sums outputs per token.

How it works. A *pair* is a token's choice of an expert, numbered token * choices + choice. ``count_kernel`` counts
the pairs of each expert; ``place_kernel`` gives expert e the tiles of 128 rows after those of experts 0..e-1, and its
pairs the rows of these tiles in their own order. Each expert has its own program, which reads all ids (they fit in
L2) and ranks its own by a running sum: no atomics, no sort, no order that depends on timing, and the same rows for
the same ids every time. Rows that fill a tile up hold pair -1, tiles that no expert needs hold expert -1, pairs whose
id is outside [0, E) (an expert that lives elsewhere) hold row -1. Nothing is read back to the host: the number of
tiles launched is the largest possible (``num_tiles_bound``), and unused ones end at once.

Worked example, tiles of 128, E = 3, ids [2, 0, 2]: counts 1, 0, 2; expert 0 has tile 0, expert 2 has tile 1; pair 1
goes to row 0, pairs 0 and 2 to rows 128 and 129; pair_of_row = [1, -1 ... | 0, 2, -1 ...]; expert_of_tile = [0, 2].

``combine_kernel`` sums a token's expert outputs in the order of its choices, in float32, weighted there (not before:
the expert's own output is rounded to BF16 once, unweighted), and rounds once. The sum does not depend on which other
tokens are in the batch.

Roofline. Placing 8192 x 6 ids reads 256 x 196 KB from L2, about 10 us and independent of the model's width; at decode
it is a launch's latency. Combining 8192 x 6 rows of 4096 reads 403 MB and writes 67 MB: 59 us at 8 TB/s, the cost of
writing expert outputs before their sum, which is what keeps the sum deterministic.

Numbers that depend on the batch are not specialised (``do_not_specialize``), so that no batch size recompiles.

Limits: E at most 1024; ids int32 or int64. Compiled for sm_100a and interpreted on a CPU; never run on a device.
"""

import triton
import triton.language as tl


def num_tiles_bound(num_pairs: int, num_experts: int, tile: int = 128) -> int:
    """Returns the most tiles that ``num_pairs`` routed pairs can need: each expert with a pair rounds up to tiles."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // tile


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(ids_ptr, count_ptr, num_pairs, CHUNK: tl.constexpr):
    """Counts the pairs of each expert: count[e]; the grid is E."""
    expert = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += (tl.load(ids_ptr + at, mask=at < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def place_kernel(
    ids_ptr,
    count_ptr,
    pair_of_row_ptr,
    row_of_pair_ptr,
    expert_of_tile_ptr,
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Assigns rows and tiles to each expert; the grid is E + 1: the last program marks unused rows and tiles."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_POW2)
    counts = tl.load(count_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    tiles = (counts + 127) // 128
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    if expert == NUM_EXPERTS:
        for start in range(first_tile, num_tiles, CHUNK):
            at = start + tl.arange(0, CHUNK)
            tl.store(expert_of_tile_ptr + at, tl.full((CHUNK,), -1, tl.int32), mask=at < num_tiles)
        for start in range(0, num_pairs, CHUNK):
            at = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + at, mask=at < num_pairs, other=0)
            outside = (ids < 0) | (ids >= NUM_EXPERTS)
            tl.store(row_of_pair_ptr + at, tl.full((CHUNK,), -1, tl.int32), mask=(at < num_pairs) & outside)
        return
    count = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    row = first_tile * 128
    for start in range(0, num_pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine = (tl.load(ids_ptr + at, mask=at < num_pairs, other=-1) == expert).to(tl.int32)
        rows = row + tl.cumsum(mine, axis=0) - 1
        tl.store(row_of_pair_ptr + at, rows, mask=mine != 0)
        tl.store(pair_of_row_ptr + rows, at, mask=mine != 0)
        row += tl.sum(mine, axis=0)
    num_mine = (count + 127) // 128
    for start in range(0, num_mine, CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(expert_of_tile_ptr + first_tile + at, tl.zeros((CHUNK,), tl.int32) + expert, mask=at < num_mine)
    padding = first_tile * 128 + count + tl.arange(0, 128)
    last = (first_tile + num_mine) * 128
    tl.store(pair_of_row_ptr + padding, tl.full((128,), -1, tl.int32), mask=padding < last)


@triton.jit
def combine_kernel(out_ptr, row_of_pair_ptr, weight_ptr, y_ptr, D, CHOICES: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes y[t] = sum over choices of weight * out[row] in float32; the grid is (T, ceil(D / COLUMNS))."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_of_pair_ptr + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weight_ptr + token * CHOICES + choice)
        here = (columns < D) & (row >= 0)
        value = tl.load(out_ptr + tl.maximum(row, 0) * D + columns, mask=here, other=0.0).to(tl.float32)
        total += value * tl.where(row >= 0, weight, 0.0)
    tl.store(y_ptr + token * D + columns, total.to(tl.bfloat16), mask=columns < D)
