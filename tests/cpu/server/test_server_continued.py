"""An assistant's message that goes on, and prompts that open no answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from cpu.engine.fake_model import FakeModel, script_rule
from cpu.server.harness import HELLO, TOKENIZER, VOCAB, Harness, error, harness

from ownpath.chat.effort import RELEASES
from ownpath.chat.markers import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER, Special

PATH = "/v1/chat/completions"
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
NO_OPENING = {"add_generation_prompt": False}
HALF = {"role": "assistant", "content": "The sky"}
LENGTH = 1024
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Harness]:
    """A context with room for the text of the strongest effort."""
    with harness(max_model_len=LENGTH) as running:
        yield running


def ids_of(*segments: str) -> list[int]:
    """Token ids of a prompt; what spells a marker is one."""
    markers = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)
    return TOKENIZER.encode_segments([Special(it) if it in markers else it for it in segments])


ASKED = (BOS, USER, "hello", ASSISTANT)
ASKED_MAX = (BOS, RELEASES["v4"]["max"], USER, "hello", ASSISTANT)


@pytest.mark.parametrize(
    ("last", "fields", "prompt"),
    [
        (HALF, GOES_ON, (*ASKED, THINK_END, "The sky")),
        (HALF, {"continue_final_message": True}, (*ASKED, THINK_END, "The sky")),
        (HALF | {"prefix": True}, {}, (*ASKED, THINK_END, "The sky")),
        (HALF | {"reasoning_content": "why"}, GOES_ON, (*ASKED, THINK_END, "The sky")),
        ({"role": "assistant"}, GOES_ON, (*ASKED, THINK_END)),
        (
            HALF | {"reasoning_content": "why"},
            GOES_ON | {"reasoning_effort": "max"},
            (*ASKED_MAX, THINK_START, "why", THINK_END, "The sky"),
        ),
        (HALF, GOES_ON | {"reasoning_effort": "max"}, (*ASKED_MAX, THINK_START, THINK_END, "The sky")),
        (HALF, NO_OPENING, (*ASKED, THINK_END, "The sky", EOS)),
        ({"role": "system", "content": "x"}, NO_OPENING, (BOS, USER, "hellox")),
    ],
)
def test_the_prompt_ends_where_it_was_asked_to(
    served: Harness, last: dict[str, Any], fields: dict[str, Any], prompt: tuple[str, ...]
) -> None:
    answer = served.chat(messages=[*HELLO, last], max_tokens=1, return_token_ids=True, **fields)
    assert answer["prompt_token_ids"] == ids_of(*prompt)


def test_a_last_user_message_is_followed_by_nothing(served: Harness) -> None:
    answer = served.chat(max_tokens=1, return_token_ids=True, **NO_OPENING)
    assert answer["prompt_token_ids"] == ids_of(BOS, USER, "hello")


@pytest.mark.parametrize("effort", [None, "max"])
def test_the_answer_is_the_rest_of_the_message(effort: str | None) -> None:
    """The rest of one answer is what follows its first half, and content at once: its reasoning is closed."""
    opened = (*ASKED, THINK_END) if effort is None else (*ASKED_MAX, THINK_START, "why", THINK_END)
    said = HALF | ({} if effort is None else {"reasoning_content": "why"})
    rest = script_rule(TOKENIZER.encode_text(" is blue"), VOCAB, len(ids_of(*opened, "The sky")))
    with harness(FakeModel(rest, VOCAB, LENGTH), max_model_len=LENGTH) as served:
        fields = GOES_ON | {"reasoning_effort": effort, "messages": [*HELLO, said]}
        answer = served.chat(**fields)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == " is blue"
        assert choice["message"]["reasoning_content"] is None
        assert choice["finish_reason"] == "stop"
        assert answer.get("reasoning_effort") == effort
        events = served.stream(PATH, **fields)
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == " is blue"


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([*HELLO, HALF], {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ([*HELLO, HALF | {"prefix": True}], {"add_generation_prompt": True}, "messages.1.prefix"),
        (HELLO, GOES_ON, "continue_final_message"),
        ([*HELLO, {"role": "system", "content": "a"}], GOES_ON, "continue_final_message"),
        ([*HELLO, HALF | {"tool_calls": [CALL]}], GOES_ON, "continue_final_message"),
        ([*HELLO, HALF | {"prefix": True}, *HELLO], {}, "messages.1.prefix"),
        ([*HELLO, HALF], {}, "messages"),
        ([*HELLO, HALF], {"add_generation_prompt": True}, "messages"),
        (HELLO, {"continue_final_message": 1}, "continue_final_message"),
        (HELLO, NO_OPENING | {"thinking": {"type": "enabled"}}, "add_generation_prompt"),
        ([*HELLO, HALF | {"partial": True}], GOES_ON, "messages.1.partial"),
    ],
)
def test_what_cannot_go_on_is_refused_by_name(
    served: Harness, messages: list[dict[str, Any]], fields: dict[str, Any], param: str
) -> None:
    assert error(served.post(PATH, messages=messages, **fields), 400)["param"] == param
