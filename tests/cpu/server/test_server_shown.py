"""Additions to the text of an answer: the stop string, special tokens, ids as names of tokens."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cpu.engine.fake_model import EOS_ID, FakeModel, script_rule
from cpu.server.harness import HELLO, MAX_MODEL_LEN, TOKENIZER, VOCAB, Harness, chat_ids, harness
from cpu.server.test_server_tools import CALLS, NOW, WEATHER, answering

from ownpath.chat.answer import Shown
from ownpath.chat.detokenize import StopMatcher
from ownpath.chat.markers import EOS, USER, segments_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS)
SPECIAL = f"one{USER} two"
WITH_STOP = {"include_stop_str_in_output": True}
WITH_SPECIAL = {"skip_special_tokens": False}


@contextlib.contextmanager
def speaking(path: str, text: str) -> Iterator[Harness]:
    """A server whose model answers "hello" with this text, in which markers are meant, then ends."""
    num_prompt = len(chat_ids("hello") if path == CHAT else TOKENIZER.encode_text("hello"))
    rule = script_rule(TOKENIZER.encode_segments(segments_of(text)), VOCAB, num_prompt)
    with harness(FakeModel(rule, VOCAB, MAX_MODEL_LEN)) as served:
        yield served


def said(served: Harness, path: str, **fields: Any) -> dict[str, Any]:
    """The choice, whose streamed text is the same; its text as ``said``."""
    body = {"temperature": 0, "max_tokens": 60} | ({"messages": HELLO} if path == CHAT else {"prompt": "hello"})
    (choice,) = served.ask("POST", path, json=body | fields).json()["choices"]
    text: str = choice["message"]["content"] if path == CHAT else choice["text"]
    parts = [part for event in served.stream(path, **body | fields) for part in event["choices"]]
    streamed = [part["delta"].get("content", "") if path == CHAT else part["text"] for part in parts]
    assert "".join(streamed) == text
    assert [parts[-1][name] for name in ("finish_reason", "stop_reason")] == [
        choice["finish_reason"],
        choice["stop_reason"],
    ]
    return choice | {"said": text}


@pytest.mark.parametrize("path", PATHS)
def test_a_stop_string_is_shown_if_asked_for(path: str) -> None:
    with speaking(path, "one two three") as served:
        for stop, kept, whole in ((" tw", "one", "one tw"), ("one", "", "one"), (["zz", "e t", "thr"], "on", "one t")):
            plain = said(served, path, stop=stop)
            assert (plain["said"], plain["finish_reason"]) == (kept, "stop")
            shown = said(served, path, stop=stop, **WITH_STOP)
            assert (shown["said"], shown["finish_reason"], shown["stop_reason"]) == (
                whole,
                "stop",
                plain["stop_reason"],
            )
            assert "empty_content" not in shown
        ended = said(served, path, stop="zz", **WITH_STOP)
        assert (ended["said"], ended["stop_reason"]) == ("one two three", None), "nothing but stop strings"
        assert said(served, path, stop="two", include_stop_str_in_output=False)["said"] == "one "


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shown_stop_string_does_not_depend_on_pieces(size: int) -> None:
    text = "the cat sat on a mat"
    matcher = StopMatcher(["on a", "sat on", "dog"], shows_stop=True)
    pieces = [matcher.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(pieces) + matcher.flush() == "the cat sat on"


@pytest.mark.parametrize("path", PATHS)
def test_special_tokens_are_shown_if_asked_for(path: str) -> None:
    with speaking(path, SPECIAL) as served:
        assert said(served, path)["said"] == said(served, path, skip_special_tokens=True)["said"] == "one two"
        shown = said(served, path, **WITH_SPECIAL)
        assert (shown["said"], shown["finish_reason"]) == (SPECIAL, "stop"), "not the end token"
        both = said(served, path, **WITH_SPECIAL, **WITH_STOP)
        assert (both["said"], both["finish_reason"], both["stop_reason"]) == (SPECIAL + EOS, "stop", None)
        stopped = said(served, path, **WITH_SPECIAL, stop=USER[:3])
        assert (stopped["said"], stopped["stop_reason"]) == ("one", USER[:3]), "what is text can stop"
        fields = {"ignore_eos": True, "max_tokens": len(TOKENIZER.encode_segments(segments_of(SPECIAL))) + 2}
        assert said(served, path, **WITH_SPECIAL, **fields)["said"] == SPECIAL + 2 * EOS
        fields = {"ignore_eos": True, "stop_token_ids": [EOS_ID]}
        assert said(served, path, **WITH_SPECIAL, **fields)["said"] == SPECIAL + EOS, "shown as any stop token"


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_of_special_tokens_alone_is_not_empty(path: str) -> None:
    with speaking(path, USER) as served:
        assert said(served, path)["empty_content"] == "only_special_tokens"
        assert "empty_content" not in said(served, path, **WITH_SPECIAL)


@pytest.mark.parametrize("fields", [WITH_SPECIAL, WITH_SPECIAL | WITH_STOP])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_calls_keep_their_structure(fields: dict[str, Any], stream: bool) -> None:
    """Markers of the format are no text, and a special token in or behind calls changes nothing in them."""
    broken_in = CALLS.replace('<｜DSML｜invoke name="now">', f'{USER}<｜DSML｜invoke name="now">').replace(
        "Zürich", f"Zür{USER}ich"
    )
    asked = {"thinking": {"type": "enabled"}, "tools": [WEATHER, NOW], "max_tokens": 600}
    with answering(f"wh{USER}y</think>s{USER}o{broken_in}\n{USER}", **asked) as (served, request):
        for show in ({}, fields):
            mark = USER if show else ""
            parts = [p for event in served.stream(CHAT, **request, **show) for p in event["choices"]]
            choice = served.chat(**request, **show)["choices"][0]
            message = choice["message"]
            if stream:
                message = {
                    name: "".join(p["delta"].get(name, "") for p in parts) for name in ("reasoning_content", "content")
                } | {"tool_calls": message["tool_calls"]}
            assert (message["reasoning_content"], message["content"]) == (f"wh{mark}y", f"s{mark}o")
            assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": 'Zürich "HB"', "days": [3]}
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "now"]
            assert (choice["finish_reason"], "malformed" in choice) == ("tool_calls", False)


def test_the_end_token_is_shown_only_with_both() -> None:
    shows = [Shown(special, stop).has_end_token for special in (False, True) for stop in (False, True)]
    assert shows == [False, False, False, True]


def names(entries: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(entry["token"], [top["token"] for top in entry["top_logprobs"]]) for entry in entries]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_named_by_id_if_asked_for(served: Harness, stream: bool) -> None:
    fields = {"max_tokens": 5, "seed": 4, "return_token_ids": True, "return_tokens_as_token_ids": True}

    def choice_of(path: str, **more: Any) -> list[dict[str, Any]]:
        if stream:
            return [part for event in served.stream(path, **fields, **more) for part in event["choices"]]
        whole: list[dict[str, Any]] = served.ask("POST", path, json=fields | more).json()["choices"]
        return whole

    plain = served.chat(**fields | {"return_tokens_as_token_ids": False}, logprobs=True, top_logprobs=2)["choices"][0]
    parts = choice_of(CHAT, messages=HELLO, logprobs=True, top_logprobs=2)
    entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == [f"token_id:{i}" for i in plain["token_ids"]]
    for entry, by_text in zip(entries, plain["logprobs"]["content"], strict=True):
        assert [entry[name] for name in ("logprob", "bytes")] == [by_text[name] for name in ("logprob", "bytes")]
        ids = [int(top["token"].removeprefix("token_id:")) for top in entry["top_logprobs"]]
        assert [TOKENIZER.token_text(i) for i in ids] == [top["token"] for top in by_text["top_logprobs"]]

    parts = choice_of(COMPLETIONS, prompt="hello", echo=True, logprobs=2)
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    ids = TOKENIZER.encode_text("hello") + [i for part in parts for i in part["token_ids"]]
    assert [name for one in told for name in one["tokens"]] == [f"token_id:{i}" for i in ids]
    tops = [top for one in told for top in one["top_logprobs"]]
    assert tops[0] is None
    assert all(f"token_id:{i}" in top and len(top) >= 2 for i, top in zip(ids[1:], tops[1:], strict=True))
    assert choice_of(CHAT, messages=HELLO)[-1]["logprobs"] is None, "without logprobs nothing is named"
