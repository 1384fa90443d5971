"""Measures what grammars cost: tokens a second of the engine with and without them, and what a step's parts take.

    python tools/bench_grammar.py [MODEL] [--device cuda] [--requests 1 8 32] [--beside 0] [--tokens 256]
    python tools/bench_grammar.py --shape flash --device cuda --cache-format fp8 --requests 32 --tokens 64 --rounds 3
    python tools/bench_grammar.py --host-only --calls --requests 32 --beside 32

Rounds with and without take turns; each generates the same number of tokens a request, and each request is submitted by
itself. Beside the requests that are free in one kind of round and bound in the other, others may run that are always
free. By default: the embedded model. ``--shape`` has random weights of a published shape in its place, so that a step
lasts as long as that model's, experts in sets that layers share as in ``ownpath bench step``, and a vocabulary of its
size: the embedded model's tokens, and made-up words.

Behind the rates: where steps are launched ahead, the host's parts of a step by the clock, medians in a round of their
own, each without the parts inside it, all of which a graph has to hide; on a GPU, by events in its stream, a graph and
what lies between two. ``--host-only`` has a graph and a sampler that draw allowed tokens at random in place of the
model, on a CPU, and leaves their time out. Its parts are the engine thread's processor time, which other work on the
machine disturbs less. ``--calls`` counts torch's calls.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from grammar_parts import CountedCalls, Crowd, FreeDecoder, StepParts, device_line, device_times, free_engine
from shaped_engine import add_shape_arguments, made_up_tokens, shaped_engine

from ownpath.chat.tokenizer import Tokenizer
from ownpath.commands.arguments import add_draft_argument, add_engine_arguments, add_model_argument
from ownpath.commands.session import open_session
from ownpath.engine.engine import Engine
from ownpath.engine.masks import MaskWords
from ownpath.loading import default_model_dir
from ownpath.structured.compiler import GrammarCompiler
from ownpath.structured.grammar import Grammar, GrammarKind, schema_rule
from ownpath.structured.matcher import AnswerMatcher, FreeMasks
from ownpath.structured.vocabulary import Vocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 10_000}
"""A list so long that no round ends it."""
PROMPT = "The people of the village are, in JSON:\n"
TYPICAL = '[{"name": "Ada Lovelace", "age": 36}, {"name": "Alan Turing of Maida Vale", "age": 41}'


def main() -> None:
    """Prints a few lines for each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    add_engine_arguments(parser.add_argument_group("numerics"), parser.add_argument_group("limits"))
    add_draft_argument(parser)
    add_shape_arguments(parser)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--beside", type=int, default=0, help="requests that are always free")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--host-only", action="store_true", help="a graph and a sampler that cost nothing")
    parser.add_argument("--calls", action="store_true", help="count torch's calls in a step")
    args = parser.parse_args()
    with open_engine(args) as (engine, tokenizer):
        compiler = GrammarCompiler(vocabulary_of(tokenizer, engine.num_vocab))
        bench = Bench(engine, tokenizer, compiler, args.tokens)
        for count in args.requests:
            if not args.host_only:
                bench.report_rates(count, args.beside, args.rounds)
            bench.report_parts(count, args.beside, args.calls)
            alone, together = bench.masks_us(count)
            print(f"  masks of {count} answers, us: one by one {alone:.0f}, together {together:.0f}")
        compiler.close()


@contextmanager
def open_engine(args: argparse.Namespace) -> Iterator[tuple[Engine, Tokenizer]]:
    """Runs the engine that the arguments name."""
    max_num_seqs = max(args.requests) + args.beside
    if not args.host_only and args.shape is None:
        with open_session(args, max_num_seqs) as session:
            yield session.engine, session.tokenizer
        return
    tokenizer = Tokenizer.from_folder(default_model_dir())
    if args.host_only:
        engine = free_engine(max_num_seqs, tokenizer.num_tokens)
    else:
        begun = time.perf_counter()
        engine = shaped_engine(args, max_num_seqs, {count + args.beside for count in args.requests})
        print(f"{args.shape}: {engine.num_vocab} tokens, ready in {time.perf_counter() - begun:.1f} s", flush=True)
    engine.start()
    try:
        yield engine, tokenizer
    finally:
        engine.stop()


def vocabulary_of(tokenizer: Tokenizer, count: int) -> Vocabulary:
    """Returns the tokenizer's tokens, and made-up ones behind them if there are to be more."""
    tokens = [tokenizer.token_bytes(idx) for idx in range(tokenizer.num_tokens)]
    tokens = tokens if count == len(tokens) else made_up_tokens(tokens, count)
    return Vocabulary(tokens, tuple(sorted(tokenizer.marker_ids)), (tokenizer.eos_id,))


