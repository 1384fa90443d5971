"""Measures the embedded model on this machine: load time, time to the first token, decode rate.

    python bench/first_light.py [--device cpu] [--out bench/results/first_light.jsonl] [--commit ID]

Prints a table and, with --out, appends one JSON line with device, versions and commit. Greedy decode, batch 1, random
prompt tokens, end of text ignored so that every run decodes the same number of tokens; medians of several runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, device_caps, leave_a_core, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

PROMPT_TOKENS, DECODE_TOKENS, NUM_RUNS = 20, 64, 7
TARGETS = {"load_s": "< 5", "first_token_cold_s": "< 1", "first_token_s": "< 1", "tokens_per_s": ">= 15"}
"""The embedded model's required figures on two CPU cores."""


def main() -> int:
    """Measures, prints, and optionally records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=_commit(), help="the commit measured (default: asked of git)")
    args = parser.parse_args()
    row = measure(args.device) | {"commit": args.commit}
    width = max(map(len, row))
    for key, value in row.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{key:{width}}  {text:10} {TARGETS.get(key, '')}".rstrip())
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    return 0


def measure(device: str) -> dict[str, object]:
    """Returns a row: seconds and tokens per second, with the device and versions."""
    config = EngineConfig.for_device(device)
    leave_a_core()
    start = time.perf_counter()
    model = load_model(default_model_dir(), config)
    _synchronize(device)
    load_s = time.perf_counter() - start
    cold_s, _ = _generate(model, device)  # the first call also initialises torch's libraries
    runs = [_generate(model, device) for _ in range(NUM_RUNS)]
    return {
        "bench": "first_light",
        "load_s": load_s,
        "first_token_cold_s": cold_s,
        "first_token_s": statistics.median(first for first, _ in runs),
        "tokens_per_s": statistics.median(DECODE_TOKENS / decode for _, decode in runs),
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "runs": NUM_RUNS,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": device_caps(device).name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _generate(model: Model, device: str) -> tuple[float, float]:
    """Returns (seconds to the first token, seconds for DECODE_TOKENS more)."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, model.config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    cache = model.new_cache()
    start = time.perf_counter()
    token = int(model.forward(ForwardBatch.of([(prompt, cache)], device))[0].argmax())
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = int(model.forward(ForwardBatch.of([([token], cache)], device))[0].argmax())
    return first_s, time.perf_counter() - start


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _commit() -> str:
    """Returns the measured commit, or "unknown" outside a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
