"""Compilation: bombs end in a refusal within a second, whatever they are; what is known is kept, within bounds."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.grammars import BYTES

from ownpath.structured.compiler import GrammarCompiler
from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import Grammar, GrammarKind, choice_rule, schema_rule

WITHIN_S = 1.0


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(BYTES)
    made.start()
    yield made
    made.close()


def nested(depth: int, wrap: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def names(count: int, schema: Any) -> dict[str, Any]:
    return {f"p{number}": schema for number in range(count)}


def chain(length: int, wrap: Any) -> dict[str, Any]:
    links = {f"d{n}": wrap({"$ref": f"#/$defs/d{n + 1}"}) for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {"type": "string"}}}


def pair(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema, "b": schema}}


SCHEMAS: dict[str, Any] = {
    "deep objects": nested(50, lambda it: {"type": "object", "properties": {"a": it}}),
    "too deep objects": nested(5000, lambda it: {"properties": {"a": it}}),
    "deep lists": nested(58, lambda it: {"type": "array", "items": it}),
    "doubling by nesting": nested(13, lambda it: {"anyOf": [it, {"properties": {"a": it}}]}),
    "doubling by reference": chain(40, pair),
    "doubling by allOf": chain(30, lambda it: {"allOf": [it, it]}),
    "doubling by anyOf": chain(30, lambda it: {"anyOf": [it, {"type": "array", "items": it}]}),
    "itself": {"$ref": "#"},
    "itself or text": {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
    "all of itself": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "tree": {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}},
    "product of allOf": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(6)]},
    "10,000 values": {"enum": [f"value {n} {n * 7919}" for n in range(10_000)]},
    "many values": {"enum": [f"value {n}" for n in range(100_000)]},
    "1,000 properties": {"type": "object", "properties": names(1000, {"type": "string"})},
    "9,000 properties": {"type": "object", "properties": names(9000, {"type": "string"})},
    "9,000 required": {"type": "object", "properties": names(9000, True), "required": [*names(9000, 1)]},
    "3,000 alternatives": {
        "anyOf": [{"properties": {f"p{n}": {"const": n}}, "required": [f"p{n}"]} for n in range(3000)]
    },
    "long list": {"type": "array", "minItems": 10**6, "maxItems": 10**7, "items": {"type": "integer"}},
    "lists of lists": nested(9, lambda it: {"type": "array", "minItems": 10**4, "maxItems": 10**5, "items": it}),
    "long text": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "multiples": {"type": "integer", "multipleOf": 1234567},
    "multiples in a range": {"type": "integer", "multipleOf": 9973, "minimum": -(10**15), "maximum": 10**15},
    "numbers in a range": {"type": "number", "minimum": -1e308, "maximum": 1e308, "multipleOf": 1e-5},
    "patterns": {"properties": {f"p{n}": {"pattern": f"^(a|b)*a(a|b){{{n % 12}}}$"} for n in range(300)}},
}
PATTERNS = {
    "nested stars": "^(a+)+$",
    "nested repeats": "^((a{1,1000}){1,1000}){1,1000}$",
    "repeats of repeats": "((((((a{10}){10}){10}){10}){10}){10}){10}",
    "exponential automaton": "^(.*a.{20}|.*b.{20})(.*c.{20})$",
    "many letters": "\\p{L}{1000}",
    "brackets": "(" * 2000 + "a" + ")" * 2000,
    "alternatives": "|".join(f"a{n}.*b{n}" for n in range(300)),
    "optional": "(?:a?){50000}",
    "intersection": "(a|b)*a(a|b){30}",
}
GRAMMARS = {
    "ambiguous": 'start: a\na: a a | "x" | ',
    "left": "start: start start start | /a/",
    "nothing": "start: start",
    "deep": "start: " + "(" * 3000 + '"a"' + ")" * 3000,
    "doubling rules": "start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(2000)) + '\nr2000: "a"',
    "repeats": 'start: "a"{1000000}',
    "repeats of repeats": 'start: x{1000}\nx: y{1000}\ny: "a"{1000}',
    "alternatives": "start: " + " | ".join(f'"w{n}"' for n in range(40_000)),
    "lexemes": "start: " + " | ".join(f"/a{{{n}}}b.*/" for n in range(500)),
    "GBNF, deep": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
    "GBNF, long": "root ::= " + " ".join('"a"' for _ in range(60_000)),
    "directive": '%llguidance {"allow_initial_skip": true}\nstart: "a"',
    "1 MB": "start: " + "a" * 2**20,
    "no grammar": "\0" * 1000,
}
BOMBS = [
    *((f"schema: {name}", GrammarKind.LARK, schema) for name, schema in SCHEMAS.items()),
    *((f"pattern: {name}", GrammarKind.LARK, {"type": "string", "pattern": it}) for name, it in PATTERNS.items()),
    *((f"regex: {name}", GrammarKind.REGEX, it) for name, it in PATTERNS.items()),
    *((f"grammar: {name}", GrammarKind.CLIENT, it) for name, it in GRAMMARS.items()),
]


def judged(compiler: GrammarCompiler, kind: GrammarKind, asked: Any) -> str | None:
    """Returns why it is refused; None if it is compiled."""
    try:
        text = f"start: {schema_rule(asked)}" if isinstance(asked, dict) else asked
        compiler.matcher(Grammar(kind, text))
    except GrammarRefused as error:
        return str(error)
    return None


def judge_all(compiler: GrammarCompiler, bombs: Sequence[tuple[str, GrammarKind, Any]]) -> int:
    """Checks that each compiles or is refused within a second. Returns how many are refused.

    A busy machine does not count: the time here is the process's own, and half a second for the trial, which its own
    clock bounds.
    """
    refused = 0
    for name, kind, asked in bombs:
        begun, worked = time.monotonic(), time.process_time()
        reason = judged(compiler, kind, asked)
        took = min(time.monotonic() - begun, time.process_time() - worked + WITHIN_S / 2)
        assert took < WITHIN_S, (name, took)
        assert reason is None or 5 < len(reason) < 300, (name, reason)
        refused += reason is not None
    assert judged(compiler, GrammarKind.REGEX, "[a-z]+") is None, "it goes on"
    return refused


def test_bombs_are_judged_within_a_second(compiler: GrammarCompiler) -> None:
    """Some of each kind; ``make test-schemas`` takes all."""
    some = [bomb for bomb in BOMBS[::5] if "9,000" not in bomb[0]]
    assert judge_all(compiler, some) > 2
    assert judged(compiler, GrammarKind.LARK, SCHEMAS["multiples"]) is not None


def test_a_refusal_is_known_at_once(compiler: GrammarCompiler) -> None:
    bomb = {"$ref": "#"}
    reason = judged(compiler, GrammarKind.LARK, bomb)
    assert reason is not None
    begun = time.thread_time()
    assert judged(compiler, GrammarKind.LARK, bomb) == reason
    assert time.thread_time() - begun < 0.01


@pytest.mark.parametrize(("limit", "value", "kept"), [("MAX_KEPT", 5, 5), ("MAX_KEPT_CHARS", 40, 4)])
def test_what_is_kept_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, kept: int
) -> None:
    """By number, and by characters: 10 for each of these."""
    monkeypatch.setattr(f"ownpath.structured.compiler.{limit}", value)
    for number in range(8):
        tries = (judged(compiler, GrammarKind.LARK, f'start: "{number}"') for _ in range(5))  # on a busy machine
        assert None in tries
    assert len(compiler._kept) == kept
    assert compiler.kept(Grammar(GrammarKind.LARK, 'start: "0"')) is None
    assert compiler.kept(Grammar(GrammarKind.LARK, 'start: "7"')) is not None


def test_answers_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    grammar = Grammar(GrammarKind.LARK, f"start: {choice_rule(['red', 'rose', 'green'])}")
    first, second = compiler.matcher(grammar), compiler.matcher(grammar)
    assert first.consume_tokens(list(b"red"))
    assert second.consume_tokens(list(b"green"))
    assert first.is_accepting() == second.is_accepting() == True  # noqa: E712
    assert not compiler.matcher(grammar).is_accepting()


def test_a_process_that_has_died_is_started_again(compiler: GrammarCompiler) -> None:
    process = compiler._trial._process
    assert process is not None
    process.kill()
    process.wait()
    assert judged(compiler, GrammarKind.LARK, 'start: "after"') is None, "that was not the grammar's fault"


def test_python_goes_on_while_a_grammar_compiles(compiler: GrammarCompiler) -> None:
    """The longest that another thread waits for Python's lock, beside what it waits on an idle process."""
    worker = threading.Thread(
        target=judged, args=(compiler, GrammarKind.LARK, {"multipleOf": 7654321, "type": "integer"})
    )
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 50, "half a second of a thread that sleeps a millisecond at a time"
