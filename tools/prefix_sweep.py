"""Compares answers that begin with a hit of the prefix cache with cold ones, for every length of a range of prompts.

    PYTHONPATH=src python tools/prefix_sweep.py --lengths 250:520 --dtype float64 [--out sweep.jsonl]

The embedded model, greedy. For each length: the prompt cold, without any prefix cache; then with one, the same prompt
twice; a prompt that parts from it at its last token; and the conversation that goes on behind its answer. Prints a line
of JSON for each length, and how many of all answers differ: none should.
"""

import argparse
import json
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ownpath.bench.record import append_lines
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model

FORMATS = {str(one): one for one in CacheFormat}
LIMIT_S = 300.0
NUM_MORE = 9
"""Tokens that the next turn adds."""


class Given(NamedTuple):
    """An answer, and how many tokens of its prompt were not computed."""

    token_ids: list[int]
    num_cached: int


def answer(engine: Engine, prompt_ids: list[int], num_tokens: int) -> Given:
    """Runs one request to its end. Errors: RuntimeError if it fails."""
    heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    request = Request(prompt_ids, SamplingParams(num_tokens, temperature=0.0), heard.put)
    engine.submit([request])
    while (output := heard.get(timeout=LIMIT_S)).finish_reason is None:
        pass
    if output.error is not None:
        raise RuntimeError(output.error)
    return Given(list(request.output_ids), request.num_cached)


def started(model: Model, config: EngineConfig, prefix: PrefixCache | None) -> Engine:
    """Starts an engine whose requests end by their length alone."""
    engine = Engine(model, config, model.config.vocab_size, end_token_ids=(), prefix=prefix)
    engine.start()
    return engine


def differences(model: Model, config: EngineConfig, length: int, num_tokens: int, num_tails: int) -> dict[str, object]:
    """Runs all prompts of a length, cold and with a prefix cache."""
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(7, 2000, (length,), generator=generator).tolist()
    cold = started(model, config, None)
    first = answer(cold, ids, num_tokens).token_ids
    prompts = [ids, ids, [*ids[:-1], 7], [*ids, *first, *range(10, 10 + NUM_MORE)]]
    expected = [first, first, *(answer(cold, prompt, num_tokens).token_ids for prompt in prompts[2:])]
    cold.stop()
    prefix = PrefixCache(model.caches, PrefixSettings(16, num_tails=num_tails))
    warm = started(model, config, prefix)
    found = [answer(warm, prompt, num_tokens) for prompt in prompts]
    warm.stop()
    faults = prefix.faults()
    prefix.clear()
    return {
        "length": length,
        "cached": [one.num_cached for one in found],
        "differ": sum(one.token_ids != wanted for one, wanted in zip(found, expected, strict=True)),
        "faults": faults,
    }


def records(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields a record for each length."""
    config = EngineConfig(
        args.device,
        getattr(torch, args.dtype),
        max_model_len=max(args.lengths) + 2 * args.tokens + NUM_MORE,
        max_num_seqs=2,
        cache_format=FORMATS[args.cache_format],
        rows_per_request=args.rows_per_request,
    )
    model = load_model(default_model_dir(), config)
    for length in args.lengths:
        yield differences(model, config, length, args.tokens, args.tails)


def read_range(text: str) -> range:
    """Reads FIRST:LAST or FIRST:LAST:STEP."""
    first, last, *step = map(int, text.split(":"))
    return range(first, last + 1, *step)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares every length; ends with 1 if an answer differs or the books do not balance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--cache-format", choices=tuple(FORMATS), default=str(CacheFormat.BF16))
    parser.add_argument("--rows-per-request", type=int, default=1)
    parser.add_argument("--lengths", type=read_range, default=range(255, 261))
    parser.add_argument("--tokens", type=int, default=6, help="of each answer (default: 6)")
    parser.add_argument("--tails", type=int, default=4, help="places for them (default: 4)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    num_wrong = 0
    for record in records(args):
        print(json.dumps(record), flush=True)
        num_wrong += record["differ"] != 0 or record["faults"] != []
        if args.out is not None:
            append_lines(args.out, [record])
    print(json.dumps({"lengths": len(args.lengths), "wrong": num_wrong}))
    raise SystemExit(num_wrong > 0)


if __name__ == "__main__":
    main()
