"""The items of an answer of ``/v1/responses``, each with the events that open, fill and close it."""

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from ownpath.server.carried import carry
from ownpath.server.offers import ToolKey
from ownpath.server.responses.tools import input_of_arguments
from ownpath.server.sse import JsonObject

Told = tuple[str, JsonObject]
"""An event without its number: its name behind ``response.``, and its fields beside the item's id and place."""


@dataclass
class AnswerItem(ABC):
    """An item that is being written."""

    item_id: str
    pieces: list[str] = field(default_factory=list)

    @property
    def written(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    @abstractmethod
    def item(self, status: str) -> JsonObject:
        """Returns the item as it is now."""

    def last_status(self, of_response: str) -> str:
        """Returns its status at its end. of_response: the response's, if it ends with the item."""
        return of_response

    def opening(self) -> Iterator[Told]:
        """Yields what follows ``output_item.added``."""
        yield from ()

    @abstractmethod
    def more(self, text: str, logprobs: list[JsonObject]) -> Iterator[Told]:
        """Takes more text. logprobs: of its tokens, if they were asked for."""

    @abstractmethod
    def closing(self) -> Iterator[Told]:
        """Yields what comes before ``output_item.done``."""


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class MessageItem(AnswerItem):
    """The content, with the entries of its tokens if they were asked for."""

    def __init__(self) -> None:
        super().__init__(_new_id("msg"))
        self._logprobs: list[JsonObject] = []

    def item(self, status: str) -> JsonObject:
        content = [self._part()] if status != "in_progress" else []
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def opening(self) -> Iterator[Told]:
        yield "content_part.added", {"content_index": 0, "part": self._part()}

    def more(self, text: str, logprobs: list[JsonObject]) -> Iterator[Told]:
        self.pieces.append(text)
        self._logprobs += logprobs
        yield "output_text.delta", {"content_index": 0, "delta": text, "logprobs": logprobs}

    def closing(self) -> Iterator[Told]:
        yield "output_text.done", {"content_index": 0, "text": self.written, "logprobs": self._logprobs}
        yield "content_part.done", {"content_index": 0, "part": self._part()}

    def _part(self) -> JsonObject:
        return {"type": "output_text", "text": self.written, "annotations": [], "logprobs": self._logprobs}


class ReasoningItem(AnswerItem):
    """The reasoning: its text, or as a summary. carries: ``encrypted_content`` holds it too, for who wants it back."""

    def __init__(self, *, is_summary: bool, carries: bool) -> None:
        super().__init__(_new_id("rs"))
        self._is_summary, self._carries = is_summary, carries
        self._kind, self._index = (
            ("summary_text", "summary_index") if is_summary else ("reasoning_text", "content_index")
        )

    def item(self, status: str) -> JsonObject:
        parts = [self._part()] if status != "in_progress" else []
        texts = {"summary": parts} if self._is_summary else {"summary": [], "content": parts}
        item: JsonObject = {"id": self.item_id, "type": "reasoning", "status": status, **texts}
        if self._carries:
            item["encrypted_content"] = carry(self.written)
        return item

    def opening(self) -> Iterator[Told]:
        yield self._event("added"), {self._index: 0, "part": self._part()}

    def more(self, text: str, logprobs: list[JsonObject]) -> Iterator[Told]:
        self.pieces.append(text)
        yield f"{self._name}.delta", {self._index: 0, "delta": text}

    def closing(self) -> Iterator[Told]:
        yield f"{self._name}.done", {self._index: 0, "text": self.written}
        yield self._event("done"), {self._index: 0, "part": self._part()}

    @property
    def _name(self) -> str:
        return "reasoning_summary_text" if self._is_summary else "reasoning_text"

    def _event(self, end: str) -> str:
        return f"reasoning_summary_part.{end}" if self._is_summary else f"content_part.{end}"

    def _part(self) -> JsonObject:
        return {"type": self._kind, "text": self.written}


class CallItem(AnswerItem):
    """A call of a function, complete if its arguments are whole."""

    def __init__(self, key: ToolKey, kind: str = "fc") -> None:
        super().__init__(_new_id(kind))
        self._key, self._call_id = key, _new_id("call")

    def last_status(self, of_response: str) -> str:
        try:
            return "completed" if isinstance(json.loads(self.written), dict) else "incomplete"
        except (ValueError, RecursionError):
            return "incomplete"

    def item(self, status: str) -> JsonObject:
        called = {"call_id": self._call_id, "name": self._key.name}
        space = {"namespace": self._key.namespace} if self._key.namespace else {}
        text = {"arguments": self.written if status != "in_progress" else ""}
        return {"id": self.item_id, "type": "function_call", "status": status, **called, **space, **text}

    def more(self, text: str, logprobs: list[JsonObject]) -> Iterator[Told]:
        self.pieces.append(text)
        yield "function_call_arguments.delta", {"delta": text}

    def closing(self) -> Iterator[Told]:
        yield "function_call_arguments.done", {"name": self._key.name, "arguments": self.written}


class CustomCallItem(CallItem):
    """A call of a custom tool. Its input is told once it is whole: until then it is a JSON string's beginning."""

    def __init__(self, key: ToolKey) -> None:
        super().__init__(key, "ctc")

    def item(self, status: str) -> JsonObject:
        text = input_of_arguments(self.written) if status != "in_progress" else ""
        called = {"call_id": self._call_id, "name": self._key.name}
        return {"id": self.item_id, "type": "custom_tool_call", "status": status, **called, "input": text}

    def more(self, text: str, logprobs: list[JsonObject]) -> Iterator[Told]:
        self.pieces.append(text)
        yield from ()

    def closing(self) -> Iterator[Told]:
        text = input_of_arguments(self.written)
        yield "custom_tool_call_input.delta", {"delta": text}
        yield "custom_tool_call_input.done", {"input": text}
