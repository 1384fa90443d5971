"""Times the sampler on a CUDA device: ``python bench/sample.py --out bench/results/sample.jsonl``.

Tokens are the CPU twin's before anything is timed. A graph holds one call for each of several sets of logits, more
bytes than the second-level cache; the median of its replays is reported per call. ``floor_us`` reads the logits once at
the measured read ceiling; ``torch_us`` is ``argmax`` for greedy rows, and for others softmax, sort, cut and
``multinomial``, captured the same way.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ownpath.bench.record import append_lines, provenance
from ownpath.bench.timing import CudaGraph
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.sample.ref import sample
from ownpath.kernels.sample.types import FilterRows, Sampled, SampleRows

READ_CEILING_GBPS = 4410.0
"""A read-only reduction on one H200, measured."""
KERNEL = "triton.sample"
VOCAB, COLD_BYTES = 129280, 150e6
KINDS: tuple[tuple[str, float, int, float, float, float], ...] = (
    ("greedy", 0.0, 0, 1.0, 0.0, 3.0),
    ("draw", 1.0, 0, 1.0, 0.0, 3.0),
    ("draw, flat", 1.0, 0, 1.0, 0.0, 1.0),
    ("top-p 0.95", 1.0, 0, 0.95, 0.0, 3.0),
    ("top-p 0.5, flat", 1.0, 0, 0.5, 0.0, 1.0),
    ("top-k 50, top-p 0.95, min-p 0.02", 1.0, 50, 0.95, 0.02, 3.0),
    ("top-k 20, flat", 1.0, 20, 1.0, 0.0, 1.0),
)
"""Name, temperature, top-k, top-p, min-p, and the logits' standard deviation; they are normal."""


def rows_of(num_rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> SampleRows:
    """Makes rows with the same parameters and different seeds."""
    held = None
    if (top_k, top_p, min_p) != (0, 1.0, 0.0):
        held = FilterRows(
            torch.full((num_rows,), top_k, dtype=torch.int32, device="cuda"),
            torch.full((num_rows,), top_p, device="cuda"),
            torch.full((num_rows,), min_p, device="cuda"),
        )
    return SampleRows(
        torch.full((num_rows,), temperature, device="cuda"),
        torch.arange(num_rows, device="cuda"),
        torch.zeros(num_rows, dtype=torch.int32, device="cuda"),
        held,
    )


def torch_call(logits: torch.Tensor, temperature: float, top_p: float) -> Callable[[], object]:
    """Returns how torch's own operations choose."""

    def draw() -> torch.Tensor:
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p == 1:
            return torch.multinomial(probs, 1)
        ranked, ids = probs.sort(dim=-1, descending=True)
        kept = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        return ids.gather(1, torch.multinomial(kept, 1))

    return draw if temperature else lambda: logits.argmax(dim=-1)


def on_cpu(rows: SampleRows) -> SampleRows:
    """Copies rows to the CPU."""
    held = None if rows.filters is None else FilterRows(*(part.cpu() for part in rows.filters))
    return SampleRows(rows.temperature_T.cpu(), rows.seed_T.cpu(), rows.index_T.cpu(), held)


def measure(kind: tuple[str, float, int, float, float, float], num_rows: int, seconds: float) -> dict[str, Any]:
    """Measures one row of the table. Errors: AssertionError when a token is wrong."""
    name, temperature, top_k, top_p, min_p, spread = kind
    kernel, moved_bytes = KERNELS[KERNEL], 4 * num_rows * VOCAB
    sets = int(min(max(COLD_BYTES / moved_bytes, 2), 16))
    logits = [torch.randn(num_rows, VOCAB, device="cuda") * spread for _ in range(sets)]
    rows, operand = rows_of(num_rows, temperature, top_k, top_p, min_p), kernel.prepare()
    found = kernel.run(logits[0], rows, operand)
    wanted = sample(logits[0].cpu(), on_cpu(rows))
    assert torch.equal(found.token_T.cpu(), wanted.token_T), name
    out = Sampled(torch.empty_like(found.token_T), torch.empty_like(found.fault_T), None)
    timer = CudaGraph(seconds)
    us = timer.time([partial(kernel.run, one, rows, operand, out=out) for one in logits]).us
    peer_us = timer.time([torch_call(one, temperature, top_p) for one in logits]).us
    floor_us = moved_bytes / READ_CEILING_GBPS / 1e3
    times = {"us": round(us, 2), "floor_us": round(floor_us, 2), "torch_us": round(peer_us, 2)}
    return {"op": KERNEL, "rows": name, "tokens": num_rows, **times, "ratio": round(peer_us / us, 2)}


def main() -> None:
    """Prints and writes all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default="", help="recorded with every line")
    parser.add_argument("--tokens", default="1,8,32,128")
    parser.add_argument("--seconds", type=float, default=0.1)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(kind, num_rows, args.seconds) for kind in KINDS for num_rows in map(int, args.tokens.split(","))]
    facts = provenance("cuda", args.commit, "python bench/sample.py", "cuda graph replay")
    for row in rows:
        print(
            f"{row['rows']:34s} {row['tokens']:4d} rows {row['us']:8.1f} us   floor {row['floor_us']:6.1f}   "
            f"torch {row['torch_us']:8.1f}"
        )
    if args.out:
        append_lines(args.out, [row | facts for row in rows])


if __name__ == "__main__":
    main()
