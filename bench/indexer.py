"""Times the indexer's scores and their selection on a CUDA device: ``python bench/indexer.py --out lines.jsonl``.

Each row is T requests of one context. Every result is checked against the torch twin before it is timed. A graph holds
one call for each of several operand sets; scores read another part of a pool larger than the L2 cache in every call,
select reads scores that may be in the cache, as those of the launch before it are. The median replay counts.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch
from small_ops import COLD_BYTES, READ_CEILING_GBPS, Call, replay_us

from ownpath.bench.record import append_lines, provenance
from ownpath.conformance.indexer import judge_scores, judge_selected
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.scores.types import CSA_PAGES, IndexQuery, PagedRows
from ownpath.kernels.select.types import SelectWeights

SCORES, OFFICIAL, SELECT = "triton.index_scores", "triton.index_scores_fp4", "triton.select"
KEY_BYTES = {"bf16": 256, "fp8": 132}
CONTEXTS, ROWS = (8192, 131072), (1, 8, 32, 128)
HEADS, TOPKS = (64, 4), (512, 1024, 128)
"""V4-Flash's and V4-Pro's index heads and selected entries, and the embedded model's."""
MOST_SETS = 64


@dataclass(frozen=True)
class Pool:
    """Index keys of one form on the device: bfloat16 [blocks * 64, 128], or FP8 pages uint8 [blocks, 64 * 132]."""

    keys: torch.Tensor
    num_blocks: int
    generator: torch.Generator

    @classmethod
    def of(cls, num_blocks: int, form: str) -> "Pool":
        """Draws keys."""
        g = torch.Generator("cuda").manual_seed(0)
        if form == "bf16":
            keys = torch.empty(num_blocks * 64, 128, dtype=torch.bfloat16, device="cuda").normal_(generator=g)
            return cls(keys, num_blocks, g)
        pages = torch.randint(0, 256, (num_blocks, 64 * 132), dtype=torch.uint8, generator=g, device="cuda")
        pages[pages & 127 == 127] = 0  # NaN's codes
        pages[:, 64 * 128 :].view(torch.float32).fill_(0.01)
        return cls(pages, num_blocks, g)

    def rows(self, num_rows: int, context: int) -> PagedRows:
        """Draws block tables of requests that have ``context`` tokens."""
        shape = (num_rows, context // 256)
        picked = torch.randint(1, self.num_blocks, shape, generator=self.generator, device="cuda")
        positions_T = torch.full((num_rows,), context - 1, dtype=torch.int32, device="cuda")
        return PagedRows(positions_T, picked.int())

    def query(self, num_rows: int, num_heads: int) -> IndexQuery:
        """Draws raw queries, head weights and angles."""
        normal = partial(torch.randn, generator=self.generator, device="cuda")
        angles_TF = normal(num_rows, 32) * 100
        q_TIH = normal(num_rows, num_heads, 128).bfloat16()
        return IndexQuery(q_TIH, normal(num_rows, num_heads), angles_TF.cos(), angles_TF.sin())


def scores_calls(pool: Pool, num_rows: int, context: int, num_heads: int, op: str = SCORES) -> list[Call]:
    """Returns calls on different blocks, of which the first is checked. Errors: AssertionError."""
    kernel = KERNELS[op]
    operand, calls = kernel.prepare(CSA_PAGES), list[Call]()
    for number in range(num_sets(64 * num_rows * context)):
        query, rows = pool.query(num_rows, num_heads), pool.rows(num_rows, context)
        out = torch.full((num_rows, context // 4), torch.nan, device="cuda")
        calls.append(partial(kernel.run, query, pool.keys, rows, operand, out=out))
        if not number:
            calls[0]()
            judge_scores(
                out[:2],
                IndexQuery(*(part[:2] for part in query)),
                pool.keys,
                first_rows(rows, 2),
                is_fp4=op == OFFICIAL,
            )
    return calls


def select_calls(pool: Pool, num_rows: int, context: int, topk: int) -> list[Call]:
    """Returns calls on different scores, of which the first is checked. Errors: AssertionError."""
    kernel, weights = KERNELS[SELECT], SelectWeights(topk)
    operand, calls = kernel.prepare(weights), list[Call]()
    workspace = kernel.workspace(operand, num_rows, context // 256, torch.device("cuda"))
    for number in range(min(num_sets(num_rows * context), 16)):
        scores_TC = torch.randn(num_rows, context // 4, generator=pool.generator, device="cuda")
        rows = pool.rows(num_rows, context)
        out = kernel.run(scores_TC, rows, operand, workspace=workspace)
        calls.append(partial(kernel.run, scores_TC, rows, operand, out=out, workspace=workspace))
        if not number:
            judge_selected(out, scores_TC, rows, topk)
    return calls


def first_rows(rows: PagedRows, count: int) -> PagedRows:
    """Returns the first rows of a step."""
    return PagedRows(rows.positions_T[:count], rows.blocks_TB[:count])


def num_sets(moved_bytes: int) -> int:
    """Returns the number of operand sets that together exceed the L2 cache."""
    return int(min(max(2 * COLD_BYTES / moved_bytes, 2), MOST_SETS))


def timed(op: str, form: str, num_rows: int, context: int, calls: list[Call], moved_bytes: int) -> dict[str, Any]:
    """Returns one row of the table."""
    us = replay_us(calls)
    gbps = moved_bytes / us / 1e3
    row = {"op": op, "form": form, "context": context, "rows": num_rows, "us": round(us, 2)}
    return row | {"gbps": round(gbps, 1), "of_read_ceiling": round(gbps / READ_CEILING_GBPS, 3)}


def rows_of_scores(op: str, num_heads: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of the scores, by form of the keys."""
    for form, key_bytes in KEY_BYTES.items():
        pool = Pool.of(65536, form)
        for context, num_rows in product(CONTEXTS, ROWS):
            calls = scores_calls(pool, num_rows, context, num_heads, op)
            moved_bytes = num_rows * context // 4 * (key_bytes + 4)
            yield timed(op, f"{form} {num_heads} heads", num_rows, context, calls, moved_bytes)


def rows_of_select(topk: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of the selection."""
    pool = Pool.of(1024, "bf16")
    for context, num_rows in product(CONTEXTS, ROWS):
        calls = select_calls(pool, num_rows, context, topk)
        yield timed(SELECT, f"top {topk}", num_rows, context, calls, num_rows * (context + 4 * topk))


def main() -> None:
    """Prints the table and appends JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default="", help="recorded with every line")
    options = parser.parse_args()
    facts = provenance("cuda", options.commit, "python bench/indexer.py", "cuda graph replay")
    print(facts["device"], facts["versions"])
    print(f"{'op':26}{'form':16}{'context':>8}{'T':>5}{'us':>9}{'GB/s':>8}{'of 4.41':>9}", flush=True)
    for table in (*starmap(rows_of_scores, product((SCORES, OFFICIAL), HEADS)), *map(rows_of_select, TOPKS)):
        for row in table:
            place = f"{row['op']:26}{row['form']:16}{row['context']:8}{row['rows']:5}"
            print(f"{place}{row['us']:9.2f}{row['gbps']:8.0f}{row['of_read_ceiling']:9.2f}", flush=True)
            if options.out:
                append_lines(options.out, [row | facts])


if __name__ == "__main__":
    main()
