"""The answer of ``/v1/messages`` as events; the answer in one piece is the message that they build."""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from ownpath.chat.parts import (
    CallInReasoning,
    Content,
    MalformedMarkup,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
)
from ownpath.server.carried import carry, sign
from ownpath.server.chat import chat_usage
from ownpath.server.errors import ApiError
from ownpath.server.generation import Delta, Generation
from ownpath.server.sse import JsonObject

PING: JsonObject = {"type": "ping"}
PING_EVERY_S = 10.0
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass
class AnswerBlock:
    """A block that is being written. empty: as it begins. text_field: the field that the text is."""

    empty: JsonObject
    text_field: str
    pieces: list[str] = field(default_factory=list)

    @property
    def written(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def more(self, text: str) -> JsonObject:
        """Takes more text and returns the delta that tells it; an empty one tells nothing."""
        self.pieces.append(text)
        return {"type": f"{self.text_field}_delta", self.text_field: text}

    def last(self) -> JsonObject:
        """Returns the last delta; an empty one tells nothing."""
        return {}

    def whole(self) -> JsonObject:
        """Returns the block."""
        return self.empty | {self.text_field: self.written}


class ThinkingBlock(AnswerBlock):
    """The reasoning, with its signature at the end. is_omitted: its text is in the signature alone."""

    def __init__(self, *, is_omitted: bool) -> None:
        super().__init__({"type": "thinking", "thinking": "", "signature": ""}, "thinking")
        self._is_omitted = is_omitted

    def more(self, text: str) -> JsonObject:
        delta = super().more(text)
        return {} if self._is_omitted else delta

    def last(self) -> JsonObject:
        return {"type": "signature_delta", "signature": self._signature()}

    def whole(self) -> JsonObject:
        shown = "" if self._is_omitted else self.written
        return self.empty | {"thinking": shown, "signature": self._signature()}

    def _signature(self) -> str:
        return carry(self.written) if self._is_omitted else sign(self.written)


class CallBlock(AnswerBlock):
    """A call of a tool."""

    def __init__(self, name: str) -> None:
        head = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": {}}
        super().__init__(head, "input_json")

    def more(self, text: str) -> JsonObject:
        self.pieces.append(text)
        return {"type": "input_json_delta", "partial_json": text}

    def whole(self) -> JsonObject:
        """Returns the block. Arguments that are no object are one, as chat's are for the model that reads them."""
        try:
            value = json.loads(self.written)
        except (ValueError, RecursionError):
            value = self.written
        return self.empty | {"input": value if isinstance(value, dict) else {"arguments": value}}


class MessageWriter:
    """Writes one answer. message: the whole of it as it is now. fills_context: its limit is the context's end.

    omits_reasoning: the reasoning's text is left out.
    """

    def __init__(
        self, model_id: str, generation: Generation, *, omits_reasoning: bool, fills_context: bool, manages: bool
    ) -> None:
        self._generation = generation
        self._omits_reasoning, self._fills_context = omits_reasoning, fills_context
        self._open: AnswerBlock | None = None
        self._marks: JsonObject = {}
        self.message: JsonObject = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model_id,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage(generation),
        }
        if manages:
            self.message["context_management"] = {"applied_edits": []}

    async def events(self) -> AsyncIterator[JsonObject]:
        """Yields the events of the answer. Errors: ApiError 500 or 504."""
        yield {"type": "message_start", "message": dict(self.message)}
        yield PING
        async for delta in self._generation.deltas():
            for event in self._add(delta):
                yield event
            if delta.finish_reason is not None:
                for event in self._end(delta):
                    yield event

    def failure(self, error: ApiError) -> Iterator[JsonObject]:
        """Yields the event of a failure."""
        yield error.body_for_messages(None)

    def _add(self, delta: Delta) -> Iterator[JsonObject]:
        for part in delta.parts:
            if isinstance(part, MalformedMarkup):
                self._marks["malformed"] = part.reason
            elif isinstance(part, CallInReasoning):
                self._marks["call_in_reasoning"] = True
            else:
                yield from self._write(part)

    def _write(self, part: Reasoning | Content | ToolCallStart | ToolCallArguments) -> Iterator[JsonObject]:
        if isinstance(part, ToolCallStart):
            yield from self._begin(CallBlock(part.name))
            return
        kind = self._open.empty["type"] if self._open is not None else None
        if isinstance(part, Content) and kind != "text":
            yield from self._begin(AnswerBlock({"type": "text", "text": ""}, "text"))
        elif isinstance(part, Reasoning) and kind != "thinking":
            yield from self._begin(ThinkingBlock(is_omitted=self._omits_reasoning))
        assert self._open is not None
        yield from self._delta(self._open.more(part.text))

    def _begin(self, block: AnswerBlock) -> Iterator[JsonObject]:
        yield from self._close()
        self._open = block
        yield {"type": "content_block_start", "index": self._index, "content_block": block.empty}

    def _close(self) -> Iterator[JsonObject]:
        if self._open is None:
            return
        yield from self._delta(self._open.last())
        yield {"type": "content_block_stop", "index": self._index}
        self.message["content"].append(self._open.whole())
        self._open = None

    def _delta(self, delta: JsonObject) -> Iterator[JsonObject]:
        if delta:
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def _end(self, delta: Delta) -> Iterator[JsonObject]:
        yield from self._close()
        if delta.empty_content is not None:
            self._marks["empty_content"] = delta.empty_content.value
        told = {"stop_reason": self._reason(delta), "stop_sequence": None} | self._marks
        if isinstance(delta.stop_reason, str):
            told["stop_sequence"] = delta.stop_reason
        usage = message_usage(self._generation)
        self.message |= told | {"usage": usage}
        managed = {name: self.message[name] for name in ("context_management",) if name in self.message}
        yield {"type": "message_delta", "delta": told, "usage": usage, **managed}
        yield {"type": "message_stop"}

    def _reason(self, delta: Delta) -> str:
        if isinstance(delta.stop_reason, str):
            return "stop_sequence"
        if delta.finish_reason == "length" and self._fills_context:
            return "model_context_window_exceeded"
        return _STOP_REASONS[delta.finish_reason or "stop"]


def message_usage(generation: Generation) -> JsonObject:
    """Counts tokens so far: of the prompt those that were computed apart from those that a cache had."""
    usage = chat_usage(generation)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": generation.num_reasoning_tokens},
        "service_tier": "standard",
    }
