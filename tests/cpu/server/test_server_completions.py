"""``/v1/completions``: every form of prompt, echo and scoring."""

from typing import Any

import pytest
from cpu.chat.small_tokenizer import FIRST_BYTE_ID, small_tokenizer
from cpu.engine.fake_model import EOS_ID
from cpu.server.harness import MAX_MODEL_LEN, TOKENIZER, Harness, error, harness, saying

PATH = "/v1/completions"
TEXT = "hello world"
IDS = TOKENIZER.encode_text(TEXT)


def test_an_answer_has_openais_shape(served: Harness) -> None:
    answer = served.complete()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 16, "the API's default"


def test_text_and_token_ids_are_the_same_prompt(served: Harness) -> None:
    by_text = served.complete(prompt=TEXT, temperature=0, return_token_ids=True)["choices"][0]
    by_ids = served.complete(prompt=IDS, temperature=0, return_token_ids=True)["choices"][0]
    assert by_text["prompt_token_ids"] == by_ids["prompt_token_ids"] == IDS
    assert by_text == by_ids


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[20, 21], [22], [23, 24, 25]]])
def test_several_prompts_are_several_choices(served: Harness, prompt: Any) -> None:
    fields = {"temperature": 0.9, "seed": 4, "max_tokens": 9, "return_token_ids": True}
    together = served.complete(prompt=prompt, **fields)
    alone = [served.complete(prompt=one, **fields) for one in prompt]
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    for choice, single in zip(together["choices"], alone, strict=True):
        assert choice | {"index": 0} == single["choices"][0]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][name] == sum(single["usage"][name] for single in alone)


def test_raw_text_may_spell_special_tokens(served: Harness) -> None:
    answer = served.complete(prompt="<｜User｜>a<｜Assistant｜></think>", return_token_ids=True, max_tokens=1)
    assert answer["choices"][0]["prompt_token_ids"] == [2, FIRST_BYTE_ID + ord("a"), 3, 5]


def test_bos_is_added_only_if_the_tokenizer_says_so() -> None:
    with harness(tokenizer=small_tokenizer(add_bos=True)) as served:
        choice = served.complete(return_token_ids=True, echo=True, logprobs=0, max_tokens=0)["choices"][0]
        assert choice["prompt_token_ids"] == [0, *TOKENIZER.encode_text("hello")]
        assert choice["text"] == "hello", "the echo is the given text"
        assert choice["logprobs"]["text_offset"] == [0, 0]
        by_ids = served.complete(prompt=IDS, return_token_ids=True)["choices"][0]
        assert by_ids["prompt_token_ids"] == IDS, "token ids are taken as they are"


def expected_scores(served: Harness, ids: list[int]) -> list[float | None]:
    """The definition: the log-softmax, over the tokenizer's vocabulary, of what the model says after each prefix."""
    scores: list[float | None] = [None]
    for position in range(1, len(ids)):
        logits = served.model.rule(tuple(ids[:position]))[: TOKENIZER.num_tokens]
        scores.append(float(logits.log_softmax(-1)[ids[position]]))
    return scores


@pytest.mark.parametrize("prompt", [TEXT, IDS])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_scores_the_prompt(served: Harness, prompt: Any, max_tokens: int) -> None:
    answer = served.complete(
        prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0, return_token_ids=True
    )
    (choice,) = answer["choices"]
    ids = IDS + choice["token_ids"]
    scores = choice["logprobs"]
    assert len(choice["token_ids"]) == max_tokens
    assert scores["token_logprobs"] == expected_scores(served, ids)
    assert scores["tokens"] == [TOKENIZER.token_text(i) for i in ids]
    assert scores["top_logprobs"][0] is None
    for token, logprob, top in zip(
        scores["tokens"][1:], scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True
    ):
        assert top[token] == logprob, "the token itself is always among them"
        assert 2 <= len(top) <= 3
        assert max(top.values()) == next(iter(top.values()))
    assert choice["text"].startswith(TEXT)
    starts = [0, 5, 7, 8, 9, 10]
    assert scores["text_offset"][: len(IDS)] == starts
    assert all(offset >= len(TEXT) for offset in scores["text_offset"][len(IDS) :])
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"


