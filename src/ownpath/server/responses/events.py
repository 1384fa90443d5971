"""The answer of ``/v1/responses`` as events; the answer in one piece is the response that the last one holds."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from ownpath.chat.parts import (
    CallInReasoning,
    Content,
    MalformedMarkup,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)
from ownpath.engine.request import FinishReason
from ownpath.server.chat import chat_usage, logprob_entry
from ownpath.server.errors import ApiError
from ownpath.server.fingerprint import AnswerSource
from ownpath.server.generation import Delta, Generation
from ownpath.server.offers import ToolKey
from ownpath.server.responses.parts import (
    AnswerItem,
    CallItem,
    CustomCallItem,
    MessageItem,
    ReasoningItem,
)
from ownpath.server.responses.request import ENCRYPTED, AskedResponse
from ownpath.server.sse import JsonObject
from ownpath.server.token_naming import TokenNaming


class ResponseWriter:
    """Writes one answer. response: the whole of it as it is now."""

    def __init__(self, asked: AskedResponse, generation: Generation, source: AnswerSource, naming: TokenNaming) -> None:
        self._asked, self._generation, self._naming = asked, generation, naming
        self.response = _begun(asked, source)
        self._numbers = itertools.count()
        self._open: AnswerItem | None = None
        # Tokens whose text is still held back.
        self._entries: list[JsonObject] = []

    async def events(self) -> AsyncIterator[JsonObject]:
        """Yields the events of the answer. Errors: ApiError 500 or 504."""
        for name in ("created", "in_progress"):
            yield self._event(name, {"response": dict(self.response)})
        async for delta in self._generation.deltas():
            for event in self._add(delta):
                yield event
            if delta.finish_reason is not None:
                for event in self._end(delta):
                    yield event

    def failure(self, error: ApiError) -> Iterator[JsonObject]:
        """Yields the events of a failure: the error itself, and the response that it ended."""
        told = error.told()
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": told["message"]}}
        self.response["usage"] = _usage(self._generation)
        yield {
            "type": "error",
            "sequence_number": next(self._numbers),
            **{name: told[name] for name in ("code", "message", "param")},
        }
        yield self._event("failed", {"response": self.response})

    def _add(self, delta: Delta) -> Iterator[JsonObject]:
        if self._asked.own.wants_logprobs:
            self._entries += [logprob_entry(it, self._naming) for it in delta.tokens if self._is_text(it.token_id)]
        for part in delta.parts:
            if isinstance(part, MalformedMarkup):
                self.response["malformed"] = part.reason
            elif isinstance(part, CallInReasoning):
                self.response["call_in_reasoning"] = True
            else:
                yield from self._write(part)

    def _write(self, part: Reasoning | Content | ToolCallStart | ToolCallArguments) -> Iterator[JsonObject]:
        if isinstance(part, ToolCallStart):
            yield from self._begin(self._call(part.name))
            return
        if isinstance(part, Content) and not isinstance(self._open, MessageItem):
            yield from self._begin(MessageItem())
        elif isinstance(part, Reasoning) and not isinstance(self._open, ReasoningItem):
            own = self._asked.own
            yield from self._begin(ReasoningItem(is_summary=own.summarizes, carries=ENCRYPTED in own.include))
        assert self._open is not None
        entries = _last_entries(self._entries, part.text) if isinstance(part, Content) else []
        self._entries = []
        yield from self._told(self._open.more(part.text, entries))

    def _is_text(self, token_id: int) -> bool:
        return not self._asked.chat.skip_special_tokens or not self._naming.tokenizer.is_hidden(token_id)

    def _call(self, name: str) -> AnswerItem:
        key = self._asked.offer.keys.get(name, ToolKey("function", name))
        return CustomCallItem(key) if key.kind == "custom" else CallItem(key)

    def _begin(self, item: AnswerItem) -> Iterator[JsonObject]:
        yield from self._close("completed")
        self._open = item
        yield self._item_event("added", item.item("in_progress"))
        yield from self._told(item.opening())

    def _close(self, status: str) -> Iterator[JsonObject]:
        item = self._open
        if item is None:
            return
        yield from self._told(item.closing())
        done = item.item(item.last_status(status))
        yield self._item_event("done", done)
        self.response["output"].append(done)
        self._open = None

    def _end(self, delta: Delta) -> Iterator[JsonObject]:
        status = "incomplete" if delta.finish_reason == FinishReason.LENGTH.value else "completed"
        yield from self._close(status)
        self.response |= {"status": status, "usage": _usage(self._generation)}
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        if delta.empty_content is not None:
            self.response["empty_content"] = delta.empty_content.value
        yield self._event(status, {"response": self.response})

    def _told(self, told: Iterator[tuple[str, JsonObject]]) -> Iterator[JsonObject]:
        assert self._open is not None
        place = {"item_id": self._open.item_id, "output_index": len(self.response["output"])}
        for name, fields in told:
            yield self._event(name, place | fields)

    def _item_event(self, end: str, item: JsonObject) -> JsonObject:
        return self._event(f"output_item.{end}", {"output_index": len(self.response["output"]), "item": item})

    def _event(self, name: str, fields: JsonObject) -> JsonObject:
        return {"type": f"response.{name}", "sequence_number": next(self._numbers), **fields}


def _last_entries(entries: list[JsonObject], text: str) -> list[JsonObject]:
    """Returns the last of the entries, whose tokens make up a text; before them stand marks of the structure."""
    num_bytes, first = len(text.encode()), len(entries)
    while num_bytes > 0 and first > 0:
        first -= 1
        num_bytes -= len(entries[first]["bytes"])
    return entries[first:]


def _begun(asked: AskedResponse, source: AnswerSource) -> JsonObject:
    """Returns the response before anything is written: what was asked for, in effect."""
    own, chat = asked.own, asked.chat
    wanted = own.text.format or {"type": "text"}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": own.instructions,
        "max_output_tokens": own.max_output_tokens,
        "max_tool_calls": None,
        "metadata": own.metadata,
        "model": source.model_id,
        "output": [],
        "parallel_tool_calls": chat.parallel_tool_calls,
        "previous_response_id": None,
        "prompt_cache_key": own.prompt_cache_key,
        "reasoning": {"effort": own.reasoning.effort, "summary": own.reasoning.summary},
        "safety_identifier": own.safety_identifier,
        "service_tier": "default",
        "store": False,
        "system_fingerprint": source.fingerprint,
        "temperature": chat.temperature,
        "text": {"format": wanted, "verbosity": "medium"},
        "tool_choice": own.tool_choice,
        "tools": asked.offer.told,
        "top_logprobs": own.top_logprobs or 0,
        "top_p": chat.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": own.user,
    }


def _usage(generation: Generation) -> JsonObject:
    usage = chat_usage(generation)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": generation.num_reasoning_tokens},
        "total_tokens": usage["total_tokens"],
    }
