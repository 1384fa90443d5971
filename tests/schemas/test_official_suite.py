"""The official JSON-Schema test suite, drafts 4 to 2020-12: each schema is compiled or refused, and each instance, as
JSON with the usual and with no spaces, fits exactly if it is valid.

Counted are instances. "passed": as the suite says. "refused": of a schema that is not enforced, by keyword or reason.
"stricter": valid, yet never written, because of a format: the grammar binds to formats, which the suite's `format.json`
only describes, and writes neither leap seconds nor quoted names in addresses. "wrong": everything else; there is none.

An object has no order, and 1.0 is 1: of a valid instance one way of writing it has to fit, and of an invalid one none.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.grammars import as_json, compiled, fits, spellings, whole_numbers

from ownpath.structured.errors import GrammarRefused

pytestmark = pytest.mark.schemas
SUITE = Path(os.environ.get("OWNPATH_SCHEMA_SUITE", ""))
DIALECTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": None,
    "draft2020-12": None,
}
"""Folder -> the name of a draft whose tests do not say it themselves."""


def cases(draft: str) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Yields each case's file, schema and instances, optional ones too."""
    folder = SUITE / "tests" / draft
    for path in sorted(folder.rglob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            schema = case["schema"] if isinstance(case["schema"], dict) else {"allOf": [case["schema"]]}
            dialect = DIALECTS[draft]
            named = schema if dialect is None else {"$schema": dialect} | schema
            yield str(path.relative_to(folder)), named, case["tests"]


def reason_of(schema: Any) -> tuple[str | None, Any]:
    """Returns why a schema is refused, in a word or two, or ``None`` and its matcher."""
    try:
        matcher = compiled(schema)
    except GrammarRefused as error:
        return error.place.split(".")[-1], None
    if not matcher.is_error():
        return None, matcher
    text = matcher.get_error().split("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    reasons = {
        "Resource": "$ref to another document",
        "oneOf": "oneOf that is not disjoint",
        "Unsatisfiable": "false",
        "patternProperty": "patternProperties that overlap",
        "multipleOf": "multipleOf of many digits",
        "float range": "numbers of many digits",
        "regex parse": "pattern",
    }
    known = [name for words, name in reasons.items() if words in text]
    keys = re.findall(r'Unimplemented keys: \["(.+?)"', text) + re.findall("Unknown (format)", text)
    return next(iter(known + keys), text[:60]), None


def fits_in_some_way(matcher: Any, value: Any, compact: bool) -> bool:
    ways = (way for spelling in spellings(value) for way in (spelling, whole_numbers(spelling)))
    return any(fits(matcher, as_json(way, compact=compact)) for way in ways)


def verdict(matcher: Any, schema: Any, test: dict[str, Any]) -> str:
    if test["valid"]:
        if all(fits_in_some_way(matcher, test["data"], compact) for compact in (False, True)):
            return "passed"
        return "stricter" if "format" in schema else "wrong"
    spelled = [as_json(it, compact=compact) for it in spellings(test["data"]) for compact in (False, True)]
    return "wrong" if any(fits(matcher, text) for text in spelled) else "passed"


def test_the_official_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert (SUITE / "tests").is_dir(), "make test-schemas fetches the suite and says where it is"
    counts: dict[str, Counter[str]] = {}
    refused: Counter[str] = Counter()
    wrong = []
    for draft in DIALECTS:
        counts[draft] = Counter(passed=0, stricter=0, refused=0, wrong=0)
        for name, schema, tests in cases(draft):
            reason, matcher = reason_of(schema)
            if reason is not None:
                counts[draft]["refused"] += len(tests)
                refused[reason] += len(tests)
                continue
            for test in tests:
                found = verdict(matcher, schema, test)
                counts[draft][found] += 1
                if found == "wrong":
                    wrong.append((draft, name, schema, test))
    with capsys.disabled():
        print()
        for draft, count in counts.items():
            print(f"{draft:13} " + ", ".join(f"{kind} {number}" for kind, number in count.items()))
        print("refused by:", ", ".join(f"{reason} {number}" for reason, number in refused.most_common()))
    assert wrong == []
    assert sum(count["passed"] for count in counts.values()) > 4000
    assert sum(count["stricter"] for count in counts.values()) < 100