def test_echo_without_scores_repeats_the_text(served: Harness) -> None:
    plain = served.complete(prompt=TEXT, temperature=0)["choices"][0]
    echoed = served.complete(prompt=TEXT, temperature=0, echo=True)["choices"][0]
    assert echoed["text"] == TEXT + plain["text"]
    assert echoed["logprobs"] is None
    assert served.complete(prompt=[2, *IDS], echo=True, max_tokens=0)["choices"][0]["text"] == "<｜User｜>" + TEXT


def test_scores_of_an_answer_without_echo(served: Harness) -> None:
    choice = served.complete(prompt=IDS, logprobs=0, max_tokens=3, seed=1, return_token_ids=True)["choices"][0]
    everything = expected_scores(served, IDS + choice["token_ids"])
    assert choice["logprobs"]["token_logprobs"] == everything[len(IDS) :]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a", "hello", "c"], "seed": 2, "max_tokens": 20},
        {"prompt": ["a", "b"], "seed": 2, "max_tokens": 6, "echo": True, "logprobs": 3, "return_token_ids": True},
        {"prompt": [[20], [21, 22]], "temperature": 0, "max_tokens": 6, "logprobs": 0},
        {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": ["a", "b"], "seed": 9, "max_tokens": 30, "stop": ["x", "e"]},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(served: Harness, fields: dict[str, Any]) -> None:
    whole = served.complete(**fields)
    events = served.stream(PATH, **fields, stream_options={"include_usage": True})
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        if choice["logprobs"] is not None:
            for key, values in choice["logprobs"].items():
                assert [value for part in parts if part["logprobs"] for value in part["logprobs"][key]] == values
        if "token_ids" in choice:
            assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
            assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [
                choice["prompt_token_ids"]
            ]


def test_stop_and_eos() -> None:
    with harness(saying("one two three", IDS)) as served:
        choice = served.complete(prompt=IDS, max_tokens=50)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("one two three", "stop")
        choice = served.complete(prompt=IDS, max_tokens=50, stop=" t", echo=True)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (TEXT + "one", "stop")
        choice = served.complete(prompt=IDS, max_tokens=50, stop="hello", return_token_ids=True)["choices"][0]
        assert choice["text"] == "one two three", "the prompt is not searched for stop strings"
        assert choice["token_ids"][-1] == EOS_ID


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "an empty text has no tokens"),
        (["a", ""], "an empty text has no tokens"),
        ([TOKENIZER.num_tokens], f"token id {TOKENIZER.num_tokens} is not below {TOKENIZER.num_tokens}"),
        ([[5], [2**31 - 1]], "is not below"),
        (["a"] * 65, "65 entries; at most 64"),
        ([5] * (MAX_MODEL_LEN + 1), f"{MAX_MODEL_LEN + 1} prompt tokens exceed"),
        ("x" * (MAX_MODEL_LEN + 1), f"{MAX_MODEL_LEN + 1} prompt tokens exceed"),
    ],
)
def test_prompts_that_cannot_run(served: Harness, prompt: Any, message: str) -> None:
    found = error(served.post(PATH, prompt=prompt), 400)
    assert found["param"] == "prompt"
    assert message in found["message"]


def test_a_prompt_that_fills_the_context_can_be_scored(served: Harness) -> None:
    full = [20] * MAX_MODEL_LEN
    answer = served.complete(prompt=full, echo=True, logprobs=0, max_tokens=0)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == MAX_MODEL_LEN
    assert "exceed" in error(served.post(PATH, prompt=full), 400)["message"]
    assert served.complete(prompt=full[:-3])["usage"]["completion_tokens"] == 3, "the default limit gives way"
