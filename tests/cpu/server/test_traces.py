"""Traces: the facts of each request, the spans that OpenTelemetry's library makes of them, and nothing where they are
off."""

import argparse
import http.server
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu.server.harness import Harness, error, eventually, harness

import ownpath
from ownpath.commands.trace_options import recorder_of
from ownpath.server.app import Rules
from ownpath.server.traces import TracedRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}


class Kept:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.requests: list[TracedRequest] = []

    def record(self, request: TracedRequest) -> None:
        self.requests.append(request)

    def close(self) -> None:
        pass


@pytest.fixture
def kept() -> Iterator[tuple[Harness, Kept]]:
    recorder = Kept()
    with harness(rules=Rules(recorder=recorder)) as served:
        yield served, recorder


def test_a_request_is_told_once_it_has_ended(kept: tuple[Harness, Kept]) -> None:
    served, recorder = kept
    before = time.time_ns()
    response = served.ask("POST", CHAT, json={"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 4})
    (found,) = recorder.requests
    assert before <= found.begun_ns <= found.ended_ns <= time.time_ns()
    assert (found.path, found.status, found.model) == (CHAT, 200, "tiny")
    assert found.request_id == response.headers["x-request-id"]
    assert found.generating is not None
    assert found.generating.usage()["completion_tokens"] == 8
    assert found.generating.params is not None
    assert found.generating.params.max_tokens == 4
    for line in found.generating.timelines:
        assert (line.num_tokens, line.reason) == (4, "length")
        points = [found.at_ns(point) for phase in line.phases().values() for point in phase]
        assert points == sorted(points), "one phase after the other"
        assert list(line.phases()) == ["queue", "prefill", "decode"]
        assert before <= points[0] <= points[-1] <= found.ended_ns


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_agents_requests_are_told_too(
    kept: tuple[Harness, Kept], path: str, body: dict[str, Any], stream: bool
) -> None:
    served, recorder = kept
    assert served.post(path, **body, stream=stream).status_code == 200
    (found,) = recorder.requests
    assert (found.path, found.status, found.model) == (path, 200, "tiny")
    assert found.generating is not None
    assert [line.num_tokens for line in found.generating.timelines] == [3]


def test_refused_and_other_requests(kept: tuple[Harness, Kept]) -> None:
    served, recorder = kept
    error(served.post(COMPLETIONS, prompt="a", wings=1), 400)
    served.ask("GET", "/health")
    served.post("/tokenize", prompt="a")
    (found,) = recorder.requests
    assert (found.status, found.model, found.generating) == (400, None, None)


@pytest.fixture
def spans() -> Iterator[tuple[Harness, Any]]:
    """A server whose spans are kept by the library's own exporter in memory."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from ownpath.server.otel import OtelRecorder

    exporter = InMemorySpanExporter()
    with harness(rules=Rules(recorder=OtelRecorder(SimpleSpanProcessor(exporter)))) as served:
        yield served, exporter


def by_name(exporter: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_spans_follow_the_conventions_and_the_callers_trace(spans: tuple[Harness, Any]) -> None:
    served, exporter = spans
    body = {"prompt": [20, 21, 22], "max_tokens": 5, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3}
    served.ask("POST", COMPLETIONS, json=body, headers=PARENT)
    found = by_name(exporter)
    (whole,) = found.pop("text_completion tiny")
    assert whole.kind.name == "SERVER"
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == SPAN_ID
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "ownpath",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "http.request.method": "POST",
        "http.route": COMPLETIONS,
        "http.response.status_code": 200,
    }
    assert {name: whole.attributes[name] for name in expected} == expected
    assert whole.status.status_code.name == "UNSET"
    assert whole.resource.attributes["service.name"] == "ownpath"
    assert set(found) == {"queue", "prefill", "decode"}
    for phases in found.values():
        assert sorted(span.attributes["ownpath.choice.index"] for span in phases) == [0, 1]
        for span in phases:
            assert span.parent.span_id == whole.context.span_id
            assert span.context.trace_id == whole.context.trace_id
            assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    assert [span.attributes["gen_ai.usage.output_tokens"] for span in found["decode"]] == [5, 5]
    assert "hello" not in str([span.to_json() for span in exporter.get_finished_spans()])


def test_without_a_trace_of_the_callers_there_is_one(spans: tuple[Harness, Any]) -> None:
    served, exporter = spans
    served.stream(CHAT, messages=[{"role": "user", "content": "a secret"}], max_tokens=3)
    (whole,) = by_name(exporter)["chat tiny"]
    assert whole.parent is None
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_the_caller_says_if_it_is_sampled(spans: tuple[Harness, Any]) -> None:
    served, exporter = spans
    headers = {"traceparent": PARENT["traceparent"][:-2] + "00"}
    assert served.ask("POST", COMPLETIONS, json={"prompt": "a"}, headers=headers).status_code == 200
    for bad in ("", "zz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\u00e9" * 100):
        served.ask("POST", COMPLETIONS, json={"prompt": "a"}, headers={"traceparent": bad.encode("latin-1")})
    assert [span.parent for span in by_name(exporter)["text_completion tiny"]] == [None] * 4


def test_an_error_is_an_errors_span(spans: tuple[Harness, Any]) -> None:
    served, exporter = spans
    error(served.post(COMPLETIONS, prompt="a", wings=1), 400)
    served.vitals.is_draining = True
    error(served.post(COMPLETIONS, prompt="a"), 503)
    first, second = by_name(exporter)["text_completion"]
    assert (first.status.status_code.name, first.attributes["http.response.status_code"]) == ("UNSET", 400)
    assert (second.status.status_code.name, second.attributes["error.type"]) == ("ERROR", "503")


def test_nothing_is_imported_where_traces_are_off(clean: pytest.MonkeyPatch) -> None:
    """One module imports OpenTelemetry, and one function that module, behind the question if traces are asked for."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        clean.setenv(name, "")
    clean.setitem(sys.modules, "ownpath.server.otel", None)
    assert asked(None) is None
    package = Path(ownpath.__file__).parent
    found = {
        (str(path.relative_to(package)), line.startswith(" "))
        for path in [*(package / "server").glob("*.py"), *(package / "commands").glob("*.py")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(import|from) (opentelemetry|ownpath\.server\.otel)", line)
    }
    assert found == {("server/otel.py", False), ("commands/trace_options.py", True)}


def asked(endpoint: str | None) -> Any:
    return recorder_of(argparse.Namespace(otlp_traces_endpoint=endpoint))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "nonsense"])
def test_an_endpoint_that_is_none_is_refused_at_once(url: str, clean: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--otlp-traces-endpoint: .* is no URL"):
        asked(url)


def test_what_is_not_there_is_said(clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By an error to who asks for it here, by a warning where the environment asks everything on the machine."""
    clean.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    clean.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    clean.delitem(sys.modules, "ownpath.server.otel", raising=False)
    with pytest.raises(ValueError, match="pip install 'ownpath\\[otel\\]'"):
        asked("http://127.0.0.1:1/v1/traces")
    assert asked(None) is None
    assert "no traces, although OpenTelemetry's variables are set" in capsys.readouterr().err
    clean.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="only http/protobuf is spoken, not 'grpc'"):
        asked("http://127.0.0.1:1/v1/traces")


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "TRUE"), ("OTEL_TRACES_EXPORTER", "none")])
def test_opentelemetrys_own_switches_turn_it_off(
    name: str, value: str, clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    clean.setenv(name, value)
    clean.setitem(sys.modules, "ownpath.server.otel", None)
    assert asked(None) is None
    assert capsys.readouterr().err == ""


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes what is sent to it."""

    came: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("by_variable", [True, False])
def test_spans_reach_a_collector(by_variable: bool, clean: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    Collector.came = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{collector.server_port}"
        clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", base if by_variable else "")
        clean.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        recorder = asked(None if by_variable else f"{base}/v1/traces")
        with harness(rules=Rules(recorder=recorder)) as served:
            served.ask("POST", COMPLETIONS, json={"prompt": "a"}, headers=PARENT)
        recorder.close()
        assert eventually(lambda: Collector.came)
        collector.shutdown()
    ((path, data),) = Collector.came
    assert path == "/v1/traces"
    for part in (b"text_completion tiny", b"queue", b"prefill", b"decode", bytes.fromhex(TRACE_ID)):
        assert part in data


def test_a_collector_that_is_gone_holds_up_nothing(clean: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    recorder = asked("http://127.0.0.1:9/v1/traces")
    with harness(rules=Rules(recorder=recorder)) as served:
        assert served.ask("POST", COMPLETIONS, json={"prompt": "a"}).status_code == 200
    begun = time.monotonic()
    clean.setattr("ownpath.server.otel._CLOSE_S", 0.3)
    recorder.close()
    assert time.monotonic() - begun < 5
