"""``/debug/plan``: closed unless there is a key, open to that key alone, and true of what ran."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cpu.chat.small_tokenizer import small_tokenizer
from cpu.server.harness import HELLO, MODEL_ID, Harness, answer, error, harness, listening
from cpu.server.model_folder import write_model_folder

from ownpath.cache.snapshot import snapshot_bytes, tail_bytes
from ownpath.cli import main
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import load_model, plan_model
from ownpath.plan.show import plan_dict
from ownpath.runners import SwiGLU
from ownpath.server.admin_key import require_admin_key
from ownpath.server.app import create_app
from ownpath.server.body import Limits
from ownpath.server.debug import DebugPlan
from ownpath.server.vitals import Vitals
from ownpath.trace import Ledger

KEY = "a-key-that-nobody-guesses"
PATH = "/debug/plan"
AS_ADMIN = {"Authorization": f"Bearer {KEY}"}
FACTS = {"model": MODEL_ID, "versions": {"torch": "x"}, "device": {"type": "cpu"}, "plan": {"ops": []}}


def swiglu_ledger() -> Ledger:
    ledger = Ledger({"a": ("SwiGLU", "ref.swiglu"), "b": ("SwiGLU", "triton.swiglu"), "c": ("x", "x")})
    for slot in ledger.kernels:
        ledger.watch(slot, SwiGLU(8.0))
    return ledger


def call(ledger: Ledger, slot: str, num_tokens: int) -> None:
    ledger.watch(slot, SwiGLU(8.0))(torch.zeros(num_tokens, 4))


@contextlib.contextmanager
def opened(ledger: Ledger) -> Iterator[Harness]:
    with harness() as served:
        debug = DebugPlan(KEY, FACTS, ledger, Limits())
        yield Harness(
            create_app(served.vitals, served.tokenizer, MODEL_ID, debug=debug),
            served.engine,
            served.model,
            served.tokenizer,
            served.vitals,
        )


@pytest.fixture(scope="module")
def admin() -> Iterator[Harness]:
    with opened(swiglu_ledger()) as served:
        yield served


def test_without_a_key_there_is_nothing(served: Harness) -> None:
    for method in ("GET", "POST"):
        error(served.ask(method, PATH, headers=AS_ADMIN), 404)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer   ", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        ("Bearer wrong", 403),
        (f"Bearer {KEY}x", 403),
        (f"Bearer {KEY[:-1]}", 403),
        (f"Bearer {KEY.upper()}", 403),
        ("Bearer \u00e9\u00ff", 403),
    ],
)
def test_only_the_key_opens_it(method: str, header: str | None, status: int, admin: Harness) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = admin.ask(method, PATH, headers=headers)
    assert response.status_code == status
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert KEY not in response.text
    if method != "HEAD":
        assert error(response, status)["code"] == ("no_admin_key" if status == 401 else "wrong_admin_key")


def test_the_scheme_is_no_matter_of_case(admin: Harness) -> None:
    assert admin.ask("GET", PATH, headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_what_ran_is_told_beside_what_was_planned() -> None:
    ledger = swiglu_ledger()
    with opened(ledger) as served:
        for slot in ("a", "a", "b"):
            call(ledger, slot, 2)
        response = served.ask("GET", PATH, headers=AS_ADMIN)
        assert response.headers["cache-control"] == "no-store"
        body = answer(response)
        assert {name: body[name] for name in FACTS} == FACTS
        assert (body["schema"], body["recording"]) == (1, False)
        common = {
            "runner": "SwiGLU",
            "kernel": "ref.swiglu",
            "layout": "row_major",
            "recorded": [],
            "unlisted_calls": 0,
        }
        assert body["ran"] == [
            {"slot": "a", "as_planned": True, "calls": 2} | common,
            {"slot": "b", "as_planned": False, "calls": 1} | common,
        ]


def test_fields_can_be_asked_for_alone(admin: Harness) -> None:
    """Names of an expert's modules fill megabytes: who asks again and again wants the counts alone."""
    whole = answer(admin.ask("GET", PATH, headers=AS_ADMIN))
    for fields in ("ran", "ran,recording", "model,ran,device"):
        body = answer(admin.ask("GET", f"{PATH}?fields={fields}", headers=AS_ADMIN))
        assert body == {name: whole[name] for name in fields.split(",")}
    for fields in ("", "runs", "ran,", "ran%20"):
        refused = error(admin.ask("GET", f"{PATH}?fields={fields}", headers=AS_ADMIN), 400)
        assert refused["param"] == "fields"
        assert "plan" in refused["message"]
    error(admin.ask("GET", f"{PATH}?fields=ran"), 401)


