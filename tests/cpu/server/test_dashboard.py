"""The dashboard file: every series that it asks for is on the server's page, and nothing on the page is left out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ownpath.engine.load import DraftCounts, EngineLoad
from ownpath.server.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana.json"


def queries(value: Any) -> Iterator[str]:
    """The queries of panels and variables, wherever they are."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("expr", "query") and isinstance(part, str):
                yield part
            else:
                yield from queries(part)
    elif isinstance(value, list):
        for part in value:
            yield from queries(part)


def names(texts: Iterator[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"ownpath_\w+", text)}


def test_every_query_finds_its_series() -> None:
    metrics = Metrics()
    metrics.count_http({"path": "/health", "method": "GET"}, 200)
    lines = [line for line in metrics.render(EngineLoad()).splitlines() if not line.startswith("#")]
    page = {line.split("{")[0].split(" ")[0] for line in lines}
    asked = names(queries(json.loads(DASHBOARD.read_text(encoding="utf-8"))))
    assert asked - page == set()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in page} - shown == set()


def test_the_labels_of_queries_are_those_of_the_page() -> None:
    metrics = Metrics()
    metrics.count_http({"path": "/health", "method": "GET"}, 200)
    text = metrics.render(EngineLoad())
    for query in queries(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
        found = re.search(r"sum by \(([\w, ]+)\) .*?(ownpath_\w+)", query)
        for label in found[1].split(", ") if found else ():
            assert re.search(rf'^{found[2]}\{{.*\b{label}="', text, re.M), query


def test_guesses_are_on_the_page() -> None:
    drafts = DraftCounts()
    drafts.add(num_guesses=3, num_right=2)
    text = Metrics().render(EngineLoad(drafts=drafts))
    for name, value in (("num_draft_tokens", 3), ("num_accepted_tokens", 2), ("steps", 1)):
        assert f"\nownpath_spec_decode_{name}_total {value}\n" in text
    assert '\nownpath_spec_decode_num_accepted_tokens_per_pos_total{position="0"} 2\n' in text
