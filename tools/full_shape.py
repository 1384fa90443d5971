"""Serves a model of V4's full shape and random weights on several ranks, and sends it mixed requests.

    PYTHONPATH=src python tools/full_shape.py --ranks 2 --device cuda --requests 1000 --out full_shape.jsonl

A folder of a config.json and the embedded model's tokenizer is enough: ``ownpath serve --random-weights`` makes every
rank's part of the weights in its memory. Prompts have 1 to 2,000 tokens, as many of each magnitude; answers 1 to 64.
Half are greedy, a third is streamed, and every twentieth is cancelled after a few tokens. An answer counts as failed if
it is not as long as was asked for, or ends in an error; the exit code is 1 if any does, or the server ends badly.

``--write FOLDER`` writes that folder and ends: a MODEL for ``ownpath plan``, ``verify`` and ``serve`` with
``--random-weights``.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ownpath.bench.published import SHAPES
from ownpath.bench.record import append_lines, provenance
from ownpath.loading import default_model_dir

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
NUM_IDS = 2000
"""Ids below it are tokens of the embedded tokenizer."""
MOST_PROMPT, MOST_ANSWER = 2000, 64
MAX_MODEL_LEN = 2304
CANCELLED_EVERY = 20
AT_ONCE = 96
RANK_TIMEOUT_S = 60
COUNTED = ("graph_replays_total", "step_time_seconds_count", "prompt_tokens_total")
WORDS = re.compile(r"weights drawn|warning|lost|ownpath:|Error|ran: |decode steps")
"""Lines of the server that are repeated here."""


@dataclass(frozen=True)
class Mixed:
    """One request: its body, and after how many events of its stream it is cancelled; 0: never."""

    body: dict[str, object]
    events: int = 0


def mixed_requests(
    count: int, most_prompt: int, most_answer: int = MOST_ANSWER, model: str = "full-shape"
) -> list[Mixed]:
    """Draws requests to a model of this name, always the same."""
    draw, found = random.Random(0), []
    for idx in range(count):
        length = min(most_prompt, int(most_prompt ** draw.random() * 1.001))
        answer = draw.randint(1, most_answer)
        body: dict[str, object] = {"prompt": [draw.randrange(3, NUM_IDS) for _ in range(length)], "max_tokens": answer}
        body |= {"ignore_eos": True, "temperature": 0.0, "model": model}
        if draw.random() < 0.5:
            body |= {"temperature": draw.uniform(0.3, 1.5), "top_p": draw.uniform(0.5, 1.0), "seed": idx}
        is_cancelled = idx % CANCELLED_EVERY == CANCELLED_EVERY - 1
        if is_cancelled or draw.random() < 1 / 3:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        found.append(Mixed(body, draw.randint(1, 4) if is_cancelled else 0))
    return found


def write_folder(folder: Path, shape: str, layers: int | None) -> None:
    """Writes the config.json of a published shape, or of its first layers, without drafts, and a tokenizer."""
    fields = SHAPES[shape] | {"num_nextn_predict_layers": 0}
    if layers is not None:
        fields |= {"num_hidden_layers": layers, "compress_ratios": fields["compress_ratios"][:layers]}
        fields |= {"num_hash_layers": min(layers, fields["num_hash_layers"])}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    for name in TOKENIZER:
        shutil.copy(default_model_dir() / name, folder)


class Server:
    """``ownpath serve`` of a folder, by several ranks. log: what it prints. start_s: from the command to readiness."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log, start = folder / "log", time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "ownpath",
            "serve",
            str(folder),
            "--random-weights",
            "--ranks",
            str(args.ranks),
        ]
        command += ["--device", args.device, "--port", str(self.port), "--max-model-len", str(MAX_MODEL_LEN)]
        command += ["--max-num-seqs", str(args.max_num_seqs), "--served-model-name", "full-shape"]
        command += [
            "--log-requests",
            "off",
            "--rank-timeout",
            str(RANK_TIMEOUT_S),
            "--experts",
            args.experts,
            *shlex.split(args.serve_options),
        ]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while not self._is_ready():
                assert self._process.poll() is None, f"the server ended:\n{self.told()}"
                assert time.perf_counter() - start < args.start_limit, f"the server did not start:\n{self.told()}"
                time.sleep(0.05)
        except BaseException:
            self._process.kill()
            raise
        self.start_s = time.perf_counter() - start

    def told(self) -> str:
        """Returns what the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _is_ready(self) -> bool:
        try:
            return asyncio.run(ask(self.port, "GET", "/ready")).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """Returns a number of /metrics."""
        text = asyncio.run(ask(self.port, "GET", "/metrics")).decode()
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"ownpath_{name} ")))

    def stop(self) -> int:
        """Ends the server and returns its exit code."""
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()


async def open_answer(
    port: int, method: str, path: str, body: object = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
    await writer.drain()
    return reader, writer


async def ask(port: int, method: str, path: str, body: object = None) -> bytes:
    """Returns a whole answer, head and body."""
    reader, writer = await open_answer(port, method, path, body)
    try:
        return await reader.read()
    finally:
        writer.close()


async def send(port: int, request: Mixed) -> tuple[int, str]:
    """Sends a request; returns the tokens of its answer, and what is wrong with it, empty if nothing is."""
    if request.events:
        return await _cancel(port, request)
    answer = await ask(port, "POST", "/v1/completions", request.body)
    found = re.findall(rb'"completion_tokens":\s*(\d+)', answer)
    count = int(found[-1]) if found else 0
    is_whole = answer.startswith(b"HTTP/1.1 200") and b'"error"' not in answer and count == request.body["max_tokens"]
    return count, "" if is_whole else answer[-300:].decode("utf-8", "replace")


async def _cancel(port: int, request: Mixed) -> tuple[int, str]:
    """Reads the first events of a stream, and leaves."""
    reader, writer = await open_answer(port, "POST", "/v1/completions", request.body)
    count, read = 0, b""
    try:
        while count < request.events and (line := await reader.readline()):
            read += line
            count += line.startswith(b"data: {")
    finally:
        writer.close()
    is_fine = read.startswith(b"HTTP/1.1 200") and b'"error"' not in read
    return count, "" if is_fine else read[-300:].decode("utf-8", "replace")


async def send_all(port: int, requests: Sequence[Mixed], limit_s: float) -> list[tuple[int, str]]:
    """Sends requests, ``AT_ONCE`` at a time; none is begun after the limit."""
    waiting, found, end = list(requests)[::-1], list[tuple[int, str]](), time.perf_counter() + limit_s

    async def work() -> None:
        while waiting and time.perf_counter() < end:
            found.append(await send(port, waiting.pop()))

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return found


def gpu_memory() -> list[float]:
    """Returns the GB in use of each GPU, by the driver's tool; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    out = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return [round(int(line) * 2**20 / 1e9, 1) for line in out.split() if line.isdecimal()]


