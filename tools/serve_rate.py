"""Measures the embedded model's greedy tokens per second: the engine in this process, then ``ownpath serve`` over HTTP.

    PYTHONPATH=src python tools/serve_rate.py --device cuda --requests 1,8,32,64 --tokens 300 --out rates.jsonl

Every request is submitted by itself, as a server does, and none ends before it has all its tokens. The server's start
is timed too, from the command to the first answer of /ready, with whatever the caches on disk hold: run it twice for a
warm start.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ownpath.bench.record import append_lines, provenance
from ownpath.config import EngineConfig
from ownpath.engine.decoder import make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prompt_graphs import with_prompt_graphs
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import default_model_dir, load_model
from ownpath.startup import warm_up

START_LIMIT_S = 120.0
MAX_NUM_SEQS = 64
ROUNDS = 3
"""Rounds of a number of requests; the last one counts."""


class Counted:
    """Counts a request's tokens, until it has ended."""

    def __init__(self) -> None:
        self.num_tokens, self._ended = 0, threading.Event()

    def __call__(self, output: StepOutput) -> None:
        self.num_tokens += output.token is not None
        if output.finish_reason is not None:
            self._ended.set()

    def wait(self) -> int:
        """Returns the number of tokens once the request has ended."""
        assert self._ended.wait(START_LIMIT_S), "a request did not end"
        return self.num_tokens


def prompt_of(idx: int) -> list[int]:
    """Returns a short prompt, another one for each request."""
    return [3 + idx, 5, 7, 9]


def engine_rates(device: str, counts: Sequence[int], num_tokens: int) -> Iterator[tuple[int, float]]:
    """Yields (requests, tokens per second) through the engine; no token ends a request."""
    config = replace(EngineConfig.for_device(device, 1024), max_num_seqs=MAX_NUM_SEQS)
    model = load_model(default_model_dir(), config)
    if device != "cpu":
        warm_up(model, config)
    num_vocab = model.config.vocab_size
    engine = Engine(
        with_prompt_graphs(model, config),
        config,
        num_vocab,
        end_token_ids=(),
        decoder=make_decoder(model, config, num_vocab),
    )
    engine.start()
    try:
        for count in counts:
            for _ in range(ROUNDS):
                heard = [Counted() for _ in range(count)]
                start = time.perf_counter()
                for idx, one in enumerate(heard):
                    engine.submit([Request(prompt_of(idx), SamplingParams(num_tokens, temperature=0.0), one)])
                total = sum(one.wait() for one in heard)
                rate = total / (time.perf_counter() - start)
            yield count, rate
    finally:
        engine.stop()


class Server:
    """``ownpath serve`` of a model, named tiny-v4, on a free port. start_s: seconds from the command to readiness.

    model: its folder; the embedded model without one. tree: a source tree to run instead of this one.
    """

    def __init__(
        self, device: str, model: Path | None = None, max_model_len: int = 1024, tree: Path | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        folder = [] if model is None else [str(model)]
        command = [sys.executable, "-m", "ownpath", "serve", *folder, "--device", device]
        command += ["--port", str(self.port), "--max-model-len", str(max_model_len)]
        command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--served-model-name", "tiny-v4", "--log-requests", "off"]
        start = time.perf_counter()
        source = {} if tree is None else {"PYTHONPATH": str(tree.resolve() / "src")}
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | source)
        self.pid = self._process.pid
        while not self._is_ready():
            assert self._process.poll() is None, "the server ended"
            assert time.perf_counter() - start < START_LIMIT_S, "the server did not start"
            time.sleep(0.02)
        self.start_s = time.perf_counter() - start

    def _is_ready(self) -> bool:
        try:
            status, *_ = asyncio.run(exchange(self.port, "GET", "/ready", None)).split(b"\r\n", 1)
        except OSError:
            return False
        return b" 200" in status

    def stop(self) -> None:
        """Ends the server."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)


async def exchange(port: int, method: str, path: str, body: object) -> bytes:
    """Returns a whole answer, head and body. One connection for each request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    answer = await reader.read()
    writer.close()
    return answer


async def http_rate(port: int, count: int, num_tokens: int, stream: bool) -> float:
    """Returns tokens per second of ``count`` completions at once, by the answers' own usage."""

    async def tokens_of(idx: int) -> int:
        body: dict[str, object] = {"model": "tiny-v4", "prompt": prompt_of(idx), "max_tokens": num_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = await exchange(port, "POST", "/v1/completions", body)
        found = re.findall(rb'"completion_tokens":\s*(\d+)', answer)
        assert found, answer[-400:]
        return int(found[-1])

    start = time.perf_counter()
    total = sum(await asyncio.gather(*(tokens_of(idx) for idx in range(count))))
    return total / (time.perf_counter() - start)


def http_rates(device: str, counts: Sequence[int], num_tokens: int) -> Iterator[tuple[str, int, float]]:
    """Yields ("start", 0, seconds), then (kind of answer, requests, tokens per second)."""
    server = Server(device)
    try:
        yield "start", 0, server.start_s
        for stream in (False, True):
            for count in counts:
                for _ in range(ROUNDS):
                    rate = asyncio.run(http_rate(server.port, count, num_tokens, stream))
                yield "stream" if stream else "whole", count, rate
    finally:
        server.stop()


def main() -> None:
    """Prints a line for each measurement and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", default="1,8,32,64", help="numbers of requests at once")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each request at most")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    counts = [int(count) for count in args.requests.split(",")]
    command = f"python tools/serve_rate.py --device {args.device} --requests {args.requests} --tokens {args.tokens}"
    origin = provenance(args.device, args.commit, command, "wall clock") | {"cpus": os.cpu_count()}

    def tell(how: str, count: int, value: float) -> None:
        unit = "s" if how == "start" else "tokens/s"
        print(f"{how:7} {count:3} requests: {value:9.1f} {unit}", flush=True)
        if args.out is not None:
            append_lines(args.out, [{"bench": "serve_rate", "how": how, "requests": count, unit: value, **origin}])

    for found in http_rates(args.device, counts, args.tokens):
        tell(*found)
    for count, rate in engine_rates(args.device, counts, args.tokens):
        tell("engine", count, rate)


if __name__ == "__main__":
    main()
