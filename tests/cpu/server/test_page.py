"""The page at ``/`` without a browser: what it is served with, what it may do, and to whom it is open."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from cpu.server.harness import Harness, error, harness

from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules

KEY = "an-api-key-of-this-server"
MAX_BYTES = 40_000


@pytest.fixture(scope="module")
def page(served: Harness) -> str:
    response = served.ask("GET", "/")
    assert response.status_code == 200
    return response.text


@pytest.fixture(scope="module")
def keyed() -> Iterator[Harness]:
    access = AccessPolicy((KEY,), hosts=("test",))
    with harness(rules=Rules(access=access)) as served:
        yield served


class Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_is_served_for_reading_alone(served: Harness) -> None:
    got, head = served.ask("GET", "/"), served.ask("HEAD", "/")
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert (head.status_code, head.content) == (200, b"")
    assert {name: value for name, value in head.headers.items() if name != "x-request-id"} == {
        name: value for name, value in got.headers.items() if name != "x-request-id"
    }
    assert int(head.headers["content-length"]) == len(got.content) < MAX_BYTES
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        error(served.ask(method, "/"), 405)
    for path in ("/index.html", "/page.html", "/page", "/favicon.ico"):
        error(served.ask("GET", path), 404)


def test_its_policy_lets_only_its_own_script_run(served: Harness, page: str) -> None:
    headers = served.ask("GET", "/").headers
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cache-control"] == "no-cache"


def test_it_asks_for_nothing_outside(page: str) -> None:
    elements = Elements(page).found
    tags = {tag for tag, _ in elements}
    assert not {"link", "img", "iframe", "object", "embed", "svg", "a", "base", "audio", "video"} & tags
    names = {name for _, attributes in elements for name in attributes}
    assert not {"src", "href", "action", "formaction", "style", "srcset"} & names
    assert not [name for name in names if name.startswith("on")]
    for word in ("http:", "https:", "//cdn", "url(", "@import", "import(", "WebSocket", "sendBeacon", "XMLHttp"):
        assert word not in page, word


def test_its_script_makes_no_markup_and_stores_nothing(page: str) -> None:
    banned = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser")
    stores = (
        "localStorage",
        "sessionStorage",
        "indexedDB",
        "cookie",
        "caches.open",
        "history.",
        "location",
        "window.open",
    )
    script = page.partition("<script>")[2]
    for word in (*banned, *stores):
        assert word not in script, word


def test_every_field_has_a_name(page: str) -> None:
    """A label around it, or one that points at it."""
    pointed = set(re.findall(r'<label for="([^"]+)"', page))
    around = {
        name
        for label in re.findall(r"<label>.*?</label>", page, re.DOTALL)
        for name in re.findall(r'id="([^"]+)"', label)
    }
    fields = {attributes["id"] for tag, attributes in Elements(page).found if tag in ("input", "textarea", "select")}
    assert fields == pointed | around
    for tag, attributes in Elements(page).found:
        if attributes.get("type") == "password":
            assert (tag, attributes["autocomplete"]) == ("input", "off")
            assert "name" not in attributes, "a form that is sent by accident carries no key"


def test_it_is_open_without_a_key_and_opens_nothing_else(keyed: Harness, page: str) -> None:
    """A browser sends no key with an address, so the file, which is the same everywhere, asks for none."""
    assert keyed.ask("GET", "/").text == page
    error(keyed.ask("POST", "/"), 405)
    for path in ("/v1/models", "/metrics", "/debug/plan", "/index.html", "/v1"):
        assert keyed.ask("GET", path).status_code == 401, path
    assert keyed.ask("GET", "/", headers={"Host": "elsewhere.example"}).status_code == 403


def test_it_is_counted_under_its_path(served: Harness) -> None:
    served.ask("GET", "/")
    assert 'http_requests_total{handler="/",method="GET",status="200"}' in served.ask("GET", "/metrics").text