def serve_mixed(server: Server, args: argparse.Namespace) -> dict[str, object]:
    """Sends the requests and returns what came of them."""
    requests = mixed_requests(args.requests, args.most_prompt)
    before = tuple(map(server.metric, COUNTED))
    start = time.perf_counter()
    found = asyncio.run(send_all(server.port, requests, args.limit))
    seconds = time.perf_counter() - start
    faults = Counter(fault for _, fault in found if fault)
    tokens = sum(count for count, _ in found)
    return {
        "requests": len(requests),
        "answered": len(found) - faults.total(),
        "failed": faults.total(),
        "not_begun": len(requests) - len(found),
        "cancelled": sum(request.events > 0 for request in requests[: len(found)]),
        "first_fault": next(iter(faults), ""),
        "seconds": round(seconds, 2),
        "prompt_tokens": int(server.metric("prompt_tokens_total") - before[2]),
        "answer_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "steps": int(server.metric("step_time_seconds_count") - before[1]),
        "graph_replays": int(server.metric("graph_replays_total") - before[0]),
        "captured_late": int(server.metric("graphs_captured_total")),
        "compiled_late": int(server.metric("kernels_compiled_total")),
        "gpu_gb": gpu_memory(),
        "start_s": round(server.start_s, 1),
    }


def main() -> int:
    """Prints the server's remarks and a line of figures; 1 if an answer failed."""
    args = _arguments()
    if args.write is not None:
        args.write.mkdir(parents=True, exist_ok=True)
        write_folder(args.write, args.shape, args.layers)
        return 0
    with tempfile.TemporaryDirectory(prefix="full-shape-") as name:
        folder = Path(name)
        write_folder(folder, args.shape, args.layers)
        server = Server(folder, args)
        try:
            print(f"{args.shape}, {args.ranks} ranks: ready after {server.start_s:.1f} s; GB in use {gpu_memory()}")
            found = serve_mixed(server, args)
        finally:
            code = server.stop()
            print("\n".join(line for line in server.told().splitlines() if WORDS.search(line)), flush=True)
    found |= {"exit_code": code}
    print(json.dumps(found), flush=True)
    if args.out is not None:
        fixed = {name: getattr(args, name) for name in ("shape", "layers", "ranks", "experts", "max_num_seqs")}
        origin = provenance(args.device, args.commit, shlex.join(["python", *sys.argv]), "wall clock")
        append_lines(args.out, [{"bench": "full_shape", **fixed, **found, "cpus": os.cpu_count(), **origin}])
    return int(code != 0 or found["failed"] != 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="flash")
    parser.add_argument("--layers", type=int, help="the first layers only (default: all)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write config.json and tokenizer there, and end")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", choices=("width", "ids"), default="width")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--most-prompt", type=int, default=MOST_PROMPT)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no request is begun")
    parser.add_argument("--start-limit", type=float, default=300.0, help="seconds that the start may take")
    parser.add_argument("--serve-options", default="", help="more options of ownpath serve")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line")
    parser.add_argument("--commit", default="unknown", metavar="ID", help="recorded with the line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
