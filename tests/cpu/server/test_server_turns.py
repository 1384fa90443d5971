"""Priorities and clients, as the engine hears of them: how urgent a request is, and whose."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import VOCAB, WAIT_S, Gated, Harness, error, eventually, harness

from ownpath.engine.request import Request
from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules

KEYS = ("first-key-0123456789", "second-key-0123456789")


def submitted(served: Harness, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Returns a list that holds every request that the engine is given from now on."""
    taken: list[Request] = []
    submit = served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda requests: (taken.extend(requests), submit(requests))[1])
    return taken


@pytest.mark.parametrize(
    ("sent", "expected"),
    [({}, 0), ({"priority": 7}, 7), ({"priority": -3}, -3), ({"priority": 10**30}, 2**31 - 1)]
    + [({"priority": value}, 0) for value in (None, True, 1.5, "high", "3", [], {"a": 1})],
)
def test_any_priority_is_taken(sent: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with harness(FakeModel(random_rule(VOCAB), VOCAB)) as served:
        taken = submitted(served, monkeypatch)
        served.complete(prompt=["a", "b"], max_tokens=1, **sent)
        response = served.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=1, **sent
        )
        assert response.status_code == 200
        assert "priority" not in response.headers.get("X-Ownpath-Ignored", "")
        assert [request.priority for request in taken] == [expected] * 3
        assert served.post("/tokenize", prompt="a", **sent).status_code == 200


@pytest.mark.parametrize("keys", [(), KEYS])
def test_a_client_is_a_key_or_an_address(keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys a header makes nobody another client."""
    with harness(FakeModel(random_rule(VOCAB), VOCAB), rules=Rules(access=AccessPolicy(keys))) as served:
        taken = submitted(served, monkeypatch)
        for key in (*KEYS, *KEYS):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": "a", "max_tokens": 1}
            assert served.ask("POST", "/v1/completions", json=body, headers=headers).status_code == 200
    clients = [request.client for request in taken]
    assert clients[:2] == clients[2:]
    assert len({*clients}) == (2 if keys else 1)
    assert all(clients)
    assert not any(key in client for key in KEYS for client in clients), "a key is not kept"


def test_a_client_with_many_requests_leaves_others_places_to_wait_in() -> None:
    """The first key has all that it may: its next request is turned away, the second key's waits and is answered."""
    model = Gated()
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)

    def ask(headers: dict[str, str], count: int) -> Any:
        body = {"prompt": ["a"] * count, "max_tokens": 1}
        return served.ask("POST", "/v1/completions", json=body, headers=headers)

    with harness(model, max_num_queued=8, rules=Rules(access=AccessPolicy(KEYS))) as served:
        with ThreadPoolExecutor(2) as pool:
            greedy = pool.submit(ask, first, 16)
            assert eventually(lambda: served.engine.num_open == 16)
            refused = error(ask(first, 1), 429)
            assert "others" in refused["message"]
            assert refused["code"] == "overloaded"
            modest = pool.submit(ask, second, 2)
            assert eventually(lambda: served.engine.num_open == 18)
            model.permits.release(99)
            assert [it.result(WAIT_S).status_code for it in (greedy, modest)] == [200, 200]
        assert ask(first, 16).status_code == 200
