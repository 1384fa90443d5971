"""Calls of tools as a grammar: what the format's own encoder writes of arguments fits, if and only if they fit the
schema; what is followed at random is read back as such a call."""

import itertools
import json
import random
import time
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from cpu.chat.small_tokenizer import small_tokenizer

from ownpath.chat.answer import Answer
from ownpath.chat.dsml import write_calls
from ownpath.chat.markers import DSML
from ownpath.chat.messages import ToolCall
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import MalformedMarkup, ToolCallArguments, ToolCallStart
from ownpath.structured.calls import call_rules
from ownpath.structured.errors import GrammarRefused
from ownpath.structured.grammar import compile_grammar
from ownpath.structured.schema import library_schema
from ownpath.structured.vocabulary import Vocabulary, library_tokenizer

TOKENIZER = small_tokenizer()
MARKER, END = TOKENIZER.special_id(DSML), TOKENIZER.eos_id
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
RICH: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": TEXT,
        "b": NUMBER,
        "c": {"anyOf": [TEXT, {"type": "null"}]},
        "d": {"enum": ["x", "y z", 3]},
        "e": {"type": "array", "items": {"$ref": "#/$defs/T"}},
        "f": {"type": ["string", "null"]},
        "g": {"const": "q"},
        "h": {"type": "string", "minLength": 2, "maxLength": 3},
        "i": {},
        "j": {"$ref": "#/$defs/E"},
        "k": {"type": "string", "pattern": "^[ab]+$"},
        "l": {"type": "string", "format": "date"},
    },
    "required": ["a"],
    "$defs": {
        "T": {"type": "object", "properties": {"x": TEXT}, "required": ["x"], "additionalProperties": False},
        "E": {"type": "string", "enum": ["one", "two"]},
    },
    "additionalProperties": False,
}
CASES: list[dict[str, Any]] = [
    *({}, {"a": "hi"}, {"a": 3}, {"a": "x </y> \n<z> \"'", "b": 3}, {"a": "", "b": "3"}, {"a": "日本", "b": 2.5}),
    *({"a": "", "c": value} for value in (None, "null", 4, "x")),
    *({"a": "", "d": value} for value in ("x", "y z", 3, "3", "z", None)),
    *({"a": "", "e": value} for value in ([], [{"x": "1"}, {"x": f"<{DSML}"}], [{}], [{"x": 1}], {"x": ""})),
    *({"a": "", "f": value} for value in (None, "x", 1)),
    *({"a": "", "g": value} for value in ("q", "r", 1)),
    *({"a": "", "h": value} for value in ("日本", "日", "日本日", "日本日本")),
    *({"a": "", "i": value} for value in ("t", [1], {"z": None}, True)),
    *({"a": "", "j": value} for value in ("one", "three", 1)),
    {"a": "", "zz": 1},
]


@cache
def library() -> Any:
    tokens = [TOKENIZER.token_bytes(idx) for idx in range(TOKENIZER.num_tokens)]
    return library_tokenizer(Vocabulary(tokens, tuple(sorted(TOKENIZER.marker_ids)), (END,)))


def matcher_of(*functions: dict[str, Any], is_one: bool = False) -> Any:
    rules = call_rules(list(enumerate(functions)), MARKER, is_one=is_one).text()
    matcher = compile_grammar(library(), f'start: "\\n\\n<" mark calls\n{rules}')
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def fits(matcher: Any, *calls: tuple[str, Any]) -> bool:
    """True if the encoder's text of these calls fits."""
    written = [ToolCall(name, json.dumps(arguments, ensure_ascii=False), "") for name, arguments in calls]
    ids = TOKENIZER.encode_segments(write_calls(written))
    copy = matcher.deep_copy()
    return copy.validate_tokens(ids) == len(ids) and copy.consume_tokens(ids) and copy.is_accepting()


