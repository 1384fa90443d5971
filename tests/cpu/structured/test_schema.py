"""A JSON Schema before it is compiled: refusals by name and place, sizes, patterns and formats."""

import datetime
import ipaddress
import itertools
import re
from typing import Any

import pytest
from support.grammars import as_json, compiled, fits

from ownpath.structured.errors import GrammarRefused
from ownpath.structured.format_patterns import FORMAT_PATTERNS
from ownpath.structured.limits import MAX_PATTERN_CHARS, MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES
from ownpath.structured.patterns import library_pattern
from ownpath.structured.schema import REFUSED, library_schema

VALUES: dict[str, Any] = {
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "dependencies": {"a": ["b"]},
    "minContains": 1,
    "maxContains": 1,
    "uniqueItems": True,
    "$recursiveAnchor": True,
}


def refusal(schema: Any) -> GrammarRefused:
    with pytest.raises(GrammarRefused) as caught:
        library_schema(schema)
    return caught.value


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_not_enforced_is_refused_where_it_stands(keyword: str) -> None:
    bad = {keyword: VALUES.get(keyword, {})}
    assert refusal(bad).place == keyword
    for around, place in (
        ({"properties": {"a.b": bad}}, "properties.a.b"),
        ({"items": bad}, "items"),
        ({"prefixItems": [True, bad]}, "prefixItems.1"),
        ({"anyOf": [{"type": "null"}, bad]}, "anyOf.1"),
        ({"$defs": {"x": {"allOf": [bad]}}}, "$defs.x.allOf.0"),
        ({"patternProperties": {"^a": bad}}, "patternProperties.^a"),
        ({"additionalProperties": bad}, "additionalProperties"),
    ):
        assert refusal(around).place == f"{place}.{keyword}"


def test_what_only_looks_like_a_keyword_is_none() -> None:
    """Names of properties, values, and annotations that nobody knows."""
    schema = {
        "properties": {name: {"type": "null"} for name in REFUSED},
        "enum": [{"not": 1}],
        "const": {"if": 1},
        "default": {"uniqueItems": True},
        "x-note": {"contains": {}},
        "uniqueItems": False,
    }
    written = library_schema(schema)
    assert written["properties"] == schema["properties"]
    assert written["enum"] == schema["enum"]
    assert "uniqueItems" not in written, "false asks for nothing"


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": []}, "properties"),
        ({"properties": {"a": 1}}, "properties.a"),
        ({"items": "a"}, "items"),
        ({"pattern": 3}, "pattern"),
        ({"$ref": 3}, "$ref"),
        ({"minItems": -1}, "minItems"),
        ({"maxLength": 1.5}, "maxLength"),
        ({"maxLength": True}, "maxLength"),
        ({"properties": {"a": {"format": "iri"}}}, "properties.a.format"),
        ({"format": 3}, "format"),
        ({"items": {"pattern": "(?i)a"}}, "items.pattern"),
    ],
)
def test_what_is_no_schema_is_refused_where_it_stands(schema: Any, place: str) -> None:
    assert refusal(schema).place == place


def test_sizes() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        deep = {"items": deep}
    assert "levels" in str(refusal(deep))
    library_schema(deep["items"])
    assert "values" in str(refusal({"enum": list(range(MAX_SCHEMA_NODES))}))
    assert "texts" in str(refusal({"enum": ["x" * 1000] * 300}))
    assert "texts" in str(refusal({"properties": {"x" * 1000 + str(n): True for n in range(300)}}))
    assert "characters" in str(refusal({"pattern": "a" * (MAX_PATTERN_CHARS + 1)}))


def test_neighbours_of_a_reference_count_since_2019() -> None:
    part = {"$ref": "#/$defs/a", "maxItems": 2}
    for draft, counts in (("draft-04", False), ("draft-06", False), ("draft-07", False), (None, True)):
        schema: dict[str, Any] = {"properties": {"b": part}, "$defs": {"a": {"type": "array"}}}
        if draft is not None:
            schema["$schema"] = f"http://json-schema.org/{draft}/schema#"
        assert ("maxItems" in library_schema(schema)["properties"]["b"]) == counts


