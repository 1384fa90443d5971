"""Measures an engine's tokens per second with drafts beside without.

    PYTHONPATH=src python tools/draft_rate.py --shape trained --requests 1,8,32 --out draft_rate.jsonl
    PYTHONPATH=src python tools/draft_rate.py --shape embedded --requests 1,8,32 --out draft_rate.jsonl

``trained``: the embedded model with its trained module, asked ``--questions`` chat questions of its examination, greedy
and at temperature 1, as many at a time as requests; guesses are right as often as they are.
Other shapes: a model of random weights with a module. Random weights guess nothing right, so guesses are accepted by
chance, at each of the rates of ``--accepted``: forced, for measuring alone, and tokens are no answer of the model's.

Requests come in two ways. Groups: so many begin together, and the next when all have ended; the rate is of all tokens,
from each group's first one to its last, ``with_prompts`` from the first request on. Flows: each that ends is followed
by the next one, and the rate has the prompts in it.

The policy decides as in a server. Each way runs in turns of rounds; those of the first ``--warm-up`` seconds do not
count. Rates are of all rounds that count together, so that the policy's trials are in them; ``over_plain_median`` is of
the rounds' own ratios, which a few rounds that the host held up do not move.
"""

import argparse
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny.batches import Encoder
from tiny.exam import questions
from tokenizers import Tokenizer

from ownpath.bench.drafts import accept_by_chance
from ownpath.bench.record import append_lines, provenance
from ownpath.bench.request import StepOptions
from ownpath.bench.step import ONE_RANK_SETS, make_model, step_config
from ownpath.config import EngineConfig, ModelConfig
from ownpath.end_tokens import read_end_tokens
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.graphs import StepGraphs
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model

LIMIT_S, EXAM_SEED = 120.0, 20261122
EXAM_GROUPS = {
    "short": ("capital/chat", "sum/chat"),
    "long": ("repeat/chat/30", "repeat/chat/60", "tools/chat", "tools/thinking"),
}


