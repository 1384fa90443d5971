"""Builds chat's messages from the items and blocks of other surfaces.

Whatever an assistant said in a row, its reasoning, its texts and its calls, is one message, as the model writes it:
first the reasoning, then the text, then the calls. Texts of one message are joined by a blank line, as chat joins parts
of content.
"""

from dataclasses import dataclass, field

from ownpath.chat.turns import PART_SEPARATOR
from ownpath.server.sse import JsonObject


@dataclass
class Transcript:
    """The messages so far. call_ids: of the calls in them."""

    messages: list[JsonObject] = field(default_factory=list)
    call_ids: set[str] = field(default_factory=set)
    _reasoning: list[str] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _calls: list[JsonObject] = field(default_factory=list)
    _is_answering: bool = False

    def say(self, role: str, text: str) -> None:
        """Adds a message of somebody else than the assistant."""
        self._end_answer()
        self.messages.append({"role": role, "content": text})

    def reason(self, text: str) -> None:
        """Adds reasoning of the assistant."""
        self._is_answering = True
        self._reasoning += [text] if text else []

    def answer(self, text: str) -> None:
        """Adds content of the assistant; an empty one is an answer too."""
        self._is_answering = True
        self._texts += [text] if text else []

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """Adds a call of a tool."""
        self._is_answering = True
        self.call_ids.add(call_id)
        self._calls.append({"id": call_id, "function": {"name": name, "arguments": arguments}})

    def result(self, call_id: str, text: str) -> None:
        """Adds the result of an earlier call."""
        self._end_answer()
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def whole(self) -> list[JsonObject]:
        """Returns all messages."""
        self._end_answer()
        return self.messages

    def _end_answer(self) -> None:
        if not self._is_answering:
            return
        message: JsonObject = {"role": "assistant", "content": PART_SEPARATOR.join(self._texts)}
        if self._reasoning:
            message["reasoning_content"] = PART_SEPARATOR.join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        self.messages.append(message)
        self._reasoning, self._texts, self._calls, self._is_answering = [], [], [], False
