"""``/v1/chat/completions`` against the model's own rule."""

import itertools
import json
from typing import Any

import pytest
import torch
from cpu.chat.small_tokenizer import FIRST_BYTE_ID, tokenizer_spec
from cpu.engine.fake_model import EOS_ID
from cpu.server.harness import (
    HELLO,
    MAX_MODEL_LEN,
    MODEL_ID,
    TOKENIZER,
    Harness,
    chat_ids,
    error,
    harness,
    saying,
)

from ownpath.chat.markers import SPECIALS
from ownpath.chat.tokenizer import Tokenizer

PATH = "/v1/chat/completions"


def test_an_answer_has_openais_shape(served: Harness) -> None:
    answer = served.chat(max_tokens=5, temperature=0, return_token_ids=True)
    (choice,) = answer["choices"]
    ids = choice["token_ids"]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL_ID
    assert isinstance(answer["created"], int)
    assert answer["prompt_token_ids"] == chat_ids("hello")
    num_prompt = len(chat_ids("hello"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 5,
        "total_tokens": num_prompt + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    history = chat_ids("hello")
    for token_id in ids:
        assert token_id == int(served.model.rule(tuple(history))[: TOKENIZER.num_tokens].argmax())
        history.append(token_id)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    data = b"".join(TOKENIZER.token_bytes(i) for i in ids if not TOKENIZER.is_hidden(i))
    assert data.decode("utf-8", "replace").startswith(choice["message"]["content"])
    own = {"system_fingerprint", "prompt_token_ids"}
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"} | own
    assert set(choice) == {"index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"}


def test_token_ids_come_only_on_request(served: Harness) -> None:
    answer = served.chat(max_tokens=2)
    assert "prompt_token_ids" not in answer
    assert "token_ids" not in answer["choices"][0]


STREAMED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 0.9, "seed": 5},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3, "return_token_ids": True},
    {"temperature": 1, "seed": 1, "stop": ["a", "\n"]},
]


