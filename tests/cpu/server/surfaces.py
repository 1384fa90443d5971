"""Shared by the tests of ``/v1/responses`` and ``/v1/messages``."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from cpu.engine.fake_model import FakeModel, script_rule
from cpu.server.harness import TOKENIZER, VOCAB, Harness, answer, harness

from ownpath.chat.effort import Release
from ownpath.chat.markers import segments_of
from ownpath.server.policy import RequestPolicy
from ownpath.server.prompts import chat_segments
from ownpath.server.protocol import ChatRequest

LONG = 4096
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Zürich</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def read_prompt(chat: ChatRequest) -> str:
    """The text that the model reads."""
    ids = TOKENIZER.encode_segments(chat_segments(chat, Release("0731", "test")))
    return b"".join(map(TOKENIZER.token_bytes, ids)).decode()


@contextlib.contextmanager
def answering(
    text: str, num_prompt_tokens: int, breaks_after: int | None = None, policy: RequestPolicy | None = None
) -> Iterator[Harness]:
    """A server whose model answers a prompt of that length with this text, in which markers are meant.

    breaks_after: tokens after which its logits are not finite.
    """
    script = script_rule(TOKENIZER.encode_segments(segments_of(text)), VOCAB, num_prompt_tokens)

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        is_broken = breaks_after is not None and len(history) >= num_prompt_tokens + breaks_after
        return script(history) * float("nan") if is_broken else script(history)

    with harness(FakeModel(rule, VOCAB, LONG), max_model_len=LONG, release="0731", policy=policy) as served:
        yield served


def num_tokens(chat: ChatRequest) -> int:
    """Length of the prompt."""
    return len(TOKENIZER.encode_segments(chat_segments(chat, Release("0731", "test"))))


def events_of(served: Harness, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; checks that each has its type as its name."""
    response = served.post(path, **body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    events = [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    return events


def whole_of(served: Harness, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    return answer(served.post(path, **body))


def without_ids(value: Any) -> Any:
    """The same without what is new in each answer."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    fresh = ("id", "call_id", "item_id", "created_at", "completed_at")
    return {name: without_ids(item) for name, item in value.items() if name not in fresh}
