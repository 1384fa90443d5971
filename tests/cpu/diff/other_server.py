"""A server of another make around a real model: how it speaks (``Dialect``), and what is broken in it (``Fault``)."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

OVERLAP_S = 0.02


class Dialect(Enum):
    VLLM = "prompt_logprobs, token ids told"
    OPENAI = "echo, unknown fields refused, at most 5 likeliest tokens"
    LLAMA_CPP = "generated tokens only, as entries with ids; unknown fields ignored; /tokenize"
    TEXT_ONLY = "echo, but no token ids in prompts"
    CHAT_ONLY = "no completions"


class Fault(Enum):
    NONE = "intact"
    ALL_EOS = "the likeliest token is always EOS"
    ONLY_BOS = "BOS for ever, from frozen logits"
    FROZEN = "logits of another input"
    ONE_POSITION = "one position's logits at every position"
    TEMPLATE = "another chat template"
    SWALLOWED = "what is generated shows nowhere"
    ALL_REASONING = "what is generated shows as reasoning"
    STALE_CACHE = "a prompt's second answer misses all tokens but the last: the window was another request's"
    BATCH = "logits depend on what else is running"
    NAN = "logits are NaN"
    TOO_SURE = "logits four times as large"


Rows = dict[tuple[int, ...], torch.Tensor]


@dataclass
class Other:
    """One running server.

    rows: the model's logits of every sequence so far. asked: every request's path, headers and body.
    """

    model: Model
    tokenizer: Tokenizer
    dialect: Dialect
    fault: Fault
    url: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    rows: Rows = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_running: int = 0

    def logits_TV(self, ids: tuple[int, ...]) -> torch.Tensor:
        """Of every position, by the real model."""
        with self.lock:
            if ids not in self.rows:
                batch = ForwardBatch.of([(list(ids), self.model.new_cache())], "cpu", all_logits=True)
                self.rows[ids] = self.model.forward(batch)[:, : self.tokenizer.num_tokens]
            return self.rows[ids].clone()

    def broken_TV(
        self, ids: tuple[int, ...], prompt_ids: tuple[int, ...], is_warm: bool, in_company: bool
    ) -> torch.Tensor:
        """Returns the values that this server computes instead."""
        fault = self.fault
        if fault in (Fault.FROZEN, Fault.ONLY_BOS):
            rows = self.logits_TV((40, 41, 42))[-1].expand(len(ids), -1).clone()
            rows[:, :15] = -20.0 if fault is Fault.FROZEN else 0.0
            rows[:, 0] += 30.0 * (fault is Fault.ONLY_BOS)
            return rows
        rows = self.logits_TV(ids)
        if fault is Fault.ALL_EOS:
            rows[:, self.tokenizer.eos_id] = 30.0
        elif fault is Fault.ONE_POSITION:
            rows[:, :15] -= 50.0
            rows = rows[len(prompt_ids) - 1].expand(len(ids), -1)
        elif fault is Fault.STALE_CACHE and is_warm:
            last = len(prompt_ids) - 1
            rows = torch.cat([rows[:last], self.logits_TV(ids[last:])])
        elif fault is Fault.BATCH and in_company:
            rows = rows.roll(1, dims=-1)
        elif fault is Fault.NAN:
            rows[:, :] = torch.nan
        elif fault is Fault.TOO_SURE:
            rows *= 4.0
        return rows

    def answer_ids(
        self, prompt_ids: tuple[int, ...], num: int, in_company: bool
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Prompt and greedy answer, and the log-probs of every position."""
        is_warm = prompt_ids in self.seen
        self.seen.add(prompt_ids)
        ids = prompt_ids
        for _ in range(num):
            row = self.broken_TV(ids, prompt_ids, is_warm, in_company)[-1]
            ids = (*ids, int(row.nan_to_num().argmax()))
            if ids[-1] == self.tokenizer.eos_id:
                break
        return ids, self.broken_TV(ids, prompt_ids, is_warm, in_company).log_softmax(-1)

    def top(self, row_V: torch.Tensor, num: int) -> list[tuple[int, float]]:
        values, ids = row_V.topk(num)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def name(self, token_id: int) -> str:
        """As most servers do it: bytes that are no whole character become U+FFFD. OpenAI's spell them."""
        raw = self.tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        is_spelt = self.dialect is Dialect.OPENAI and "\ufffd" in text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if is_spelt else text

    def in_lists(
        self, ids: tuple[int, ...], rows: torch.Tensor, first: int, num_top: int, by_id: bool
    ) -> dict[str, Any]:
        """OpenAI's ``logprobs`` of ids[first:]."""
        name = (lambda i: f"token_id:{i}") if by_id else self.name
        places = range(first, len(ids))
        return {
            "tokens": [name(ids[n]) for n in places],
            "token_logprobs": [float(rows[n - 1, ids[n]]) if n else None for n in places],
            "top_logprobs": [{name(i): v for i, v in self.top(rows[n - 1], num_top)} if n else None for n in places],
        }

    def in_entries(self, ids: tuple[int, ...], rows: torch.Tensor, first: int, num_top: int) -> dict[str, Any]:
        """``logprobs`` as chat has them, with llama.cpp's ids."""

        def entry(token_id: int, value: float) -> dict[str, Any]:
            told = {} if self.dialect is Dialect.OPENAI else {"id": token_id}
            return {"token": self.name(token_id), "logprob": value, **told}

        return {
            "content": [
                entry(ids[n], float(rows[n - 1, ids[n]]))
                | {"top_logprobs": [entry(i, v) for i, v in self.top(rows[n - 1], num_top)]}
                for n in range(first, len(ids))
            ]
        }

    def completions(self, body: dict[str, Any], in_company: bool) -> tuple[int, Any]:
        dialect, sent, num_top = self.dialect, body["prompt"], body.get("logprobs", 0)
        if dialect is Dialect.CHAT_ONLY:
            return 404, {"detail": "Not Found"}
        if isinstance(sent, list) and dialect is Dialect.TEXT_ONLY:
            return 422, {"error": "prompt must be a string"}
        if dialect is Dialect.OPENAI and (num_top > 5 or "return_token_ids" in body):
            return 400, {"error": {"message": "not supported"}}
        prompt_ids = tuple(sent if isinstance(sent, list) else self.tokenizer.encode_raw(sent))
        ids, rows = self.answer_ids(prompt_ids, body["max_tokens"], in_company)
        by_id = dialect is Dialect.VLLM and bool(body.get("return_tokens_as_token_ids"))
        has_echo = bool(body.get("echo")) and dialect is not Dialect.LLAMA_CPP
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": self.reason(ids)}
        if dialect is Dialect.LLAMA_CPP:
            choice["logprobs"] = self.in_entries(ids, rows, len(prompt_ids), num_top)
        else:
            choice["logprobs"] = self.in_lists(ids, rows, 0 if has_echo else len(prompt_ids), num_top, by_id)
        if dialect is Dialect.VLLM:
            choice |= {"token_ids": list(ids[len(prompt_ids) :]), "prompt_token_ids": list(prompt_ids)}
        if dialect is Dialect.VLLM and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [
                None if n == 0 else self.prompt_entry(rows[n - 1], prompt_ids[n], body["prompt_logprobs"])
                for n in range(len(prompt_ids))
            ]
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt_ids)}}

    def prompt_entry(self, row_V: torch.Tensor, token_id: int, num_top: int) -> dict[str, Any]:
        entries = dict([*self.top(row_V, num_top), (token_id, float(row_V[token_id]))])
        return {str(i): {"logprob": v, "rank": 1, "decoded_token": self.name(i)} for i, v in entries.items()}

    def chat(self, body: dict[str, Any], in_company: bool) -> tuple[int, Any]:
        if self.dialect is Dialect.OPENAI and ("return_token_ids" in body or body.get("top_logprobs", 0) > 5):
            return 400, {"error": {"message": "not supported"}}
        prompt_ids = self.template(body["messages"][-1]["content"])
        ids, rows = self.answer_ids(prompt_ids, body["max_tokens"], in_company)
        made = ids[len(prompt_ids) :]
        text = "".join(self.name(i) for i in made if not self.tokenizer.is_hidden(i))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.fault in (Fault.SWALLOWED, Fault.ALL_REASONING):
            message["content"] = None
        if self.fault is Fault.ALL_REASONING:
            message["reasoning_content"] = text
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": self.reason(ids)}
        if body.get("logprobs"):
            choice["logprobs"] = self.in_entries(ids, rows, len(prompt_ids), body.get("top_logprobs", 0))
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(made)}
        if self.dialect is Dialect.VLLM:
            choice["token_ids"] = list(made)
            return 200, {"choices": [choice], "usage": usage, "prompt_token_ids": list(prompt_ids)}
        return 200, {"choices": [choice], "usage": usage}

    def template(self, text: str) -> tuple[int, ...]:
        if self.fault is Fault.TEMPLATE:
            return tuple(self.tokenizer.encode_raw(f"USER: {text}\nASSISTANT:"))
        return tuple(self.tokenizer.encode_segments(encode_messages([Message("user", text)])))

    def tokenize(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.dialect is not Dialect.LLAMA_CPP and self.dialect is not Dialect.TEXT_ONLY:
            return 404, {}
        if "content" not in body:
            return 200, {"tokens": list(self.template(body["messages"][-1]["content"]))}
        return 200, {"tokens": self.tokenizer.encode_raw(body["content"])}

    def reason(self, ids: tuple[int, ...]) -> str:
        return "stop" if ids[-1] == self.tokenizer.eos_id else "length"

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        routes = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat}
        if path not in routes:
            return self.tokenize(body) if path == "/tokenize" else (404, {})
        with self.lock:
            self.num_running += 1
        try:
            if self.fault is Fault.BATCH:
                time.sleep(OVERLAP_S)
            return routes[path](body, in_company=self.num_running > 1)
        finally:
            if self.fault is Fault.BATCH:
                time.sleep(OVERLAP_S)
            with self.lock:
                self.num_running -= 1


@contextlib.contextmanager
def serving(respond: Any) -> Iterator[str]:
    """``respond(method, path, headers, body) -> (status, headers, bytes)`` on a free loopback port; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, data = respond(self.command, self.path, dict(self.headers), raw)
            with contextlib.suppress(ConnectionError):  # who did not wait is gone
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def other_server(
    model: Model, tokenizer: Tokenizer, dialect: Dialect, fault: Fault = Fault.NONE, rows: Rows | None = None
) -> Iterator[Other]:
    """The server, running. rows: what servers of the same model share, to compute a sequence once."""
    other = Other(model, tokenizer, dialect, fault, rows={} if rows is None else rows)

    def respond(method: str, path: str, headers: dict[str, str], raw: bytes) -> tuple[int, dict[str, str], bytes]:
        body = json.loads(raw) if raw else None
        other.asked.append((path, headers, body))
        if method == "GET":
            status, answer = (200, {"data": [{"id": "other"}]}) if path == "/v1/models" else (404, {})
        else:
            status, answer = other.respond(path, body)
        return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    with serving(respond) as url:
        other.url = url
        yield other