def test_what_the_encoder_writes_fits_where_the_schema_says_so() -> None:
    matcher = matcher_of({"name": "f", "parameters": RICH, "strict": True}, {"name": "g"})
    judge = jsonschema.Draft202012Validator(RICH)
    verdicts = [judge.is_valid(arguments) for arguments in CASES]
    assert [fits(matcher, ("f", arguments)) for arguments in CASES] == verdicts
    assert 10 < sum(verdicts) < len(CASES) - 10
    assert fits(matcher, ("f", {"a": "1"}), ("g", {}), ("f", {"a": "2"}))
    assert not fits(matcher, ("f", {"a": "1"}), ("g", {}), ("f", {"b": 2}))
    assert not fits(matcher, ("h", {}))
    single = matcher_of({"name": "g"}, is_one=True)
    assert fits(single, ("g", {}))
    assert not fits(single, ("g", {}), ("g", {}))


CLOSING = np.array(
    [idx in (END, MARKER) or TOKENIZER.token_bytes(idx)[:1] in b'</"}],>\n' for idx in range(TOKENIZER.num_tokens)]
)
"""Tokens with which something may end."""


def followed(matcher: Any, seed: int) -> list[int]:
    """One answer at random, most tokens single bytes of text; none if it does not end."""
    matcher, choose, ids = matcher.deep_copy(), random.Random(seed), []
    for _ in range(800):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bits[: len(CLOSING)].astype(bool)
        # What closes something is likelier, so that texts end.
        ending = allowed & CLOSING
        token_id = int(choose.choice(np.flatnonzero(ending if ending.any() and choose.random() < 0.7 else allowed)))
        if token_id == END:
            return ids
        assert matcher.consume_token(token_id)
        ids.append(token_id)
    return []


def test_what_fits_is_read_back_as_calls_that_fit() -> None:
    """Also text with a pattern or a format, which is JSON here."""
    properties = {name: RICH["properties"][name] for name in "aekl"}
    parameters = RICH | {"properties": properties, "required": ["a", "k", "l"]}
    matcher = matcher_of({"name": "f", "parameters": parameters, "strict": True}, {"name": "g"})
    judge = jsonschema.Draft202012Validator(parameters, format_checker=jsonschema.FormatChecker())
    seen: list[str] = []
    for seed in range(8):
        ids = followed(matcher, seed)
        answer = Answer(TOKENIZER, [], AnswerParser(offers_tools=True))
        parts = [part for token_id in ids for part in answer.feed(token_id)] + answer.finish()
        assert not [part for part in parts if isinstance(part, MalformedMarkup)]
        names = [part.name for part in parts if isinstance(part, ToolCallStart)]
        for index, name in enumerate(names):
            pieces = [part.text for part in parts if isinstance(part, ToolCallArguments) and part.index == index]
            arguments = json.loads("".join(pieces))
            if name == "f":
                judge.validate(arguments)
        seen += names
    assert set(seen) == {"f", "g"}


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"anyOf": [{}]}, "anyOf"),
        ({"type": "array"}, "type"),
        ({"properties": {"a": {"not": {}}}}, "properties.a.not"),
        ({"properties": {"a": {"$ref": "#"}}}, "$ref"),
        ({"properties": {"a": False}, "required": ["a"]}, "required"),
        ({"additionalProperties": False, "required": ["a"]}, "required"),
        ({"properties": {'a"': {}}}, "properties"),
        ({"minProperties": 1}, "minProperties"),
    ],
)
def test_what_cannot_be_enforced_is_refused_of_strict_tools_alone(parameters: dict[str, Any], place: str) -> None:
    function = {"name": "f", "parameters": parameters}
    with pytest.raises(GrammarRefused) as caught:
        matcher_of({"name": "g"}, function | {"strict": True})
    assert caught.value.place == f"1.function.parameters.{place}"
    assert fits(matcher_of({"name": "g"}, function), ("f", {"a": [1]})), "the call is enforced, its argument free"