@dataclass(frozen=True)
class Bench:
    """An engine, and what its answers must fit."""

    engine: Engine
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    num_tokens: int

    def matchers(self, count: int) -> list[AnswerMatcher]:
        """Returns matchers of so many new answers."""
        masks = FreeMasks(self.compiler.vocabulary)
        grammar = Grammar(GrammarKind.LARK, f"start: {schema_rule(SCHEMA)}")
        return [AnswerMatcher(masks, self.compiler.matcher(grammar), (), True) for _ in range(count)]

    def run(self, count: int, num_beside: int, is_bound: bool) -> float:
        """Returns the tokens a second of requests, bound or free, with others beside them."""
        matchers: Sequence[AnswerMatcher | None] = self.matchers(count) if is_bound else [None] * count
        prompt = self.tokenizer.encode_raw(PROMPT)
        return Crowd(self.engine, prompt, [*matchers, *[None] * num_beside], self.num_tokens).rate()

    def report_rates(self, count: int, num_beside: int, num_rounds: int) -> None:
        """Prints the rates, free and bound in turn."""
        rates: dict[bool, list[float]] = {False: [], True: []}
        worked: dict[bool, list[float]] = {False: [], True: []}
        for round_number in range(num_rounds + 1):
            for is_bound in (False, True):
                begun = time.process_time()
                rate = self.run(count, num_beside, is_bound)
                if round_number:  # the first warms up
                    rates[is_bound].append(rate)
                    worked[is_bound].append((time.process_time() - begun) * 1000 / self.num_tokens)
        free, bound = (statistics.median(rates[it]) for it in (False, True))
        before, after = (statistics.median(worked[it]) for it in (False, True))
        beside = f" beside {num_beside}" if num_beside else ""
        print(f"{count} requests{beside}: free {free:.1f}, bound {bound:.1f} tokens/s: ", end="")
        slower = f"{100 * (1 - bound / free):+.1f} % slower"
        print(f"{slower}; a step's processor time {before:.2f} and {after:.2f} ms", flush=True)

    def report_parts(self, count: int, num_beside: int, counts_calls: bool) -> None:
        """Prints what the parts of a step take, if steps are launched ahead, and how often they call torch."""
        decoder = self.engine._runner._decoder
        if decoder is None or not decoder.has_graph(count + num_beside):
            return
        for is_bound in (False, True):
            kind = f"{count} bound" if is_bound else f"{count} free"
            kind += f" beside {num_beside}" if num_beside else ""
            is_free = isinstance(decoder, FreeDecoder)
            parts = StepParts(time.thread_time if is_free else time.perf_counter)
            with parts.watching(self.engine):
                self.run(count, num_beside, is_bound)
            print(f"  {kind}: the host's part of a step, us: {parts.line()}")
            if counts_calls:
                calls = CountedCalls()
                with calls.watching(self.engine):
                    self.run(count, num_beside, is_bound)
                print(f"  {kind}: torch's calls in a step: {calls.line()}")
            if not is_free and torch.cuda.is_available():
                with device_times(self.engine) as stamps:
                    self.run(count, num_beside, is_bound)
                print(f"  {kind}: the device, us: {device_line(stamps)}")

    def masks_us(self, count: int) -> tuple[float, float]:
        """Returns the median times of taking a token and filling the next mask for so many answers, along a typical
        one: of one after the other, and of all together."""
        ids = self.tokenizer.encode_text(TYPICAL)
        rows = np.zeros((count, -(-self.engine.num_vocab // 32)), np.int32)
        times: tuple[list[float], list[float]] = [], []
        for together, found in enumerate(times):
            matchers = self.matchers(count)
            for end in range(len(ids) + 1):
                begun = time.perf_counter()
                _fill(matchers, ids[:end], rows, bool(together))
                found.append((time.perf_counter() - begun) * 1e6)
        return statistics.median(times[0]), statistics.median(times[1])


def _fill(matchers: Sequence[AnswerMatcher], ids: list[int], rows_SW: MaskWords, together: bool) -> None:
    fills = [(row, matcher, ids) for row, matcher in enumerate(matchers)]
    for some in [fills] if together else [[fill] for fill in fills]:
        AnswerMatcher.fill_all(some, rows_SW)


if __name__ == "__main__":
    main()
