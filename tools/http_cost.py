"""Measures what HTTP costs: requests as vLLM's ``bench serve`` sends them, and the same ones put into the engine here.

    PYTHONPATH=src python tools/http_cost.py --device cuda --concurrency 1,8,32,64 --out http_cost.jsonl

The embedded model, or MODEL, is loaded twice: by ``ownpath serve`` and here. Prompts are random words of one length, as
/tokenize counts them; answers have one length (``ignore_eos``), greedy, streamed, with usage at the end. Both sides
keep as many requests running as ``--concurrency`` says, in rounds that take turns; the best round of each side counts.
Each answer by HTTP is compared with the one made here.
"""

import argparse
import asyncio
import json
import os
import queue
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from serve_rate import Server

from ownpath.bench.record import append_lines, provenance
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.engine.decoder import make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prompt_graphs import with_prompt_graphs
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import default_model_dir, load_model
from ownpath.startup import warm_up

MAX_NUM_SEQS = 64
WAIT_S = 600.0
BACKENDS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""vLLM's name of a way to ask -> its path."""


@dataclass
class Answered:
    """One answer: when it was asked for, when something came, in seconds; its text, and what went wrong."""

    started: float
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    error: str = ""


@dataclass(frozen=True)
class Load:
    """Requests of one round. prompts: texts; prompt_ids: what the engine is given for them."""

    backend: str
    prompts: list[str]
    prompt_ids: list[list[int]]
    num_tokens: int
    concurrency: int


class Connection:
    """A kept connection to the server, for one request after the other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: object) -> tuple[int, asyncio.StreamReader, int]:
        """Sends a request; returns the status, the stream behind the head, and the body's length, -1 if chunked."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        reader, writer = self._streams
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        lengths = [int(line.split(":")[1]) for line in lines if line.startswith("content-length:")]
        return int(lines[0].split()[1]), reader, lengths[0] if lengths else -1

    async def ask(self, path: str, body: object) -> dict[str, list[int]]:
        """Returns a whole JSON answer."""
        status, reader, length = await self.post(path, body)
        answer = await reader.readexactly(length)
        assert status == 200, answer
        found: dict[str, list[int]] = json.loads(answer)
        return found

    async def stream(self, path: str, body: object) -> Answered:
        """Returns a streamed answer, with a time for each event that has text."""
        answer = Answered(time.perf_counter())
        status, reader, length = await self.post(path, body)
        if status != 200:
            answer.error = (await reader.readexactly(length)).decode()
            return answer
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            for event in chunk[:-2].split(b"\n\n"):
                read_event(event, answer)
        await reader.readline()
        return answer


def read_event(event: bytes, answer: Answered) -> None:
    """Adds one event to an answer. A server writes whole events into a chunk."""
    if not event or event == b"data: [DONE]":
        return
    said = json.loads(event.removeprefix(b"data: "))
    if "error" in said:
        answer.error = str(said["error"])
    for choice in said.get("choices", ()):
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        if text or choice["finish_reason"]:  # the first event of a chat has a role and no token
            answer.times.append(time.perf_counter())
        answer.text += text
    if said.get("usage"):
        answer.num_tokens = said["usage"]["completion_tokens"]


def body_of(load: Load, prompt: str) -> dict[str, object]:
    """Returns a request as the benchmark client of vLLM 0.33 sends it."""
    common: dict[str, object] = {"model": "tiny-v4", "stream": True, "stream_options": {"include_usage": True}}
    common |= {"ignore_eos": True, "temperature": 0.0}
    if load.backend == "openai-chat":
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return common | {"messages": messages, "max_completion_tokens": load.num_tokens}
    own = {"prompt": prompt, "repetition_penalty": 1.0, "max_tokens": load.num_tokens, "logprobs": None}
    return common | own


async def ask_by_http(port: int, load: Load) -> list[Answered]:
    """Returns the answers, in the order of the prompts."""
    waiting = list(enumerate(load.prompts))[::-1]
    answers: dict[int, Answered] = {}

    async def work() -> None:
        connection = Connection(port)
        while waiting:
            idx, prompt = waiting.pop()
            answers[idx] = await connection.stream(BACKENDS[load.backend], body_of(load, prompt))

    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    return [answers[idx] for idx in range(len(load.prompts))]


