"""vLLM 0.32 as it answered: its recorded bodies, filled with the numbers of a real model in BF16 with FP8 keys."""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu.diff.other_server import serving

from ownpath.chat.effort import RELEASES
from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.markers import THINK_END
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

CHAT = "/v1/chat/completions"
_LINES = [json.loads(line) for line in (Path(__file__).parent / "vllm_answers.jsonl").read_text("utf-8").splitlines()]
RECORDED: dict[str, dict[str, Any]] = {line["name"]: line for line in _LINES if "name" in line}


@dataclass
class Vllm:
    """One server. model: None for one whose logits are NaN. thinks: unless a request says otherwise.

    parser: deepseek_v4 or deepseek_r1, which takes everything before ``</think>`` for reasoning.
    is_chatml: with a Jinja template that is not the model's.

    Beyond vLLM, servers that are like it. obeys: the field by which it is told not to think; it refuses the others if
    is_strict. tells_ids: the tokens of prompts. has_completions: or only a chat. scores_prompts: or ignores the wish.
    nan_status: of the refusal to write NaN. nan_id: a token in whose presence logits are NaN.
    """

    model: Model | None
    tokenizer: Tokenizer
    thinks: bool = True
    parser: str = "deepseek_v4"
    is_chatml: bool = False
    obeys: str = "chat_template_kwargs"
    is_strict: bool = False
    tells_ids: bool = True
    has_completions: bool = True
    scores_prompts: bool = True
    nan_status: int = 400
    nan_id: int | None = None
    answers: dict[tuple[tuple[int, ...], int], tuple[list[int], torch.Tensor]] = field(default_factory=dict)

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path not in (CHAT, "/v1/completions") or (path != CHAT and not self.has_completions):
            return 404, {"detail": "Not Found"}
        if self.is_strict and {"chat_template_kwargs", "thinking", "reasoning_effort"} & body.keys() - {self.obeys}:
            return 400, {"error": {"message": "unknown field", "type": "BadRequestError", "param": None, "code": 400}}
        prompt_ids = self.conversation(body) if path == CHAT else self.sent_ids(body["prompt"])
        if self.model is None or self.nan_id in prompt_ids:
            return self.without_numbers(path, body, prompt_ids)
        ids, rows_TV = self.answer(prompt_ids, body["max_tokens"])
        made = ids[len(prompt_ids) :]
        if path == CHAT:
            return 200, self.chat_body(body, prompt_ids, made, rows_TV)
        return 200, self.completion_body(body, prompt_ids, made, rows_TV)

    def sent_ids(self, prompt: Any) -> tuple[int, ...]:
        return tuple(prompt if isinstance(prompt, list) else self.tokenizer.encode_raw(prompt))

    def conversation(self, body: dict[str, Any]) -> tuple[int, ...]:
        texts = [message["content"] for message in body["messages"]]
        if self.is_chatml:
            return tuple(self.tokenizer.encode_raw("".join(f"<|im_start|>user\n{it}<|im_end|>\n" for it in texts)))
        wish = body.get(self.obeys)
        thinks = self.thinks and wish not in ("none", {"type": "disabled"})
        if isinstance(wish, dict):
            thinks = wish.get("thinking", wish.get("enable_thinking", thinks))
        setting = Setting(thinks, RELEASES["v4"]["max"] if thinks else "")
        messages = [Message("user", text) for text in texts]
        return tuple(self.tokenizer.encode_segments(encode_messages(messages, setting)))

    def answer(self, prompt_ids: tuple[int, ...], num: int) -> tuple[list[int], torch.Tensor]:
        """Prompt and greedy answer, and the log-probs after every position."""
        assert self.model is not None
        if (prompt_ids, num) not in self.answers:
            cache, new, ids, rows = self.model.new_cache(), list(prompt_ids), list(prompt_ids), []
            while len(ids) < len(prompt_ids) + num:
                logits = self.model.forward(ForwardBatch.of([(new, cache)], "cpu", all_logits=True))
                rows.append(logits[:, : self.tokenizer.num_tokens].float().log_softmax(-1))
                new = [int(rows[-1][-1].argmax())]
                ids += new
                if new[0] == self.tokenizer.eos_id:
                    break
            self.answers[prompt_ids, num] = ids, torch.cat(rows)
        return self.answers[prompt_ids, num]

    def completion_body(
        self, body: dict[str, Any], prompt_ids: tuple[int, ...], made: list[int], rows_TV: torch.Tensor
    ) -> dict[str, Any]:
        answer = copy.deepcopy(RECORDED["prompt_logprobs"]["body"])
        after = rows_TV[len(prompt_ids) - 1 :]
        choice = {
            "text": self.text(made),
            "finish_reason": self.reason(made),
            "token_ids": made,
            "prompt_token_ids": list(prompt_ids),
            "logprobs": {
                "text_offset": [0] * len(made),
                "tokens": [f"token_id:{i}" for i in made],
                "token_logprobs": [float(row[i]) for i, row in zip(made, after, strict=True)],
                "top_logprobs": [
                    {f"token_id:{i}": p for i, p in listed(row, token_id, body["logprobs"]).items()}
                    for token_id, row in zip(made, after, strict=True)
                ],
            },
            "prompt_logprobs": None,
        }
        if "prompt_logprobs" in body and self.scores_prompts:
            pairs = zip(prompt_ids[1:], rows_TV, strict=False)
            tops = [listed(row, token_id, body["prompt_logprobs"]) for token_id, row in pairs]
            entries = [{str(i): {"logprob": p, "rank": 1, "decoded_token": ""} for i, p in top.items()} for top in tops]
            choice["prompt_logprobs"] = [None, *entries]
        answer["choices"][0] |= choice
        answer["usage"]["prompt_tokens"] = len(prompt_ids)
        return answer

    def chat_body(
        self, body: dict[str, Any], prompt_ids: tuple[int, ...], made: list[int], rows_TV: torch.Tensor
    ) -> dict[str, Any]:
        answer = copy.deepcopy(RECORDED["chat_default"]["body"])
        end = self.tokenizer.special_id(THINK_END)
        opens_plain = self.parser == "deepseek_v4" and prompt_ids[-1] == end
        parts = [[], made] if opens_plain else split(made, end)
        content, reasoning = self.text(parts[1]), self.text(parts[0])
        choice: dict[str, Any] = {"finish_reason": self.reason(made), "token_ids": None, "logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = made
        if body.get("logprobs"):
            after = zip(made, rows_TV[len(prompt_ids) - 1 :], strict=True)
            choice["logprobs"] = {"content": [entry(row, i, body.get("top_logprobs", 0)) for i, row in after]}
        answer["choices"][0] |= choice
        answer["choices"][0]["message"] |= {"content": content or None, "reasoning": reasoning or None}
        tells = body.get("return_token_ids") and self.tells_ids
        answer["prompt_token_ids"] = list(prompt_ids) if tells else None
        answer["usage"] |= {"prompt_tokens": len(prompt_ids), "completion_tokens": len(made)}
        return answer

    def without_numbers(
        self, path: str, body: dict[str, Any], prompt_ids: tuple[int, ...]
    ) -> tuple[int, dict[str, Any]]:
        """Logits are NaN: refused wherever log-probs are asked for, else token 0 for ever."""
        if body.get("logprobs") or "prompt_logprobs" in body:
            return self.nan_status, RECORDED["nan_logprobs"]["body"] if self.nan_status == 400 else {"error": "failed"}
        answer = copy.deepcopy(RECORDED["nan_chat" if path == CHAT else "nan_plain"]["body"])
        answer["choices"][0]["token_ids"] = [0] * body["max_tokens"]
        if path != CHAT:
            answer["choices"][0]["prompt_token_ids"] = list(prompt_ids)
        answer["usage"] |= {"prompt_tokens": len(prompt_ids), "completion_tokens": body["max_tokens"]}
        return 200, answer

    def text(self, ids: list[int]) -> str:
        shown = (self.tokenizer.token_bytes(i) for i in ids if not self.tokenizer.is_hidden(i))
        return b"".join(shown).decode("utf-8", "ignore")

    def reason(self, made: list[int]) -> str:
        return "stop" if made[-1] == self.tokenizer.eos_id else "length"


def listed(row_V: torch.Tensor, token_id: int, num: int) -> dict[int, float]:
    """The likeliest tokens, and the token itself."""
    top = row_V.topk(num)
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) | {token_id: float(row_V[token_id])}


def entry(row_V: torch.Tensor, token_id: int, num: int) -> dict[str, Any]:
    """One of a chat's ``logprobs``, with ``return_tokens_as_token_ids``."""
    top = row_V.topk(num)
    named = [
        {"token": f"token_id:{i}", "logprob": value, "bytes": []}
        for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return {"token": f"token_id:{token_id}", "logprob": float(row_V[token_id]), "bytes": [], "top_logprobs": named}


def split(made: list[int], end: int) -> tuple[list[int], list[int]]:
    at = made.index(end) if end in made else len(made)
    return made[:at], made[at + 1 :]


@contextlib.contextmanager
def running(vllm: Vllm) -> Iterator[str]:
    """Serves it on a free loopback port; yields its URL."""

    def respond(method: str, path: str, headers: dict[str, str], raw: bytes) -> tuple[int, dict[str, str], bytes]:
        if method == "GET":
            status, answer = (200, {"data": [{"id": "tiny-v4"}]}) if path == "/v1/models" else (404, {})
        else:
            status, answer = vllm.respond(path, json.loads(raw))
        return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    with serving(respond) as url:
        yield url
