"""Fields that shape the draw and the end of an answer: top_k, min_p, ignore_eos, stop_token_ids."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
from cpu.engine.fake_model import EOS_ID
from cpu.server.harness import TOKENIZER, Harness, chat_ids, error, harness, saying

PATHS = ("/v1/completions", "/v1/chat/completions")
SAID = "hello"
IDS = TOKENIZER.encode_text(SAID)
STOP = IDS[-1]
"""The text's last token."""


def speaking(path: str) -> AbstractContextManager[Harness]:
    """A server whose model answers with the text, then an end token for ever."""
    prompt = chat_ids("hi") if "chat" in path else TOKENIZER.encode_text("hi")
    return harness(saying(SAID, prompt))


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    opening = {"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    return {**opening, "max_tokens": 12, "return_token_ids": True, **fields}


def drawn(served: Harness, **fields: Any) -> list[int]:
    answer = served.complete(prompt="hi", max_tokens=12, return_token_ids=True, **fields)
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def test_one_of_one_is_the_likeliest(served: Harness) -> None:
    likeliest = drawn(served, temperature=0)
    for fields in ({"top_k": 1}, {"min_p": 1.0}):
        assert drawn(served, temperature=1.5, seed=3, **fields) == likeliest
    free = drawn(served, temperature=1.5, seed=3)
    for fields in ({"top_k": 0}, {"top_k": -1}, {"min_p": 0}, {"top_k": TOKENIZER.num_tokens}):
        assert drawn(served, temperature=1.5, seed=3, **fields) == free


@pytest.mark.parametrize("top_k", [2, 5])
def test_every_token_is_one_of_the_likeliest(served: Harness, top_k: int) -> None:
    prompt, *_ = [TOKENIZER.encode_text("hi")]
    tokens = drawn(served, temperature=2, seed=8, top_k=top_k)
    for position, token_id in enumerate(tokens):
        logits = served.model.rule((*prompt, *tokens[:position]))[: TOKENIZER.num_tokens]
        assert int((logits > logits[token_id]).sum()) < top_k


def test_a_seed_draws_the_same_beside_others(served: Harness) -> None:
    fields = {"temperature": 1.2, "seed": 11, "top_k": 7, "min_p": 0.01}
    alone = drawn(served, **fields)
    together = served.complete(prompt=["hi", "ho", "hi"], max_tokens=12, return_token_ids=True, **fields)
    assert together["choices"][0]["token_ids"] == together["choices"][2]["token_ids"] == alone


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_behind_an_ignored_end_token(path: str, stream: bool) -> None:
    with speaking(path) as served:
        fields = {"temperature": 0, "ignore_eos": True, "stream": stream}
        text, ids, choice = said(served, path, fields)
        assert text == SAID, "an end token is not shown"
        assert ids == IDS + [EOS_ID] * (12 - len(IDS))
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_a_stop_token(path: str, stream: bool) -> None:
    with speaking(path) as served:
        text, ids, choice = said(served, path, {"temperature": 0, "stop_token_ids": [STOP, 7], "stream": stream})
        assert (text, ids) == (SAID, IDS), "it is shown"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", STOP)
        text, ids, choice = said(served, path, {"temperature": 0, "stop_token_ids": [EOS_ID], "stream": stream})
        assert (text, ids, choice["stop_reason"]) == (SAID, [*IDS, EOS_ID], None), "the model's own end token"
        fields = {"temperature": 0, "stop_token_ids": [EOS_ID], "ignore_eos": True, "stream": stream}
        text, ids, choice = said(served, path, fields)
        assert (text, ids, choice["stop_reason"]) == (SAID, [*IDS, EOS_ID], EOS_ID), "asked for, and special: not shown"


def said(served: Harness, path: str, fields: dict[str, Any]) -> tuple[str, list[int], dict[str, Any]]:
    """Returns the text, the token ids and the choice that has the end, of an answer whole or streamed."""
    chat, body = "chat" in path, body_for(path, **fields)
    if not fields["stream"]:
        (choice,) = served.ask("POST", path, json=body).json()["choices"]
        return (choice["message"]["content"] if chat else choice["text"]), choice["token_ids"], choice
    text, ids, last = "", [], {}
    for chunk in served.stream(path, **{name: value for name, value in body.items() if name != "stream"}):
        for choice in chunk["choices"]:
            text += (choice["delta"].get("content") or "") if chat else choice["text"]
            ids += choice.get("token_ids", [])
            last = choice
    return text, ids, last


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("ignore_eos", "yes"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", list(range(65))),
    ],
)
def test_values_out_of_range_are_named(served: Harness, path: str, field: str, value: Any) -> None:
    response = served.ask("POST", path, json=body_for(path, **{field: value}))
    assert error(response, 400)["param"].split(".")[0].split("[")[0] == field
