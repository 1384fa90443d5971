"""Measures what grammars cost: tokens a second of the engine with and without them, and the time of one mask.

    python tools/bench_grammar.py [MODEL] [--device cuda] [--requests 1 8 32] [--tokens 256]

Both kinds of rounds take turns; each generates the same number of tokens a request. By default: the embedded model.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from ownpath.chat.tokenizer import Tokenizer
from ownpath.commands.arguments import add_engine_arguments, add_model_argument
from ownpath.commands.session import open_session
from ownpath.engine.engine import Engine
from ownpath.engine.request import Request, SamplingParams, StepOutput
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


def main() -> None:
    """Prints a line for each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_argument(parser)
    add_engine_arguments(parser.add_argument_group("numerics"), parser.add_argument_group("limits"))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with open_session(args, max(args.requests)) as session:
        compiler = GrammarCompiler(vocabulary_of(session.tokenizer))
        grammar = Grammar(GrammarKind.LARK, f"start: {schema_rule(SCHEMA)}")
        for count in args.requests:
            report(session.engine, session.tokenizer, compiler, grammar, args, count)
        print(f"one mask, alone: {mask_us(compiler, grammar, session.tokenizer):.0f} us")
        compiler.close()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    tokens = [tokenizer.token_bytes(idx) for idx in range(tokenizer.num_tokens)]
    return Vocabulary(tokens, tuple(sorted(tokenizer.marker_ids)), (tokenizer.eos_id,))


def report(
    engine: Engine,
    tokenizer: Tokenizer,
    compiler: GrammarCompiler,
    grammar: Grammar,
    args: argparse.Namespace,
    count: int,
) -> None:
    """Prints the rates of ``count`` requests, free and bound in turn."""
    masks, prompt = FreeMasks(compiler.vocabulary), tokenizer.encode_raw(PROMPT)
    rates: dict[bool, list[float]] = {False: [], True: []}
    worked: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(args.rounds + 1):
        for is_bound in (False, True):
            matchers = [
                AnswerMatcher(masks, compiler.matcher(grammar), (), True) if is_bound else None for _ in range(count)
            ]
            begun = time.process_time()
            seconds = run(engine, prompt, matchers, args.tokens)
            processor_ms = (time.process_time() - begun) * 1000
            if round_number:  # the first warms up
                rates[is_bound].append(count * args.tokens / seconds)
                worked[is_bound].append(processor_ms / args.tokens)
    free, bound = (statistics.median(rates[it]) for it in (False, True))
    before, after = (statistics.median(worked[it]) for it in (False, True))
    print(
        f"{count} requests: free {free:.1f}, bound {bound:.1f} tokens/s: {100 * (1 - bound / free):+.1f} % slower; ",
        end="",
    )
    print(f"a step's processor time {before:.1f} and {after:.1f} ms: {100 * (after / before - 1):+.1f} %")


def run(engine: Engine, prompt: list[int], matchers: Sequence[AnswerMatcher | None], num_tokens: int) -> float:
    """Returns the seconds that the requests take together."""
    left, done = [len(matchers)], threading.Event()

    def sink(output: StepOutput) -> None:
        assert output.error is None, output.error
        if output.finish_reason is not None:
            left[0] -= 1
            if not left[0]:
                done.set()

    requests = [
        Request(list(prompt), SamplingParams(num_tokens, seed=idx, ignore_eos=True), sink, matcher=matcher)
        for idx, matcher in enumerate(matchers)
    ]
    begun = time.perf_counter()
    engine.submit(requests)
    assert done.wait(600)
    return time.perf_counter() - begun


def mask_us(compiler: GrammarCompiler, grammar: Grammar, tokenizer: Tokenizer) -> float:
    """Returns the median time of taking a token and filling the next mask, along a typical answer."""
    matcher = AnswerMatcher(FreeMasks(compiler.vocabulary), compiler.matcher(grammar))
    row = np.zeros(-(-tokenizer.num_tokens // 32), np.int32)
    ids = tokenizer.encode_text(
        '[{"name": "Ada Lovelace", "age": 36}, {"name": "Alan Turing of Maida Vale", "age": 41}'
    )
    times = []
    for end in range(len(ids) + 1):
        begun = time.perf_counter()
        matcher.fill(ids[:end], row)
        times.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