@pytest.mark.parametrize(
    ("parameters", "takes"),
    [
        (None, False),
        ({"type": "object", "properties": {}}, False),
        ({"properties": {}, "additionalProperties": False}, False),
        ({}, True),
        ({"type": "object"}, True),
        ({"properties": {}, "additionalProperties": True}, True),
        ({"properties": {}, "additionalProperties": {"type": "string"}}, True),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
def test_a_tool_without_parameters_takes_none(parameters: Any, takes: bool, is_strict: bool) -> None:
    """A model that has to call it must not make some up, which its client's function would not take."""
    for own in ({}, {"parameters": None}) if parameters is None else ({"parameters": parameters},):
        matcher = matcher_of({"name": "f", "strict": is_strict, **own})
        assert fits(matcher, ("f", {}))
        assert fits(matcher, ("f", {"a": "b"})) == takes


KEYWORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "items"),
    *("prefixItems", "additionalItems", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "minLength"),
    *("maxLength", "minItems", "minProperties", "minimum", "multipleOf", "pattern", "format", "title", "$schema"),
    *("$id", "contentSchema", "default", "examples", "x-guidance", "not"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, "", "a", "string", "#/$defs/a", "(", {}, {"a": 1}, {"a": {}}, {"a": None}),
    *({"type": "string"}, [], [1], ["a"], [[1]], [{}], [None], [{"type": "string"}], ["string", 1], [["a"]]),
)


def test_a_schema_that_is_none_is_refused_by_name() -> None:
    """Whatever a keyword's value is: it is taken or refused, at the top and below, of strict tools and others."""
    places: dict[str, str] = {}
    for keyword, value in itertools.product(KEYWORDS, ODD_VALUES):
        inner = {"properties": {"p": {keyword: value}}, "$defs": {"a": {"type": "string"}}}
        top = {"properties": {"p": {"type": "string"}}} | {keyword: value}
        for parameters in (inner, top):
            call_rules([(0, {"name": "f", "parameters": parameters})], MARKER, is_one=False)
            try:
                library_schema(parameters)
                call_rules([(0, {"name": "f", "parameters": parameters, "strict": True})], MARKER, is_one=False)
            except GrammarRefused as error:
                places[f"{keyword} {value}"] = error.place
    for odd in ("anyOf {'a': {}}", "format []", "required [[1]]", "required None", "oneOf True", "prefixItems {}"):
        assert odd.split()[0] in places[odd]


LOOP = {"d": {"anyOf": [{"$ref": "#/$defs/d"}] * 60}}
TREE = {
    f"{kind}{n}": {"anyOf": [{"$ref": f"#/$defs/{next}{n + 1}"} for next in "ab"]} for n in range(40) for kind in "ab"
}
ENDS = {f"{kind}40": {"type": "string"} for kind in "ab"}


@pytest.mark.parametrize(
    ("schema", "definitions"),
    [
        ({"$ref": "#/$defs/d"}, LOOP),
        ({"anyOf": [{"$ref": "#/$defs/d"}] * 900}, LOOP),
        ({"$ref": "#/$defs/a0"}, TREE | ENDS),
        ({"$ref": "#/$defs/d"}, {"d": {"$ref": "#/$defs/d"}}),
    ],
)
def test_references_cost_no_more_however_they_branch(schema: Any, definitions: Any) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": schema}, "$defs": definitions}}
    begun = time.process_time()
    text = call_rules([(0, function)], MARKER, is_one=False).text()
    assert time.process_time() - begun < 0.5
    assert len(text) < 2**20


def test_nothing_fits_false() -> None:
    parameters = {"properties": {"a": {"anyOf": [False, NUMBER]}, "b": {"anyOf": [True, NUMBER]}}}
    matcher = matcher_of({"name": "f", "parameters": parameters, "strict": True})
    assert not fits(matcher, ("f", {"a": "x"}))
    assert fits(matcher, ("f", {"a": 1, "b": "x"}))
    assert fits(matcher, ("f", {"b": [1]}))


def test_parameters_that_repeat_large_definitions_are_refused_before_they_fill_the_memory() -> None:
    """A thousand parameters that repeat a quarter of a megabyte each; a thousand tools with as much together."""
    text = {"$ref": "#/$defs/d"}
    wide = {
        "properties": {f"p{n}": text for n in range(1000)},
        "$defs": {"d": {"enum": [f"{n:025}" for n in range(9000)]}},
    }
    begun = time.process_time()
    with pytest.raises(GrammarRefused, match="characters"):
        call_rules([(0, {"name": "f", "parameters": wide})], MARKER, is_one=False)
    tools = [(n, {"name": f"f{n}", "parameters": {"properties": {"a": {"const": "x" * 1000}}}}) for n in range(1000)]
    with pytest.raises(GrammarRefused, match="characters"):
        call_rules(tools, MARKER, is_one=False)
    assert time.process_time() - begun < 1