class Heard:
    """The tokens of a request and their times."""

    def __init__(self, at_end: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self._ended, self._at_end = threading.Event(), at_end

    def __call__(self, output: StepOutput) -> None:
        if output.token is not None:
            self.times.append(time.perf_counter())
            self.ids.append(output.token.token_id)
        if output.finish_reason is not None:
            self._ended.set()
            self._at_end()

    def wait(self) -> list[float]:
        """Returns the times once the request has ended."""
        assert self._ended.wait(LIMIT_S), "a request did not end"
        return self.times


class Asked(NamedTuple):
    """The requests of a round, so many at a time. flows: whether each that ends is followed by the next one."""

    prompts: list[list[int]]
    params: SamplingParams
    flows: bool = False


class Round(NamedTuple):
    """num_tokens: of all answers. seconds: from each group's first token to its last; whole_s: with prompts. ids: the
    answers."""

    num_tokens: int
    seconds: float
    whole_s: float
    ids: list[list[int]]


def flow_of(engine: Engine, asked: Asked, count: int) -> Round:
    """Asks everything, the next one whenever one of ``count`` ends."""
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    heard: list[Heard] = []
    begin = time.perf_counter()
    for idx, prompt in enumerate(asked.prompts):
        if idx >= count:
            ended.get(timeout=LIMIT_S)
        heard.append(Heard(lambda: ended.put(None)))
        engine.submit([Request(prompt, replace(asked.params, seed=idx), heard[-1])])
    times = [one.wait() for one in heard]
    seconds = max(own[-1] for own in times) - begin
    return Round(sum(map(len, times)), seconds, seconds, [one.ids for one in heard])


def round_of(engine: Engine, asked: Asked, count: int) -> Round:
    """Asks everything, ``count`` requests at a time."""
    if asked.flows:
        return flow_of(engine, asked, count)
    num_tokens, seconds, whole_s, ids = 0, 0.0, 0.0, []
    for start in range(0, len(asked.prompts), count):
        heard = [Heard() for _ in asked.prompts[start : start + count]]
        begin = time.perf_counter()
        pairs = zip(asked.prompts[start : start + count], heard, strict=True)
        engine.submit(
            [Request(one, replace(asked.params, seed=start + idx), own) for idx, (one, own) in enumerate(pairs)]
        )
        times = [one.wait() for one in heard]
        first, last = min(own[0] for own in times), max(own[-1] for own in times)
        # Of several requests the first token of each is in the time; of one it is not.
        num_tokens += sum(map(len, times)) - 1
        seconds, whole_s = seconds + last - first, whole_s + last - begin
        ids += [one.ids for one in heard]
    return Round(num_tokens, seconds, whole_s, ids)


def made_up(args: argparse.Namespace, count: int) -> Iterator[tuple[str, Asked]]:
    """Yields short prompts, none of which ends before it has all its tokens."""
    prompts = [[3 + idx, 5, 7, 9] for idx in range(count)]
    yield "greedy", Asked(prompts, SamplingParams(args.tokens, temperature=0.0))


def exam(args: argparse.Namespace, count: int) -> Iterator[tuple[str, Asked]]:
    """Yields chat questions of the embedded model's examination: short answers, of ten tokens, and long ones."""
    encoder = Encoder(Tokenizer.from_file(str(default_model_dir() / "tokenizer.json")))
    for length, groups in EXAM_GROUPS.items():
        fitting = [one for one in questions(EXAM_SEED) if one.group.startswith(groups)]
        some = random.Random(5).sample(fitting, max(args.questions, count))
        prompts = [encoder.encode(one.prompt)[0] for one in some]
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            params = SamplingParams(args.tokens, temperature=temperature)
            yield f"{name}, {length} answers", Asked(prompts, params)
            if args.flows and count > 1:
                yield f"{name}, {length} answers, flowing", Asked(prompts * 4, params, flows=True)


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


def engines_of(args: argparse.Namespace, model: Model, config: EngineConfig) -> dict[str, Engine]:
    """Makes an engine for each way to run; all share the model, its caches and the decoder of plain steps, which know
    one engine at a time: see ``wait_for_rest``."""
    counts, num_vocab, ends = args.requests, model.config.vocab_size, frozenset[int]()
    if args.shape == "trained":
        ends = read_end_tokens(default_model_dir(), model.config).ids
    plain = Decoder(model, max(counts), num_vocab)
    captured(plain, counts, args.device)
    found = {"plain": Engine(model, config, num_vocab, end_token_ids=ends, decoder=plain)}
    judges = {f"drafts, {share:g} accepted by force": accept_by_chance(share, args.device) for share in args.accepted}
    for name, judge in {"drafts": None}.items() if args.shape == "trained" else judges.items():
        decoder = DraftDecoder(model, max(counts), num_vocab, judge)
        captured(decoder, counts, args.device)
        drafts = Drafts(model, decoder, DraftPolicy())
        found[name] = Engine(model, config, num_vocab, end_token_ids=ends, decoder=plain, drafts=drafts)
    return found


def rates(args: argparse.Namespace, model: Model, config: EngineConfig) -> Iterator[dict[str, object]]:
    """Yields a row for each way to run and number of requests, in turns of rounds."""
    engines = engines_of(args, model, config)
    for engine in engines.values():
        engine.start()
    try:
        for count in args.requests:
            for how, asked in (exam if args.shape == "trained" else made_up)(args, count):
                yield from measured(args, engines, asked, {"requests": count, "drawn": how})
    finally:
        for engine in engines.values():
            engine.stop()


def wait_for_rest(engine: Engine) -> None:
    """Waits until an engine has read its last step, which an ended answer does not wait for: caches are back then."""
    while engine.load().slots.used:
        time.sleep(0.001)


def counts_of(engine: Engine) -> tuple[int, int, int]:
    """Returns its steps with drafts, guesses, and guesses that were right."""
    counts = engine.load().drafts
    return counts.num_steps, counts.num_guesses, counts.num_right


def measured(
    args: argparse.Namespace, engines: dict[str, Engine], asked: Asked, facts: dict[str, Any]
) -> Iterator[dict[str, object]]:
    """Yields a row for each way to run one thing."""
    found: dict[str, list[Round]] = {name: [] for name in engines}
    for seconds, least in ((args.warm_up, 1), (args.seconds, args.rounds)):
        before = {name: counts_of(engine) for name, engine in engines.items()}
        for rounds in found.values():
            rounds.clear()
        while min(map(len, found.values())) < least or min(map(seconds_of, found.values())) < seconds:
            for name, engine in engines.items():
                found[name].append(round_of(engine, asked, facts["requests"]))
                wait_for_rest(engine)
    of_plain = rate_of(found["plain"])
    for name, engine in engines.items():
        rounds = found[name]
        steps, guesses, right = (now - then for now, then in zip(counts_of(engine), before[name], strict=True))
        ratios = [rate_of([own]) / rate_of([other]) for own, other in zip(rounds, found["plain"], strict=True)]
        same = sum(one == other for one, other in zip(rounds[-1].ids, found["plain"][-1].ids, strict=True))
        yield {
            "how": name,
            **facts,
            "tokens_per_s": round(rate_of(rounds), 1),
            "over_plain": round(rate_of(rounds) / of_plain, 3),
            "over_plain_median": round(statistics.median(ratios), 3),
            "with_prompts": round(sum(one.num_tokens for one in rounds) / seconds_of(rounds), 1),
            "rounds": len(rounds),
            "seconds": round(seconds_of(rounds), 3),
            "steps_with_drafts": steps,
            "guesses": guesses,
            "guesses_right": right,
            "tokens": rounds[-1].num_tokens,
            "answers_as_plain": f"{same} of {len(asked.prompts)}",
        }


def rate_of(rounds: Sequence[Round]) -> float:
    """Returns the tokens per second of rounds together."""
    return sum(one.num_tokens for one in rounds) / sum(one.seconds for one in rounds)


def seconds_of(rounds: Sequence[Round]) -> float:
    """Returns the seconds of rounds together, with prompts."""
    return sum(one.whole_s for one in rounds)


def main() -> None:
    """Prints a line for each measurement and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("trained", "embedded", "small", "flash"), default="embedded")
    parser.add_argument("--requests", type=lambda text: [*map(int, text.split(","))], default=[1, 8, 32])
    parser.add_argument("--accepted", type=lambda text: [*map(float, text.split(","))], default=[0.8, 0.0])
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each request, the most of an answer")
    parser.add_argument("--questions", type=int, default=32, help="of trained, of each length")
    parser.add_argument("--flows", action="store_true", help="requests that come and go too, not only in groups")
    parser.add_argument("--rounds", type=int, default=5, help="that count, at least")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the rounds that count, at least")
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds of the rounds before that do not count")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    config = replace(EngineConfig.for_device(args.device, 1024), max_num_seqs=max(args.requests))
    config = replace(config, loads_draft=True, rows_per_request=ROWS)
    sets = ONE_RANK_SETS if args.shape == "flash" else None
    if args.shape == "trained":
        model = load_model(default_model_dir(), config)
    else:
        model = make_model(config_of(args.shape), config, "nvidia", sets).model
    command = f"python tools/draft_rate.py --shape {args.shape} --requests {','.join(map(str, args.requests))}"
    origin = provenance(args.device, args.commit, command, "wall clock") | {"shape": args.shape}
    for row in rates(args, model, config):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.out is not None:
            append_lines(args.out, [{"bench": "draft_rate", **row, **origin}])


if __name__ == "__main__":
    main()
