"""Faults of the engine: a step that hangs, a device that is lost, a thread that dies. ``/health`` tells, all ends."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cpu.engine.fake_model import FakeModel, random_rule
from cpu.server.harness import HELLO, MAX_MODEL_LEN, VOCAB, WAIT_S, Gated, error, eventually, harness, listening
from cpu.server.model_folder import write_model_folder
from support.lost_device import LOST, PRETENDED, command, end_of_server

from ownpath.engine.device import device_problem
from ownpath.model.batch import ForwardBatch
from ownpath.server.run import ENGINE_FAILED
from ownpath.server.vitals import Vitals

COMPLETIONS = "/v1/completions"


def told(url: str, path: str) -> str | None:
    """The word of a probe in a 503; None while all is well."""
    try:
        response = httpx.get(url + path, timeout=WAIT_S)
    except httpx.TransportError:
        return None
    return str(response.json()["status"]) if response.status_code == 503 else None


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_step_that_hangs_is_told_and_ends_the_server(is_stream: bool) -> None:
    model = Gated()
    with harness(model, step_timeout_s=0.3) as served, ThreadPoolExecutor(1) as pool:
        with listening(served) as url:
            assert told(url, "/health") is None
            body = {"prompt": "hello", "stream": is_stream}
            pending = pool.submit(httpx.post, url + COMPLETIONS, json=body, timeout=WAIT_S)
            assert eventually(lambda: served.engine.num_open == 1)
            assert eventually(lambda: told(url, "/health") == "a step of the engine has taken more than 0.3 seconds")
            response = pending.result(WAIT_S)
            assert response.status_code == (200 if is_stream else 500)
            assert response.text.count("the engine has stopped") == 1
            assert served.vitals.readiness() == served.vitals.health()
        assert served.vitals.fault() is not None
        for _ in range(9):
            model.permits.release()


def test_a_thread_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with harness() as served, listening(served) as url:
        monkeypatch.setattr(served.engine._scheduler, "schedule", lambda: 1 / 0)
        assert httpx.post(url + COMPLETIONS, json={"prompt": "hello"}, timeout=WAIT_S).status_code == 500
        assert eventually(lambda: told(url, "/health") == "the engine's thread failed")
        assert error(served.post(COMPLETIONS, prompt="hello"), 503)["code"] == "unavailable"
    assert any("division by zero" in str(record.exc_info) for record in caplog.records)


class Failing(FakeModel):
    """Its steps end with an error."""

    def __init__(self) -> None:
        super().__init__(random_rule(VOCAB), VOCAB, MAX_MODEL_LEN)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("problem", [None, "CUDA error: an illegal memory access was encountered"])
def test_a_device_that_is_lost_is_told_and_one_that_still_computes_goes_on(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownpath.engine.engine.device_problem", lambda device: problem)
    with harness(Failing()) as served:
        error(served.post(COMPLETIONS, prompt="hello"), 500)
        assert eventually(lambda: served.engine.is_alive == (problem is None))
        assert served.vitals.health() == (problem and "the device computes nothing any more")
        assert error(served.post(COMPLETIONS, prompt="hello"), 500 if problem is None else 503)


def test_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    """Steps fail and so does the check of the device: open answers name it, ``/health`` tells it, the process ends."""
    folder = write_model_folder(tmp_path / "v4")
    ending = end_of_server("pretended", tmp_path / "lose", [str(folder)])
    assert ending.streams == [f"the engine has stopped: {LOST}"] * 2
    assert ending.health == (503, LOST)
    assert ending.exit_code == ENGINE_FAILED
    assert f"the device is lost: {PRETENDED}" in ending.log
    assert "exit code 75" in ending.log


def test_requests_of_a_lost_device_are_told(tmp_path: Path) -> None:
    """In the engine alone, and whoever asks it afterwards."""
    done = subprocess.run(
        command("pretended", tmp_path / "lose", "engine", "cpu"), capture_output=True, text=True, check=True
    )
    stopped = f"the engine has stopped: {LOST}"
    found = json.loads(done.stdout)
    assert found == {"errors": [stopped] * 2, "failure": LOST, "is_alive": False, "refusal": stopped}
    assert f"the device is lost: {PRETENDED}" in done.stderr, "as the log tells it"


def test_a_processor_is_never_lost() -> None:
    assert device_problem("cpu") is None


def test_a_process_that_was_stopped_itself_did_not_hang() -> None:
    """Looks that are far apart count a second each: a laptop's sleep, or SIGSTOP, is no step that hangs."""
    model = Gated()
    with harness(model) as served:
        vitals = Vitals(served.engine, step_timeout_s=5)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(served.complete, prompt="hello", max_tokens=1)
            assert eventually(lambda: served.engine.is_stepping)
            assert [vitals.look(now) for now in (0.0, 0.5, 1000.0, 2000.0)] == [None] * 4
            model.permits.release()
            pending.result(WAIT_S)
            assert eventually(lambda: not served.engine.is_stepping)
            assert [vitals.look(2000.0 + seconds) for seconds in range(9)] == [None] * 9, "an engine without work"
            pending = pool.submit(served.post, COMPLETIONS, prompt="hello", max_tokens=1)
            assert eventually(lambda: served.engine.is_stepping)
            looks = [vitals.look(3000.0 + seconds) for seconds in range(9)]
            assert looks[:6] == [None] * 6
            assert looks[8] == "a step of the engine has taken more than 5 seconds"
            error(pending.result(WAIT_S), 500)
        model.permits.release()


