"""Two processes on a CPU run the embedded model as one does; whoever is lost is named, and nothing hangs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served_ranks import Served, served

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from full_shape import mixed_requests, send_all

from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
TEXT = "The capital of France is Paris. What is 2 + 3? Repeat: apple river stone."
NUM_TOKENS = 16
TOLERANCE = 2e-4
"""Float32 with sums in another order, as between this model and another implementation of it (``test_parity``)."""
ENGINE = EngineConfig(max_model_len=512)
SCRIPT = """
import json, os, sys, torch
from ownpath.config import EngineConfig, Parallel
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.ranks.group import join, leave

group = join(os.environ)
engine = EngineConfig(max_model_len=512, parallel=Parallel(group.rank, group.size))
model = load_model(default_model_dir(), engine, peers=group)
cache, ids, found = model.new_cache(), json.loads(sys.argv[1]), []
with torch.inference_mode():
    logits = model.forward(ForwardBatch.of([(ids, cache)], "cpu", all_logits=True))
    for _ in range(int(sys.argv[2])):
        found.append(int(logits[-1].argmax()))
        logits = torch.cat((logits, model.forward(ForwardBatch.of([(found[-1:], cache)], "cpu"))))
torch.save([found, logits.log_softmax(-1)], f"{sys.argv[3]}/{group.rank}.pt")
leave()
"""


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.from_folder(default_model_dir()).encode_text(TEXT)


@pytest.fixture(scope="module")
def alone(ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """The tokens of one process, and log-probs of every row."""
    model, found = load_model(default_model_dir(), ENGINE), list[int]()
    cache = model.new_cache()
    logits = model.forward(ForwardBatch.of([(ids, cache)], "cpu", all_logits=True))
    for _ in range(NUM_TOKENS):
        found.append(int(logits[-1].argmax()))
        logits = torch.cat((logits, model.forward(ForwardBatch.of([(found[-1:], cache)], "cpu"))))
    return found, logits.log_softmax(-1)


@pytest.mark.slow
def test_two_processes_under_torchrun_equal_one(
    ids: list[int], alone: tuple[list[int], torch.Tensor], tmp_path: Path
) -> None:
    """At night: the server's two processes, below, give the same tokens and log-probs, from the same ``join``."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    arguments = [json.dumps(ids), str(NUM_TOKENS), str(tmp_path)]
    subprocess.run([*torchrun, *arguments], env=environment, check=True, timeout=300, capture_output=True)
    (first, rows), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second == alone[0]
    assert torch.equal(rows, others), "not the same bits on both ranks"
    worst = (rows - alone[1]).abs().max().item()
    print(f"two processes: max |log-prob difference| {worst:.1e} over {len(rows)} rows")
    assert worst <= TOLERANCE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    arguments = ["--ranks", "2", "--rank-timeout", "120", "--max-model-len", "512", "--admin-key", "k" * 32]
    with served(log, arguments) as running:
        yield running


def test_the_server_answers_as_one_process(
    server: Served, ids: list[int], alone: tuple[list[int], torch.Tensor]
) -> None:
    """Twice, the second time from the prefix cache; and the plan names the exchanges."""
    asked = {"model": "tiny-v4", "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1}
    tokenizer = Tokenizer.from_folder(default_model_dir())
    for _ in range(2):
        reply = httpx.post(f"{server.url}/v1/completions", json=asked | {"ignore_eos": True}, timeout=120).json()
        (choice,) = reply["choices"]
        assert choice["text"] == tokenizer.join_bytes(alone[0], show_hidden=False).decode()
        wanted = [alone[1][len(ids) - 1 + n, token].item() for n, token in enumerate(alone[0])]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=TOLERANCE)
    told = httpx.get(f"{server.url}/debug/plan", headers={"Authorization": f"Bearer {'k' * 32}"}, timeout=30).json()
    slots = {one["slot"]: one["kernel"] for one in told["plan"]["companions"]}
    assert slots["layers.3.attn.reduce"] == "ref.all_reduce"
    assert told["plan"]["parallel"]["size"] == 2


def test_mixed_requests_are_all_answered(server: Served) -> None:
    """Greedy and sampled, whole and streamed, one cancelled: as the tool sends a thousand to a model of full shape."""
    requests = mixed_requests(20, most_prompt=40, most_answer=4, model="tiny-v4")
    assert sum(request.events > 0 for request in requests) == 1
    assert {bool(request.body["temperature"]) for request in requests} == {True, False}
    found = asyncio.run(send_all(int(server.url.rpartition(":")[2]), requests, 60.0))
    assert [fault for _, fault in found if fault] == []
    assert len(found) == 20


def test_a_killed_rank_ends_open_answers_and_the_server(server: Served) -> None:
    """Last: the server has ended after it."""
    asked: dict[str, Any] = {"model": "tiny-v4", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    lines, killed_at = list[str](), 0.0
    (rank, pid), *_ = server.ranks().items()
    assert rank == 1
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked | {"stream": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            lines.append(line)
            if len(lines) == 6:
                os.kill(pid, signal.SIGKILL)
                killed_at = time.monotonic()
    ended_s = time.monotonic() - killed_at
    assert any('"error"' in line and "rank 1 is lost" in line for line in lines[-4:]), lines[-4:]
    code = server.process.wait(60)
    print(f"a killed rank: the answer ended {ended_s:.1f} s later, the server {time.monotonic() - killed_at:.1f} s")
    assert code == 75
    assert ended_s < 6
    assert "rank 1 is lost, in " in server.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_ranks_with_their_own_requests_serve_as_one_process(
    ids: list[int], alone: tuple[list[int], torch.Tensor], tmp_path: Path
) -> None:
    """By data: the answer of one process, twice; mixed requests, some cancelled; then a rank is killed. At night: the
    server above has the same processes, and test_data_ranks the same division, among threads."""
    asked: dict[str, Any] = {"model": "tiny-v4", "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0}
    arguments = ["--ranks", "2", "--attention", "data", "--experts", "ids", "--rank-timeout", "120"]
    with served(tmp_path / "log", [*arguments, "--max-model-len", "512", "--max-num-seqs", "3"]) as server:
        wanted = Tokenizer.from_folder(default_model_dir()).join_bytes(alone[0], show_hidden=False).decode()
        for _ in range(2):
            reply = httpx.post(f"{server.url}/v1/completions", json=asked | {"ignore_eos": True}, timeout=120).json()
            assert reply["choices"][0]["text"] == wanted
        requests = mixed_requests(20, most_prompt=20, most_answer=3, model="tiny-v4")
        found = asyncio.run(send_all(int(server.url.rpartition(":")[2]), requests, 60.0))
        assert [fault for _, fault in found if fault] == []
        assert len(found) == 20
        lines = list[str]()
        asked |= {"max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 6:
                    os.kill(server.ranks()[1], signal.SIGKILL)
        assert any('"error"' in line and "rank 1 is lost" in line for line in lines[-4:]), lines[-4:]
        assert server.process.wait(60) == 75