def test_recording_is_for_whoever_asks() -> None:
    ledger = swiglu_ledger()
    with opened(ledger) as served:
        call(ledger, "a", 1)
        assert answer(served.ask("POST", PATH, headers=AS_ADMIN, json={"recording": True})) == {"recording": True}
        for num_tokens in (3, 3, 1):
            call(ledger, "a", num_tokens)
        served.ask("POST", PATH, headers=AS_ADMIN, json={"recording": True})
        body = answer(served.ask("GET", PATH, headers=AS_ADMIN))
        assert body["recording"] is True
        [ran] = body["ran"]
        assert ran["calls"] == 4
        form = {"variant": "swiglu.ref:SWIGLU"}
        assert ran["recorded"] == [
            form | {"arguments": ["float32[3, 4]"], "results": ["float32[3, 2]"], "calls": 2},
            form | {"arguments": ["float32[1, 4]"], "results": ["float32[1, 2]"], "calls": 1},
        ]
        assert answer(served.ask("POST", PATH, headers=AS_ADMIN, json={"recording": False})) == {"recording": False}
        assert not ledger.observers.attached
        assert answer(served.ask("GET", PATH, headers=AS_ADMIN))["ran"][0]["recorded"] == []


@pytest.mark.parametrize("body", [{}, {"recording": 1}, {"recording": None}, {"recording": True, "more": 1}])
def test_other_wishes_are_refused(body: dict[str, Any], admin: Harness) -> None:
    assert error(admin.ask("POST", PATH, headers=AS_ADMIN, json=body), 400)["param"] == "recording"
    error(admin.ask("POST", PATH, headers=AS_ADMIN, content=b"recording"), 415)


def test_the_key_is_in_no_log(
    admin: Harness, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    caplog.set_level(logging.DEBUG, logger="ownpath")
    with listening(admin) as url:
        for token in (KEY, f"{KEY}-not"):
            httpx.get(url + PATH, headers={"Authorization": f"Bearer {token}"})
    written = capfd.readouterr()
    assert KEY not in caplog.text + written.out + written.err
    assert KEY not in repr(DebugPlan(KEY, FACTS, swiglu_ledger(), Limits()))


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 15, "with space in the middle", "tab\tbetween the words", "\u00e9" * 20]
)
def test_what_cannot_be_a_key_is_refused_untold(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="at least 16 printable ASCII") as raised:
        require_admin_key(key)
    assert not key or key not in str(raised.value)
    assert main(["serve", "--admin-key", key]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert not key or key not in told


def test_a_real_model_tells_its_own_plan(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "v4")
    config = EngineConfig(max_model_len=128)
    model, tokenizer = load_model(folder, config), small_tokenizer()
    plan = plan_model(folder, "cpu")
    engine = Engine(model, config, tokenizer.num_tokens)
    engine.start()
    try:
        debug = DebugPlan(KEY, FACTS | {"plan": plan_dict(plan)}, model.ledger, Limits())
        vitals = Vitals(engine)
        served = Harness(create_app(vitals, tokenizer, "v4", debug=debug), engine, model, tokenizer, vitals)
        served.chat(messages=HELLO, max_tokens=2)
        body = answer(served.ask("GET", PATH, headers=AS_ADMIN))
        assert {entry["slot"]: (entry["runner"], entry["kernel"]) for entry in body["ran"]} == plan.slots
        assert all(entry["as_planned"] for entry in body["ran"])
        assert body["plan"] == json.loads(json.dumps(plan_dict(plan)))
    finally:
        engine.stop()


@pytest.mark.parametrize("spelled", ["argument", "environment"])
def test_serve_takes_the_key(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, in place of whose server the application is asked."""
    answers: list[httpx.Response] = []

    def run_server(app: Any, *_: object) -> int:
        async def ask() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                answers.extend([await client.get(PATH), await client.get(PATH, headers=AS_ADMIN)])

        asyncio.run(ask())
        return 0

    folder = write_model_folder(tmp_path / "v4")
    monkeypatch.setattr("ownpath.server.run.run_server", run_server)
    options = ["--admin-key", KEY] if spelled == "argument" else []
    if not options:
        monkeypatch.setenv("OWNPATH_ADMIN_KEY", KEY)
    assert main(["serve", str(folder), "--port", "0", "--allow-unverified", *options]) == 0
    assert KEY not in "".join(capsys.readouterr())
    assert [response.status_code for response in answers] == [401, 200]
    body = answers[1].json()
    facts = ["model", "versions", "device", "plan", "release", "memory"]
    assert list(body) == ["schema", "recording", "ran", *facts]
    assert body["model"] == "v4"
    assert body["versions"]["torch"] == torch.__version__
    assert body["device"] == {"type": "cpu", "name": "CPU", "sm": None}
    assert body["ran"] == [], "the self-test's calls are not among them"
    assert body["plan"] == json.loads(json.dumps(plan_dict(plan_model(folder, "cpu"))))
    found = inspect_folder(folder).contents
    assert found is not None
    cpu = found.memory[0]
    one = load_model(folder, EngineConfig(max_model_len=4096)).new_cache().num_bytes()
    sizes = {"weights_bytes": cpu.weights_bytes, "cache_bytes": 16 * one}
    spec = load_model(folder, EngineConfig(max_model_len=4096)).cache_spec
    snapshots = {"snapshots": 64, "snapshot_bytes": 64 * snapshot_bytes(spec)}
    snapshots |= {"tails": 16, "tail_bytes": 16 * tail_bytes(spec)}
    assert body["memory"] == sizes | snapshots | {"requests": 16, "tokens_each": 4096}
