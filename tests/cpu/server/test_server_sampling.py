"""Fields that shape the draw and the end of an answer: top_k, min_p, ignore_eos, stop_token_ids, penalties, bias,
min_tokens."""

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


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_decides_and_is_read_as_clients_send_it(path: str) -> None:
    with speaking(path) as served:
        for bias in ({"7": 100}, {"7": 99.5, "9": None}, {"7": 100, str(TOKENIZER.num_tokens - 1): -100}):
            _, ids, _ = said(served, path, {"temperature": 0, "stream": False, "logit_bias": bias})
            assert ids == [7] * 12
        for bias in ({}, [], {"7": None}, None):
            _, ids, _ = said(served, path, {"temperature": 0, "stream": False, "logit_bias": bias})
            assert ids == [*IDS, EOS_ID]


def test_penalties_change_the_answer() -> None:
    """Three tokens far above all others, each by 1: what is taken from one that was said makes room for the next."""
    push = {"logit_bias": {"7": 100, "8": 99, "9": 98}, "temperature": 0}
    with speaking("/v1/completions") as served:
        assert drawn(served, **push) == [7] * 12
        assert drawn(served, presence_penalty=1.5, **push) == [7, 8] + [7] * 10
        assert drawn(served, frequency_penalty=1.5, **push)[:4] == [7, 8, 7, 9], "98.5, 97.5, then 97 and 98"
        assert drawn(served, frequency_penalty=-2, presence_penalty=0, repetition_penalty=1, **push) == [7] * 12
        # The script's token has 30, and the prompt's and the answer's own tokens nothing, which nothing multiplies.
        assert drawn(served, repetition_penalty=2, temperature=0) == [*IDS, EOS_ID]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_ends_an_answer_before_the_minimum(path: str, stream: bool) -> None:
    with speaking(path) as served:
        fields = {"temperature": 0, "stream": stream}
        text, ids, choice = said(served, path, fields | {"min_tokens": len(IDS) + 3})
        assert ids[: len(IDS)] == IDS
        assert EOS_ID not in ids[:-1]
        assert (len(ids), ids[-1], choice["finish_reason"]) == (len(IDS) + 4, EOS_ID, "stop")
        text, ids, choice = said(served, path, fields | {"min_tokens": len(IDS), "stop": SAID[1:3]})
        assert (text, ids, choice["stop_reason"]) == (SAID, [*IDS, EOS_ID], None), "the stop string came too early"
        text, _, choice = said(served, path, fields | {"min_tokens": 0, "stop": SAID[1:3]})
        assert (text, choice["stop_reason"]) == (SAID[:1], SAID[1:3])


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
        ("presence_penalty", 2.1),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("logit_bias", [5]),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {" 5": 1}),
        ("logit_bias", {"99999999999999": 1}),
        ("logit_bias", {"the": 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {str(n): 1 for n in range(301)}),
        ("logit_bias", {"5": 1, str(TOKENIZER.num_tokens): 1}),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("min_tokens", 13),
    ],
)
def test_values_out_of_range_are_named(served: Harness, path: str, field: str, value: Any) -> None:
    response = served.ask("POST", path, json=body_for(path, **{field: value}))
    assert error(response, 400)["param"].split(".")[0].split("[")[0] == field
