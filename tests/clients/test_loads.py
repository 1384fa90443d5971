"""Tools that send load, or whatever a schema allows, against a real server. One that is not installed is skipped."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_evals import run_tool

pytestmark = pytest.mark.clients

MODEL = Path(__file__).parents[2] / "src" / "ownpath" / "assets" / "tiny-v4"
SCHEMATHESIS_LIMIT_S = 3600
"""It sends its 8,600 cases one after the other; those of /v1/responses without a limit run to the context's end."""
LOCUSTFILE = """
from locust import FastHttpUser, constant, task


class Chatting(FastHttpUser):
    wait_time = constant(0)

    @task(3)
    def chat(self):
        body = {"model": "tiny-v4", "messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
        self.client.post("/v1/chat/completions", json=body)

    @task
    def stream(self):
        body = {"model": "tiny-v4", "prompt": "The capital of Peru is", "stream": True, "max_tokens": 8}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
            if b"[DONE]" not in response.content:
                response.failure("the stream broke off")

    @task
    def models(self):
        self.client.get("/v1/models")

"""


def root_of(served: Any) -> str:
    """Returns the server's address without ``/v1``."""
    return str(served.url).removesuffix("/v1")


def test_schemathesis_finds_no_fault_and_no_undeclared_status(served_small: Any, tmp_path: Path) -> None:
    """Cases that the schema allows, and cases that it forbids; the seed makes them the same each time."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",unsupported_method,allow_header_conformance,negative_data_rejection"
    options = ("--checks", checks, "--seed", "1", "--max-examples", "30", "--continue-on-failure", "--no-shrink")
    limits = ("--request-timeout", "120", "--suppress-health-check", "all")
    url = f"{root_of(served_small)}/openapi.json"
    run_tool("schemathesis", "st", "run", url, *options, *limits, cwd=tmp_path, limit_s=SCHEMATHESIS_LIMIT_S)


def test_locust_sees_no_failure(served: Any, tmp_path: Path) -> None:
    (tmp_path / "locustfile.py").write_text(LOCUSTFILE, encoding="utf-8")
    options = ("--headless", "--users", "24", "--spawn-rate", "24", "--run-time", "20s", "--json-file", "found")
    run_tool("locust", "locust", "--host", root_of(served), *options, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {entry["name"] for entry in found} == {"/v1/chat/completions", "/v1/completions", "/v1/models"}
    assert all(entry["num_failures"] == 0 < entry["num_requests"] for entry in found)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf_profiles_streams_without_an_error(served: Any, tmp_path: Path, endpoint: str) -> None:
    run_tool(
        "aiperf",
        *("aiperf", "profile", "-m", "tiny-v4", "-u", root_of(served), "--endpoint-type", endpoint, "--streaming"),
        *("--tokenizer", str(MODEL), "--isl", "100", "--osl", "20", "--extra-inputs", "ignore_eos:true"),
        *("--request-count", "20", "--concurrency", "4", "--ui", "none", "--artifact-dir", str(tmp_path)),
        cwd=tmp_path,
    )
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    assert found["request_count"]["avg"] == 20
    assert found.get("error_summary", []) == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_guidellm_completes_every_request(served: Any, tmp_path: Path, path: str) -> None:
    """Streams, 4 at once, as it sends them by itself."""
    backend = f"kind=openai_http,target={root_of(served)},model=tiny-v4,request_format={path}"
    run_tool(
        "guidellm",
        *("guidellm", "run", "--backend", backend),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20"),
        *("--tokenizer", f"kind=huggingface_auto,model={MODEL}"),
        *("--data", "kind=synthetic_text,prompt_tokens=100,output_tokens=20"),
        *("--output", "kind=json,path=found.json", "--disable-console"),
        cwd=tmp_path,
    )
    (found,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["benchmarks"]
    assert found["metrics"]["request_totals"] == {"successful": 20, "errored": 0, "incomplete": 0, "total": 20}
    answers = found["requests"]["successful"]
    assert {answer["output_metrics"]["text_tokens"] for answer in answers} == {20}
