"""Measures the first token of a prompt that is sent again, on a model of V4's shape and random weights.

    PYTHONPATH=src python tools/prefix_rate.py --device cuda --shape flash --tokens 32768,32769 --out prefix.jsonl

Experts are sets that layers share, as in ``ownpath bench step``, so that all layers of V4-Flash fit one H200. The
engine runs in this process, without a decoder: a first token comes from a prompt's step. A hit leaves one token to
compute, or up to 32 where those behind a block's end are too few for a tail; without tails, 256 of a prompt of 32,768
tokens, the most there can be. For each length there is a line of JSON: the cold run's seconds to the first token, and
those of every later one.
"""

import argparse
import json
import queue
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ownpath.bench.published import SHAPES
from ownpath.bench.record import append_lines, provenance
from ownpath.bench.request import StepOptions
from ownpath.bench.step import make_model, step_config
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.prompt_graphs import with_prompt_graphs
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.formats import CacheFormat

FORMATS = {str(one): one for one in CacheFormat}
LIMIT_S = 500.0
NUM_AGAIN = 7
TARGET_S = 0.150
"""A prompt of 32,768 tokens that is sent again has its first token by then, on an H200."""


class Prompts:
    """An engine with a prefix cache, and prompts of random ids for it."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._generator = torch.Generator().manual_seed(seed)

    def fresh(self, num_tokens: int) -> list[int]:
        """Returns a prompt that nobody has sent."""
        ids: list[int] = torch.randint(2, self._engine.num_vocab, (num_tokens,), generator=self._generator).tolist()
        return ids

    def first_token(self, ids: list[int]) -> tuple[float, int, int]:
        """Returns the seconds to a prompt's first token, the token, and how many tokens were not computed."""
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        request = Request(ids, SamplingParams(1, temperature=0.0), heard.put)
        start = time.perf_counter()
        self._engine.submit([request])
        output = heard.get(timeout=LIMIT_S)
        seconds = time.perf_counter() - start
        if output.token is None:
            raise RuntimeError(f"the request failed: {output.error}")
        return seconds, output.token.token_id, request.num_cached

    def measured(self, num_tokens: int) -> dict[str, object]:
        """Measures one length."""
        ids = self.fresh(num_tokens)
        cold_s, expected, _ = self.first_token(ids)
        again = [self.first_token(ids) for _ in range(NUM_AGAIN)]
        seconds, tokens, cached = zip(*again, strict=True)
        if {*tokens} != {expected}:
            raise RuntimeError(f"a hit's token is another: {tokens}, {expected} of the cold run")
        return {
            "prompt_tokens": num_tokens,
            "cached_tokens": cached[-1],
            "cold_first_token_s": round(cold_s, 4),
            "again_first_token_s": round(statistics.median(seconds), 4),
            "again_first_token_each_s": [round(value, 4) for value in seconds],
            "target_s": TARGET_S,
        }


def running_engine(args: argparse.Namespace) -> tuple[Engine, PrefixCache]:
    """Makes the model and starts its engine."""
    options = StepOptions(layers=args.layers, expert_sets=args.expert_sets)
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    config = EngineConfig(
        args.device,
        dtype,
        max_model_len=max(args.tokens) + 256,
        max_num_seqs=2,
        cache_format=FORMATS[args.cache_format],
        is_batch_invariant=args.batch_invariant,
        max_prefill_tokens=args.prefill_tokens,
    )
    model = make_model(step_config(args.shape, options), config, options.export, options.expert_sets).model
    prefix = PrefixCache(model.caches, PrefixSettings(32, num_tails=args.tails), "random weights")
    engine = Engine(with_prompt_graphs(model, config), config, model.config.vocab_size, end_token_ids=(), prefix=prefix)
    engine.start()
    return engine, prefix


def records(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields a record for each length. What is compiled or tuned at first use is so before the first is timed."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    origin = provenance(args.device, commit, "tools/prefix_rate.py", "time.perf_counter")
    engine, prefix = running_engine(args)
    prompts = Prompts(engine, seed=7)
    try:
        for num_tokens in args.tokens:
            warm = prompts.fresh(min(num_tokens, 2 * args.prefill_tokens))
            for _ in range(2):
                prompts.first_token(warm)
            facts = {"shape": args.shape, "layers": args.layers, "cache_format": args.cache_format}
            facts |= {"expert_sets": args.expert_sets, "prefill_tokens": args.prefill_tokens}
            facts |= {"batch_invariant": args.batch_invariant, "snapshot_bytes": prefix.store.bytes_each}
            facts |= {"tails": args.tails, "tail_bytes": prefix.store.tail_bytes_each}
            yield {"bench": "prefix", **facts, **prompts.measured(num_tokens), "origin": origin}
    finally:
        engine.stop()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every length, and prints each record as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="flash")
    parser.add_argument("--layers", type=int, help="the first ones only (default: all)")
    parser.add_argument("--expert-sets", type=int, default=24)
    parser.add_argument("--cache-format", choices=tuple(FORMATS), default=str(CacheFormat.FP8))
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--prefill-tokens", type=int, default=512, help="prompt tokens of a step (default: 512)")
    parser.add_argument("--tails", type=int, default=2, help="places for them (default: 2)")
    parser.add_argument("--tokens", type=lambda text: [int(word) for word in text.split(",")], default=[32768, 32769])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    for record in records(args):
        print(json.dumps(record), flush=True)
        if args.out is not None:
            append_lines(args.out, [record])


if __name__ == "__main__":
    main()