def test_ready_asks_more_than_health() -> None:
    with harness() as served:
        assert served.ask("GET", "/ready").json() == {"status": "ok"}
        served.vitals.failed_checks = "S01-golden"
        assert served.ask("GET", "/ready").status_code == 503
        assert "S01-golden" in served.ask("GET", "/ready").json()["status"]
        assert served.ask("GET", "/health").status_code == 200


def test_a_server_that_ends_says_so_and_finishes_what_it_has() -> None:
    """New connections are still taken, to be told; what was begun is answered."""
    model = Gated()
    with harness(model) as served, ThreadPoolExecutor(2) as pool:
        with listening(served, drain_s=WAIT_S) as url:
            pending = pool.submit(
                httpx.post, url + COMPLETIONS, json={"prompt": "hello", "max_tokens": 1}, timeout=WAIT_S
            )
            assert eventually(lambda: served.engine.num_open == 1)

            def look_then_go_on() -> tuple[str | None, httpx.Response]:
                try:
                    assert eventually(lambda: told(url, "/ready") is not None)
                    return told(url, "/ready"), httpx.post(url + COMPLETIONS, json={"prompt": "hello"}, timeout=WAIT_S)
                finally:
                    for _ in range(9):
                        model.permits.release()

            looking = pool.submit(look_then_go_on)
        status, refused = looking.result(WAIT_S)
        assert status == "the server is shutting down"
        assert error(refused, 503)["code"] == "unavailable"
        assert pending.result(WAIT_S).status_code == 200


SERVE = """
import pathlib, sys, time
import ownpath.commands.serve
from ownpath.cli import main
from ownpath.model.model import Model
forward = Model.forward
def hangs(self, batch):
    if pathlib.Path(sys.argv[1]).exists():
        time.sleep(1000)
    return forward(self, batch)
Model.forward = hangs
ownpath.commands.serve._self_test = lambda *_: ''  # its own tests are elsewhere
sys.exit(main(sys.argv[2:]))
"""


def test_the_process_ends_with_an_exit_code_and_logs_as_json(tmp_path: Path) -> None:
    """A supervisor starts it again. Every line of the log after the start is one JSON object; none holds the prompt."""
    folder = write_model_folder(tmp_path / "v4")
    trigger = tmp_path / "hang"
    command = [sys.executable, "-c", SERVE, str(trigger), "serve", str(folder), "--port", "0", "--max-model-len", "512"]
    options = ["--step-timeout", "1", "--log-format", "json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = (re.search(r"at (http://127\.0\.0\.1:\d+)/v1", line) for line in process.stderr)
        url = next(filter(None, said))[1]
        assert httpx.get(url + "/ready", timeout=WAIT_S).status_code == 200
        trigger.touch()
        headers = {"X-Request-Id": "the-last-one"}
        response = httpx.post(url + COMPLETIONS, json={"prompt": "unmistakable"}, headers=headers, timeout=WAIT_S)
        assert response.status_code == 500
        assert told(url, "/health") == "a step of the engine has taken more than 1 seconds"
        assert process.wait(WAIT_S) == ENGINE_FAILED == 75
        lines: list[dict[str, Any]] = [json.loads(line) for line in process.stderr]
    finally:
        process.kill()
        process.communicate()
    assert {"time", "level", "logger"} <= set.intersection(*map(set, lines))
    (line,) = [line for line in lines if line.get("request_id") == "the-last-one"]
    assert (line["method"], line["path"], line["status"], line["client"]) == ("POST", COMPLETIONS, 500, "127.0.0.1")
    assert any("exit code 75" in line.get("message", "") for line in lines)
    assert "unmistakable" not in json.dumps(lines)


def test_health_is_told_while_many_ask() -> None:
    """Probes are answered while more requests are open than run, and the queue is full."""
    model = Gated()
    with harness(model, max_num_queued=4) as served, listening(served) as url, ThreadPoolExecutor(16) as pool:
        pending = [
            pool.submit(
                httpx.post, url + COMPLETIONS, json={"messages": HELLO, "prompt": "a", "max_tokens": 1}, timeout=WAIT_S
            )
            for _ in range(4)
        ]
        pending += [
            pool.submit(httpx.post, url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, timeout=WAIT_S)
            for _ in range(12)
        ]
        assert eventually(lambda: served.engine.num_open == 12)
        for path in ("/health", "/ready", "/metrics"):
            begin = time.monotonic()
            assert httpx.get(url + path, timeout=WAIT_S).status_code == 200
            assert time.monotonic() - begin < 5
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}, timeout=WAIT_S).status_code == 429
        for _ in range(99):
            model.permits.release()
        assert sorted(one.result(WAIT_S).status_code for one in pending) == [200] * 12 + [400] * 4