def test_white_space_and_the_dot_are_ecmascripts() -> None:
    """Source: ECMA-262, the tables of WhiteSpace and LineTerminator."""
    space = {0x9, 0xA, 0xB, 0xC, 0xD, 0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F}
    space |= {0x3000, 0xFEFF}
    line_ends = {0xA, 0xD, 0x2028, 0x2029}
    found = {
        pattern: compiled({"pattern": f"^{pattern}$", "type": "string"}) for pattern in (r"\s", r"[\s]", r"\S", ".")
    }
    for code in {*range(0x20, 0x100, 7), *space, *line_ends, 0x85, 0x180E, 0x200B, 0xFEFE}:
        text = as_json(chr(code))
        assert fits(found[r"\s"], text) == fits(found[r"[\s]"], text) == (code in space), hex(code)
        assert fits(found[r"\S"], text) == (code not in space), hex(code)
        assert fits(found["."], text) == (code not in line_ends), hex(code)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("[[a]", "[a"),
        ("[a&&b]", "a&b"),
        ("[a~~b]", "a~b"),
        (r"\[", "["),
        (r"[\]]", "]"),
        (r"[\\]", "\\"),
        ("[^[]", "]a&~\\sb.-"),
        ("[.]", "."),
        (r"[\-a]", "a-"),
    ],
)
def test_brackets_hold_what_ecmascript_reads_in_them(pattern: str, matching: str) -> None:
    """In the library's language brackets nest, and have operators."""
    matcher = compiled({"pattern": f"^{pattern}$", "type": "string"})
    assert {letter for letter in "[]a&~\\sb.-" if fits(matcher, as_json(letter))} == set(matching)


@pytest.mark.parametrize("pattern", ["(?i)a", "(?s:.)", r"\Aa", r"a\z", r"a\Z", "[]a]", r"[\S]", "[a--b]"])
def test_what_ecmascript_lacks_is_refused(pattern: str) -> None:
    with pytest.raises(GrammarRefused):
        library_pattern(pattern)


def is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == 10


def test_dates_are_days_that_there_are() -> None:
    pattern = re.compile(FORMAT_PATTERNS["date"])
    for year in (1, 4, 96, 100, 1600, 1900, 1996, 2000, 2023, 2024, 2100, 2400, 9999):
        for month, day in itertools.product(range(14), range(33)):
            text = f"{year:04}-{month:02}-{day:02}"
            assert (pattern.search(text) is not None) == is_date(text), text


def test_times() -> None:
    time, both = re.compile(FORMAT_PATTERNS["time"]), re.compile(FORMAT_PATTERNS["date-time"])
    for text in ("00:00:00Z", "23:59:59.123z", "12:30:00+05:30", "12:30:00-23:59"):
        assert time.search(text)
        assert both.search(f"2024-02-29T{text}")
        assert not both.search(f"2023-02-29T{text}")
        datetime.datetime.fromisoformat(f"2024-02-29T{text.replace('z', 'Z')}")
    for text in (
        "24:00:00Z",
        "23:60:00Z",
        "23:59:60Z",
        "12:00:00",
        "12:00Z",
        "12:00:00+24:00",
        "12:00:00.Z",
        "٠٠:00:00Z",
    ):
        assert not time.search(text), text


def test_addresses_are_those_that_python_reads() -> None:
    four, six = re.compile(FORMAT_PATTERNS["ipv4"]), re.compile(FORMAT_PATTERNS["ipv6"])
    for text in ("0.0.0.0", "255.255.255.255", "1.2.3.256", "01.2.3.4", "1.2.3", "1.2.3.4.5", "1.2.3.4 "):
        assert (four.search(text) is not None) == reads(ipaddress.IPv4Address, text), text
    pieces = ["", "1", "abcd", "1.2.3.4"]
    seen = 0
    for size in range(1, 10):
        for parts in itertools.islice(itertools.product(pieces, repeat=size), 4**6):
            text = ":".join(parts)
            assert (six.search(text) is not None) == reads(ipaddress.IPv6Address, text), text
            seen += six.search(text) is not None
    assert seen > 100


def reads(kind: Any, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