def ask_in_process(engine: Engine, load: Load, tokenizer: Tokenizer) -> list[Answered]:
    """Returns the answers, in the order of the prompts. Their texts are written behind the last one."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: list[Answered] = []
    token_ids: list[list[int]] = [[] for _ in load.prompts]

    def submit(idx: int) -> None:
        answer, own_ids = Answered(time.perf_counter()), token_ids[idx]
        answers.append(answer)

        def hear(output: StepOutput) -> None:
            if output.token is not None:
                answer.times.append(time.perf_counter())
                own_ids.append(output.token.token_id)
            answer.error = output.error or ""
            if output.finish_reason is not None:
                ended.put(idx)

        params = SamplingParams(load.num_tokens, temperature=0.0, ignore_eos=True)
        engine.submit([Request(load.prompt_ids[idx], params, hear)])

    for idx in range(min(load.concurrency, len(load.prompts))):
        submit(idx)
    for _ in load.prompts:
        ended.get(timeout=WAIT_S)
        if len(answers) < len(load.prompts):
            submit(len(answers))
    for answer, own_ids in zip(answers, token_ids, strict=True):
        answer.num_tokens = len(own_ids)
        answer.text = tokenizer.join_bytes(own_ids, show_hidden=False).decode("utf-8", "replace")
    return answers


def summary(answers: Sequence[Answered]) -> dict[str, float]:
    """Returns a round's figures. The time between tokens is an answer's mean, the first token apart."""
    good = [answer for answer in answers if not answer.error and answer.times]
    start, end = min(answer.started for answer in answers), max(answer.times[-1] for answer in good)
    firsts = [answer.times[0] - answer.started for answer in good]
    between = [(answer.times[-1] - answer.times[0]) / max(answer.num_tokens - 1, 1) for answer in good]
    return {
        "errors": len(answers) - len(good),
        "tokens": sum(answer.num_tokens for answer in good),
        "tokens/s": sum(answer.num_tokens for answer in good) / (end - start),
        "first_token_ms": 1e3 * statistics.median(firsts),
        "time_per_token_ms": 1e3 * statistics.median(between),
    }


async def make_load(port: int, backend: str, args: argparse.Namespace, concurrency: int) -> Load:
    """Returns prompts of about ``args.input_len`` tokens by the server's own /tokenize, another text for each."""
    draw, connection = random.Random(concurrency), Connection(port)
    words = (Path(__file__).parent / "tiny" / "words.txt").read_text(encoding="utf-8").split()
    prompts, prompt_ids = [], []
    for _ in range(max(args.prompts, 2 * concurrency)):
        ids = (await connection.ask("/tokenize", {"prompt": " ".join(draw.choices(words, k=args.input_len))}))["tokens"]
        text = (await connection.ask("/detokenize", {"tokens": ids[: args.input_len]}))["prompt"]
        prompt = str(text).strip()
        asked: dict[str, object] = {"prompt": prompt}
        if backend == "openai-chat":
            asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]}
        prompts.append(prompt)
        prompt_ids.append((await connection.ask("/tokenize", asked))["tokens"])
    return Load(backend, prompts, prompt_ids, args.output_len, concurrency)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields a record for each way to ask, number of requests, and side."""
    folder = args.model or default_model_dir()
    max_len = args.input_len + args.output_len + 64
    config = replace(EngineConfig.for_device(args.device, max_len), max_num_seqs=MAX_NUM_SEQS)
    model, tokenizer = load_model(folder, config), Tokenizer.from_folder(folder)
    if args.device != "cpu":
        warm_up(model, config)
    decoder = make_decoder(model, config, tokenizer.num_tokens)
    engine = Engine(with_prompt_graphs(model, config), config, tokenizer.num_tokens, end_token_ids=(), decoder=decoder)
    server = Server(args.device, folder, max_len)
    engine.start()
    try:
        for backend in args.backends.split(","):
            for concurrency in map(int, args.concurrency.split(",")):
                load = asyncio.run(make_load(server.port, backend, args, concurrency))
                yield from compare(load, engine, tokenizer, server.port, args.rounds)
    finally:
        engine.stop()
        server.stop()


def compare(load: Load, engine: Engine, tokenizer: Tokenizer, port: int, rounds: int) -> Iterator[dict[str, object]]:
    """Yields both sides' best rounds; they take turns, and each goes first as often as the other."""
    found: dict[str, list[list[Answered]]] = {"http": [], "engine": []}
    for number in range(rounds):
        for how in ("http", "engine") if number % 2 == 0 else ("engine", "http"):
            by_http = how == "http"
            answers = asyncio.run(ask_by_http(port, load)) if by_http else ask_in_process(engine, load, tokenizer)
            found[how].append(answers)
    pairs = zip(found["http"][-1], found["engine"][-1], strict=True)
    same = sum(one.text == other.text for one, other in pairs)
    for how, all_rounds in found.items():
        best = max(map(summary, all_rounds), key=lambda figures: figures["tokens/s"])
        errors = sum(summary(answers)["errors"] for answers in all_rounds)
        yield {
            "how": how,
            "backend": load.backend,
            "concurrency": load.concurrency,
            "requests": len(load.prompts),
            "input_tokens": len(load.prompt_ids[0]),
            "output_tokens": load.num_tokens,
            "rounds": rounds,
            **best,
            "errors": errors,
            "equal_answers": same,
        }


def main() -> None:
    """Prints a line for each measurement and appends it to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder; the embedded model without one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="openai,openai-chat")
    parser.add_argument("--concurrency", default="1,8,32,64", help="numbers of requests at once")
    parser.add_argument("--prompts", type=int, default=16, help="requests of a round, at least twice those at once")
    parser.add_argument("--input-len", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    command = (
        f"python tools/http_cost.py --device {args.device} --concurrency {args.concurrency} --rounds {args.rounds}"
    )
    origin = provenance(args.device, args.commit, command, "wall clock") | {"cpus": os.cpu_count()}
    for record in measure(args):
        print(
            f"{record['backend']:11} {record['concurrency']:3} at once, {record['how']:6}: "
            f"{record['tokens/s']:9.1f} tokens/s, first token {record['first_token_ms']:8.2f} ms, then "
            f"{record['time_per_token_ms']:7.3f} ms each, {record['errors']} errors, "
            f"{record['equal_answers']} of {record['requests']} answers equal",
            flush=True,
        )
        if args.out is not None:
            append_lines(args.out, [{"bench": "http_cost", **record, **origin}])


if __name__ == "__main__":
    main()
