"""``/v1/chat/completions``: one generator of chunks; the answer in one piece is those chunks folded."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from ownpath.chat.parts import (
    AnswerPart,
    CallInReasoning,
    Content,
    MalformedMarkup,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)
from ownpath.chat.tokenizer import Tokenizer
from ownpath.engine.request import SamplingParams, ScoredToken
from ownpath.server.fingerprint import AnswerSource
from ownpath.server.generation import Generation
from ownpath.server.prompt_scores import prompt_entries
from ownpath.server.protocol import ChatRequest
from ownpath.server.sse import JsonObject
from ownpath.server.token_naming import TokenNaming

_REASONING = ("reasoning_content", "reasoning")
"""DeepSeek's name for the reasoning, and vLLM's: clients read one or the other."""
_MARKS = ("malformed", "call_in_reasoning", "empty_content", "stop_reason")
"""The marks of a choice: each is said once, with the chunk that brings it."""


def sampling_params(request: ChatRequest, max_tokens: int) -> list[SamplingParams]:
    """Builds the parameters of all answers. max_tokens: the limit once it is fitted to the context."""
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    scored = [request.prompt_logprobs] + [None] * (request.n - 1)  # all have the same prompt
    return [request.sampling(max_tokens, num_logprobs, num, answer) for answer, num in enumerate(scored)]


async def chat_chunks(
    request: ChatRequest, generation: Generation, tokenizer: Tokenizer, source: AnswerSource, level: str | None
) -> AsyncIterator[JsonObject]:
    """Yields the answer as ``chat.completion.chunk`` objects; the last one has the usage and no choices.

    level: of the reasoning effort; None without thinking.
    """
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": source.model_id,
        "system_fingerprint": source.fingerprint,
    }
    naming = TokenNaming(tokenizer, request.return_tokens_as_token_ids)
    role = {"role": "assistant", "content": ""}
    opening: JsonObject = {**head, "choices": [_choice(0, role)]}
    if level is not None:
        opening["reasoning_effort"] = level
    if request.return_token_ids:
        opening["prompt_token_ids"] = generation.prompts[0].ids
    yield opening
    for index in range(1, request.n):
        yield {**head, "choices": [_choice(index, role)]}
    async for delta in generation.deltas():
        choice = _choice(delta.index, message_delta(delta.parts), delta.finish_reason)
        for part in delta.parts:
            if isinstance(part, MalformedMarkup):
                choice["malformed"] = part.reason
            elif isinstance(part, CallInReasoning):
                choice["call_in_reasoning"] = True
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if delta.empty_content is not None:
            choice["empty_content"] = delta.empty_content.value
        if request.logprobs and delta.tokens:
            entries = [logprob_entry(token, naming) for token in delta.tokens]
            choice["logprobs"] = {"content": entries, "refusal": None}
        if request.return_token_ids and delta.tokens:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
        if delta.prompt:
            # Many names are looked up off the event loop.
            scores = await asyncio.to_thread(prompt_entries, delta.prompt, request.prompt_logprobs or 0, tokenizer)
            yield {**head, "choices": [choice], "prompt_logprobs": scores}
        elif choice != _choice(delta.index, {}):
            yield {**head, "choices": [choice]}
    yield {**head, "choices": [], "usage": chat_usage(generation)}


def chat_usage(generation: Generation) -> JsonObject:
    """Counts tokens so far, and how many of them were reasoning."""
    details = {"reasoning_tokens": generation.num_reasoning_tokens}
    return {**generation.usage(), "completion_tokens_details": details}


class ChatFold:
    """Folds the chunks of one answer into the ``chat.completion`` object. Each chunk costs the same, however many."""

    def __init__(self) -> None:
        self._answer: JsonObject = {}
        self._choices: dict[int, _MessageFold] = {}

    def add(self, chunk: JsonObject) -> None:
        """Takes the next chunk."""
        self._answer |= chunk
        for part in chunk["choices"]:
            index = part["index"]
            if index not in self._choices:
                self._choices[index] = _MessageFold(index)
            self._choices[index].add(part)

    def whole(self) -> JsonObject:
        """Returns the answer."""
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return self._answer | {"object": "chat.completion", "choices": choices}


class _MessageFold:
    """Folds the parts of one choice."""

    def __init__(self, index: int) -> None:
        self._choice: JsonObject = {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
        # Pieces of text, joined at the end: adding to a string copies it.
        self._texts: dict[str, list[str]] = {"content": []}
        self._calls: list[tuple[JsonObject, list[str]]] = []

    def add(self, part: JsonObject) -> None:
        """Takes the next part."""
        choice = self._choice
        self._add_delta(part["delta"])
        choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
        if part["logprobs"] is not None:
            choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
            choice["logprobs"]["content"] += part["logprobs"]["content"]
        if "token_ids" in part:
            choice.setdefault("token_ids", []).extend(part["token_ids"])
        choice |= {name: part[name] for name in _MARKS if name in part}

    def whole(self) -> JsonObject:
        """Returns the choice."""
        message: JsonObject = {"role": "assistant", "content": "", "refusal": None} | dict.fromkeys(_REASONING)
        message |= {name: "".join(pieces) for name, pieces in self._texts.items()}
        if self._calls:
            message["tool_calls"] = [_called(head, pieces) for head, pieces in self._calls]
            message["content"] = message["content"] or None
        return self._choice | {"message": message}

    def _add_delta(self, delta: JsonObject) -> None:
        for name in ("content", *_REASONING):
            if name in delta:
                self._texts.setdefault(name, []).append(delta[name])
        for call in delta.get("tool_calls", []):
            if "id" in call:
                self._calls.append((call, []))
            self._calls[call["index"]][1].append(call["function"]["arguments"])


def _called(head: JsonObject, pieces: list[str]) -> JsonObject:
    function = head["function"] | {"arguments": "".join(pieces)}
    return {"id": head["id"], "type": head["type"], "function": function}


def message_delta(parts: Sequence[AnswerPart]) -> JsonObject:
    """Returns what steps add to the message, in the shape of a streamed delta."""
    delta: JsonObject = {}
    calls: dict[int, JsonObject] = {}
    for part in parts:
        if isinstance(part, Content):
            delta["content"] = delta.get("content", "") + part.text
        elif isinstance(part, Reasoning):
            for name in _REASONING:
                delta[name] = delta.get(name, "") + part.text
        elif isinstance(part, ToolCallStart):
            function = {"name": part.name, "arguments": ""}
            head = {"index": part.index, "id": f"call_{uuid.uuid4().hex}", "type": "function"}
            calls[part.index] = {**head, "function": function}
        elif isinstance(part, ToolCallArguments):
            call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.text
    return delta | ({"tool_calls": list(calls.values())} if calls else {})


def _choice(index: int, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def logprob_entry(token: ScoredToken, naming: TokenNaming) -> JsonObject:
    """Returns a token with its log-probability and its likeliest rivals."""

    def entry(token_id: int, logprob: float | None) -> JsonObject:
        data = naming.tokenizer.token_bytes(token_id)
        return {"token": naming.name(token_id), "logprob": logprob, "bytes": list(data)}

    top = [entry(token_id, logprob) for token_id, logprob in token.top_logprobs]
    return entry(token.token_id, token.logprob) | {"top_logprobs": top}
