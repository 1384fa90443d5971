"""The table of fields and routes in docs/serving.md: it says what the server says, and no public client's field is
unknown."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cpu.server.harness import Harness, answer

from ownpath.server.route_table import ROUTES

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import field_table as tool  # noqa: E402

KNOWN: dict[str, Any] = json.loads((ROOT / "tests/golden/requests/known_fields.json").read_text(encoding="utf-8"))
SERVED = {f"{route.method} {route.path}" for route in ROUTES}


def test_the_page_has_the_table_that_the_server_makes() -> None:
    _, found, _ = tool.split_page(tool.PAGE.read_text(encoding="utf-8"))
    assert found == tool.table(), "run tools/field_table.py"


def test_a_page_without_the_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="unpack"):
        tool.split_page("no table")


@pytest.mark.parametrize("route", sorted(SERVED & KNOWN.keys()))
def test_every_field_of_public_clients_has_a_fate(route: str) -> None:
    assert set(KNOWN[route]) <= tool.fates()[route].keys()


def test_every_route_is_a_row_and_none_is_both_served_and_not() -> None:
    served = {route.replace(":path}", "}").removeprefix("POST ") for route in SERVED}
    first_cells = "".join(re.findall(r"^\| (.*?) \|", tool.table(), re.MULTILINE))
    assert served <= set(re.findall(r"`(.*?)`", first_cells))
    others = {path for paths in tool.NOT_SERVED.values() for path in paths}
    assert not others & {route.path for route in ROUTES}


def test_the_endpoints_of_the_page_are_those_that_are_served() -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    section = page[page.index("## Endpoints") : page.index("```sh\ncurl")]
    paths = re.findall(r"`(?:GET|POST)?`?,? ?`?(?:GET|POST)? ?(/[^`]*)`", section)
    named = {path.replace("{id}", "{model_id:path}") for path in paths}
    assert {route.path for route in ROUTES} <= named


def test_paths_of_other_servers_are_not_found(served: Harness) -> None:
    for paths in tool.NOT_SERVED.values():
        for path in paths:
            assert served.ask("GET", path.replace("{id}", "1")).status_code == 404


def test_fates_are_what_happens(served: Harness) -> None:
    """A field of each fate, of both kinds of request."""
    for path, fields in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {})):
        fates = tool.fates()[f"POST {path}"]
        asked = {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}]} | fields
        if fields:
            del asked["messages"]
        for name, fate in fates.items():
            response = served.post(path, **asked | {name: {"something": "else"}})
            ignored = response.headers.get("x-ownpath-ignored", "")
            assert (name in ignored.split(", ")) == (fate == tool.IGNORED), name
            if fate.startswith("400"):
                assert response.status_code == 400, name
                assert answer_error(response)["param"] == name
        neutral = {name: json.loads(found[1]) for name, fate in fates.items() if (found := re.search(r"`(.*?)`", fate))}
        assert answer(served.post(path, **asked | neutral))["choices"]


def answer_error(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found