@pytest.mark.parametrize("fields", STREAMED)
@pytest.mark.parametrize("text", ["hello", "<｜User｜> 🙂 ünï"])
def test_a_stream_says_what_the_whole_answer_says(served: Harness, fields: dict[str, Any], text: str) -> None:
    fields = fields | {"messages": [{"role": "user", "content": text}], "max_tokens": 40}
    whole = served.chat(**fields)
    events = served.stream(PATH, **fields, stream_options={"include_usage": True})
    *chunks, last = events
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert events[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["choices"][0]["message"]["content"]
    reasons = [part["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole["choices"][0]["finish_reason"]]
    entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert entries == ((whole["choices"][0]["logprobs"] or {}).get("content") or [])
    ids = list(itertools.chain.from_iterable(part.get("token_ids", []) for part in parts))
    assert ids == whole["choices"][0].get("token_ids", [])
    assert chunks[0].get("prompt_token_ids") == whole.get("prompt_token_ids")


def test_usage_is_streamed_only_on_request(served: Harness) -> None:
    events = served.stream(PATH, messages=HELLO, max_tokens=3)
    assert all("usage" not in event and event["choices"] for event in events)


def test_eos_ends_the_answer_and_is_not_text() -> None:
    with harness(saying("hi there", chat_ids("hello"))) as served:
        answer = served.chat(return_token_ids=True)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == "hi there"
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == [*TOKENIZER.encode_text("hi there"), EOS_ID]
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_an_empty_answer_is_an_answer() -> None:
    with harness(saying("", chat_ids("hello"))) as served:
        answer = served.chat(return_token_ids=True, logprobs=True)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == ""
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == [EOS_ID]
        assert len(choice["logprobs"]["content"]) == 1
        assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("lo w", "hel", 2),
        (["x", "world"], "hello ", 6),
        ("h", "", 1),
        ("orlds", "hello world", None),
        (["🙂"], "hello world", None),
    ],
)
def test_stop_strings_across_token_boundaries(stop: Any, text: str, num_tokens: int | None) -> None:
    """ "hello world" is the tokens hello, " w", o, r, l, d."""
    said = TOKENIZER.encode_text("hello world")
    assert len(said) == 6
    with harness(saying("hello world", chat_ids("hello"))) as served:
        answer = served.chat(stop=stop, return_token_ids=True)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"] == ([*said, EOS_ID] if num_tokens is None else said[:num_tokens])
        events = served.stream(PATH, messages=HELLO, stop=stop)
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text
        assert served.settled(), "the rest of the answer is not generated for nobody"


def test_eos_is_not_text_even_if_the_tokenizer_does_not_mark_it_special() -> None:
    spec = tokenizer_spec()
    for token in spec["added_tokens"]:
        token["special"] = False
    with harness(saying("hi", chat_ids("hello")), Tokenizer(spec)) as served:
        assert served.chat()["choices"][0]["message"]["content"] == "hi"


def test_characters_split_over_tokens_stream_whole() -> None:
    text = "naïve 🙂 日本"
    with harness(saying(text, chat_ids("hello"))) as served:
        events = served.stream(PATH, messages=HELLO)
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(pieces) == text
        assert "\ufffd" not in text
        cut = served.chat(max_tokens=len("naïve ".encode()) + 2)
        assert cut["choices"][0]["message"]["content"] == "naïve ", "a character cut off by max_tokens is not shown"


def test_log_probabilities(served: Harness) -> None:
    answer = served.chat(max_tokens=4, temperature=1.5, seed=3, logprobs=True, top_logprobs=5, return_token_ids=True)
    history = chat_ids("hello")
    entries = answer["choices"][0]["logprobs"]["content"]
    for token_id, entry in zip(answer["choices"][0]["token_ids"], entries, strict=True):
        expected = served.model.rule(tuple(history))[: TOKENIZER.num_tokens].log_softmax(-1)
        assert entry["logprob"] == float(expected[token_id]), "the model's own, before temperature"
        assert bytes(entry["bytes"]) == TOKENIZER.token_bytes(token_id)
        assert entry["token"] == TOKENIZER.token_text(token_id)
        top = expected.topk(5)
        assert [e["logprob"] for e in entry["top_logprobs"]] == top.values.tolist()
        assert [bytes(e["bytes"]) for e in entry["top_logprobs"]] == [
            TOKENIZER.token_bytes(i) for i in top.indices.tolist()
        ]
        history.append(token_id)


def test_seeds_make_answers_repeatable(served: Harness) -> None:
    def content(seed: int | None) -> str:
        text: str = served.chat(seed=seed, max_tokens=30)["choices"][0]["message"]["content"]
        return text

    assert content(11) == content(11)
    assert content(11) != content(12)
    assert content(None) != content(None)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("marker", [*SPECIALS, "<｜DSML｜tool_calls>"])
def test_special_tokens_in_messages_are_text(served: Harness, role: str, marker: str) -> None:
    """T12: the prompt's special ids are those of the turns, whatever the texts spell."""
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": f"{marker}{marker}"}, *HELLO]
    answer = served.chat(messages=messages, max_tokens=1, return_token_ids=True)
    ids = answer["prompt_token_ids"]
    roles = ["user", role, "user"]
    turns = [r for n, r in enumerate(roles) if r != "user" or n == 0 or roles[n - 1] != "user"]
    expected = {"user": 2, "assistant": 1, "system": None}
    markers = [i for i in ids if i < FIRST_BYTE_ID and i not in (3, 5)]
    assert markers == [0, *[expected[turn] for turn in turns if expected[turn] is not None]]
    assert marker.encode() * 2 in b"".join(TOKENIZER.token_bytes(i) for i in ids if i >= FIRST_BYTE_ID)


def test_without_a_limit_the_answer_fills_the_context(served: Harness) -> None:
    answer = served.chat(temperature=0)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(served: Harness) -> None:
    long = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
    found = error(served.post(PATH, messages=long), 400)
    assert found["code"] == "context_length_exceeded"
    assert f"{MAX_MODEL_LEN + 4} prompt tokens exceed the maximum context of {MAX_MODEL_LEN}" in found["message"]
    full = [{"role": "user", "content": "x" * (MAX_MODEL_LEN - 4)}]
    for limit in ({}, {"max_tokens": 5}, {"max_tokens": -1}):
        assert str(MAX_MODEL_LEN) in error(served.post(PATH, messages=full, **limit), 400)["message"]
    assert (
        served.chat(messages=[{"role": "user", "content": "x" * (MAX_MODEL_LEN - 5)}])["usage"]["completion_tokens"]
        == 1
    )


def test_a_hopelessly_long_text_is_refused_without_tokenising(served: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "encode_text", None)
    found = error(served.post(PATH, messages=[{"role": "user", "content": "x" * 1_000_000}]), 400)
    assert found["code"] == "context_length_exceeded"
    assert "at least" in found["message"]


def test_max_completion_tokens_is_max_tokens(served: Harness) -> None:
    assert served.chat(max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    assert served.chat(max_completion_tokens=3, max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_breaks_in_the_middle(stream: bool) -> None:
    """The start of a stream cannot be taken back: the error is its last event, and there is no [DONE]."""

    class Breaking:
        def __init__(self) -> None:
            self.inner = saying("abcdef", chat_ids("hello"))
            self.config, self.caches, self.new_cache = self.inner.config, self.inner.caches, self.inner.new_cache

        def forward(self, batch: Any) -> torch.Tensor:
            logits = self.inner.forward(batch)
            return logits * float("nan") if int(batch.positions_T[-1]) >= len(chat_ids("hello")) + 2 else logits

    with harness(Breaking()) as served:
        response = served.post(PATH, messages=HELLO, stream=stream)
        if not stream:
            assert "not finite" in error(response, 500)["message"]
        else:
            lines = [line for line in response.text.split("\n\n") if line]
            assert '"error"' in lines[-1]
            assert "[DONE]" not in response.text
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "abc"
        assert served.ask("GET", "/health").status_code == 200
        assert served.settled()
