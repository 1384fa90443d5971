"""Measures an engine's tokens per second with drafts beside without, guesses being accepted by force.

    PYTHONPATH=src python tools/draft_rate.py --shape embedded --requests 1,8,32 --out draft_rate.jsonl

A model of random weights with an MTP module. Random weights guess nothing right, so guesses are accepted by chance, at
each of the rates of ``--accepted``: forced, for measuring alone, and tokens are no answer of the model's. The policy
decides as in a server. Rates are of all tokens, from the first one of any request to the last.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ownpath.bench.drafts import accept_by_chance
from ownpath.bench.record import append_lines, provenance
from ownpath.bench.request import StepOptions
from ownpath.bench.step import ONE_RANK_SETS, make_model, step_config
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.graphs import StepGraphs
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import default_model_dir
from ownpath.model.model import Model

LIMIT_S = 120.0


class Heard:
    """The times of a request's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._ended = threading.Event()

    def __call__(self, output: StepOutput) -> None:
        if output.token is not None:
            self.times.append(time.perf_counter())
        if output.finish_reason is not None:
            self._ended.set()

    def wait(self) -> list[float]:
        """Returns the times once the request has ended."""
        assert self._ended.wait(LIMIT_S), "a request did not end"
        return self.times


def rate_of(engine: Engine, count: int, num_tokens: int) -> float:
    """Returns tokens per second of a round of requests, prompts not counted."""
    heard = [Heard() for _ in range(count)]
    params = SamplingParams(num_tokens, temperature=0.0)
    engine.submit([Request([3 + idx, 5, 7, 9], params, one) for idx, one in enumerate(heard)])
    times = [one.wait() for one in heard]
    begin, end = min(own[0] for own in times), max(own[-1] for own in times)
    return sum(map(len, times)) / (end - begin)


def config_of(shape: str) -> ModelConfig:
    """Returns a shape's config with one module of drafts."""
    if shape == "embedded":
        config = ModelConfig.from_file(default_model_dir() / "config.json")
    else:
        config = step_config(shape, StepOptions())
    return replace(config, num_nextn_predict_layers=1)


def captured(decoder: StepGraphs, counts: Sequence[int], device: str) -> None:
    """Captures graphs of these numbers of requests, and of fewer that are left when some end."""
    most = decoder.buckets[-1]
    decoder.buckets = tuple(sorted({*(count for count in counts if count < most), most}))
    with torch.inference_mode():
        (decoder.warm_up if device == "cpu" else decoder.capture)(lambda *_: None)


def rates(args: argparse.Namespace, model: Model, config: EngineConfig) -> Iterator[dict[str, object]]:
    """Yields a row for each way to run and number of requests, in turns of rounds."""
    counts, num_vocab = args.requests, model.config.vocab_size
    plain = Decoder(model, max(counts), num_vocab)
    captured(plain, counts, args.device)
    engines = {"plain": Engine(model, config, num_vocab, end_token_ids=(), decoder=plain)}
    for share in args.accepted:
        decoder = DraftDecoder(model, max(counts), num_vocab, accept_by_chance(share, args.device))
        captured(decoder, counts, args.device)
        drafts = Drafts(model, decoder, DraftPolicy())
        name = f"drafts, {share:g} accepted by force"
        engines[name] = Engine(model, config, num_vocab, end_token_ids=(), decoder=plain, drafts=drafts)
    for engine in engines.values():
        engine.start()
    try:
        for count in counts:
            found: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(1 + args.rounds):
                for name, engine in engines.items():
                    found[name].append(rate_of(engine, count, args.tokens))
            of_plain = statistics.median(found["plain"][1:])
            for name, engine in engines.items():
                rate, drafts_of = statistics.median(found[name][1:]), engine.load().drafts
                facts = {"steps_with_drafts": drafts_of.num_steps, "guesses_right": drafts_of.num_right}
                row = {"how": name, "requests": count, "tokens_per_s": round(rate, 1)}
                yield row | {"over_plain": round(rate / of_plain, 3)} | facts
    finally:
        for engine in engines.values():
            engine.stop()


def main() -> None:
    """Prints a line for each measurement and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("embedded", "small", "flash"), default="embedded")
    parser.add_argument("--requests", type=lambda text: [*map(int, text.split(","))], default=[1, 8, 32])
    parser.add_argument("--accepted", type=lambda text: [*map(float, text.split(","))], default=[0.8, 0.0])
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more comes before")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    config = replace(EngineConfig.for_device(args.device, 1024), max_num_seqs=max(args.requests))
    config = replace(config, loads_draft=True, rows_per_request=ROWS)
    sets = ONE_RANK_SETS if args.shape == "flash" else None
    model = make_model(config_of(args.shape), config, "nvidia", sets).model
    command = f"python tools/draft_rate.py --shape {args.shape} --requests {','.join(map(str, args.requests))}"
    origin = provenance(args.device, args.commit, command, "wall clock") | {"shape": args.shape}
    for row in rates(args, model, config):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.out is not None:
            append_lines(args.out, [{"bench": "draft_rate", **row, **origin}])


if __name__ == "__main__":
    main()
