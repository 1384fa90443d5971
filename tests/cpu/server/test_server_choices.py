"""``n``: several answers of each prompt, each a choice with its own draw."""

import json
from typing import Any

import pytest
from cpu.server.harness import HELLO, TOKENIZER, Harness, chat_ids, error, harness
from cpu.server.test_server_tools import CALLS, NOW, WEATHER, answering

from ownpath.server.counts import MAX_ANSWERS, MAX_REPEATED_TOKENS, check_repeated
from ownpath.server.errors import ApiError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS)
DRAWN: dict[str, Any] = {"temperature": 1.2, "max_tokens": 9, "return_token_ids": True}


def whole(served: Harness, path: str, **fields: Any) -> dict[str, Any]:
    return served.chat(**fields) if path == CHAT else served.complete(**fields)


def ids_of(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", [7, -1, 2**63 - 2])
def test_answer_i_draws_with_a_seed_that_is_i_more(served: Harness, path: str, seed: int) -> None:
    together = whole(served, path, **DRAWN, seed=seed, n=3)
    seeds = [seed, seed + 1, seed + 2 if seed < 2**62 else -(2**63)]
    alone = [whole(served, path, **DRAWN, seed=one) for one in seeds]
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert together["choices"] == [one["choices"][0] | {"index": i} for i, one in enumerate(alone)]
    assert len({tuple(ids) for ids in ids_of(together)}) == 3, "each its own draw"
    usage, single = together["usage"], alone[0]["usage"]
    assert usage["prompt_tokens"] == single["prompt_tokens"], "the prompt counts once"
    assert usage["completion_tokens"] == 27
    assert usage["total_tokens"] == single["prompt_tokens"] + 27


@pytest.mark.parametrize("path", PATHS)
def test_draws_without_a_seed_differ_and_greedy_ones_agree(served: Harness, path: str) -> None:
    assert len({tuple(ids) for ids in ids_of(whole(served, path, **DRAWN, n=4))}) == 4
    greedy = ids_of(whole(served, path, **DRAWN | {"temperature": 0}, n=4))
    assert greedy == [greedy[0]] * 4


def test_answers_of_several_prompts_follow_one_another(served: Harness) -> None:
    fields = DRAWN | {"seed": 5, "echo": True, "logprobs": 1}
    prompts = ["ab", [20, 21, 22], "c"]
    for given in (["ab", "c"], [[20, 21, 22], [23]], prompts[0]):
        each = given if isinstance(given, list) else [given]
        together = served.complete(prompt=given, **fields, n=2, best_of=2)
        assert [choice["index"] for choice in together["choices"]] == list(range(2 * len(each)))
        for number, choice in enumerate(together["choices"]):
            alone = served.complete(prompt=each[number // 2], **fields | {"seed": 5 + number % 2})
            assert choice == alone["choices"][0] | {"index": number}, "with the prompt, its scores and its ids"
        counts = [served.complete(prompt=one, max_tokens=1)["usage"]["prompt_tokens"] for one in each]
        assert together["usage"]["prompt_tokens"] == sum(counts)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_says_what_the_whole_answer_says(served: Harness, path: str) -> None:
    fields: dict[str, Any] = DRAWN | {"seed": 3, "n": 3}
    fields |= {"messages": HELLO, "logprobs": True} if path == CHAT else {"prompt": "hello", "logprobs": 1}
    answer = whole(served, path, **fields)
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = served.stream(path, **fields, stream_options=options)
    assert events[-1]["usage"] == answer["usage"]
    assert [event["usage"]["prompt_tokens"] for event in events] == [answer["usage"]["prompt_tokens"]] * len(events)
    parts = [part for event in events for part in event["choices"]]
    order = [part["index"] for part in parts]
    assert order != sorted(order), "choices interleave"
    for choice in answer["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert [i for part in own for i in part.get("token_ids", [])] == choice["token_ids"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["length"]
        if path == CHAT:
            assert [part["delta"].get("role") for part in own] == ["assistant"] + [None] * (len(own) - 1)
            assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
            entries = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"]
        else:
            assert "".join(part["text"] for part in own) == choice["text"]
    if path == CHAT:
        assert [event.get("prompt_token_ids") for event in events] == [chat_ids("hello")] + [None] * (len(events) - 1)


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_reasons_and_calls(stream: bool) -> None:
    fields = {"thinking": {"type": "enabled"}, "tools": [WEATHER, NOW], "n": 2, "max_tokens": 500}
    with answering("why" + "</think>" + "so" + CALLS, **fields) as (served, request):
        if stream:
            events = served.stream(CHAT, **request)
            assert [event.get("reasoning_effort") is None for event in events] == [False] + [True] * (len(events) - 1)
            parts = [part for event in events for part in event["choices"]]
            calls = [[c for p in parts if p["index"] == i for c in p["delta"].get("tool_calls", [])] for i in (0, 1)]
            texts = ["".join(c["function"]["arguments"] for c in own) for own in calls]
            assert texts[0] == texts[1]
            heads = [call["id"] for own in calls for call in own if "id" in call]
            assert {p["finish_reason"] for p in parts} == {None, "tool_calls"}
        else:
            answer = served.chat(**request)
            heads = []
            for choice in answer["choices"]:
                message = choice["message"]
                assert (message["reasoning_content"], message["content"]) == ("why", "so")
                assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "now"]
                assert json.loads(message["tool_calls"][0]["function"]["arguments"])["days"] == [3]
                assert choice["finish_reason"] == "tool_calls"
                heads += [call["id"] for call in message["tool_calls"]]
            reasoning = len(TOKENIZER.encode_text("why"))
            assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * reasoning}
        assert len(set(heads)) == len(heads) == 4, "every call has an id of its own"


@pytest.mark.parametrize("path", PATHS)
def test_choices_end_by_themselves(path: str) -> None:
    """One choice goes on when another has met its stop string."""
    with harness() as own:
        fields = DRAWN | {"seed": 2, "n": 4, "max_tokens": 30, "stop": ["e", "a", "t"]}
        together = whole(own, path, **fields)
        alone = [whole(own, path, **fields | {"seed": 2 + i, "n": 1})["choices"][0] for i in range(4)]
        assert together["choices"] == [one | {"index": i} for i, one in enumerate(alone)]
        assert len({len(one["token_ids"]) for one in alone}) > 1
        assert own.settled()


@pytest.mark.parametrize("path", PATHS)
def test_all_answers_are_taken_or_none(path: str) -> None:
    with harness(max_num_queued=0) as own:
        body = {"messages": HELLO} if path == CHAT else {"prompt": "a"}
        assert error(own.post(path, **body, n=9), 429)["code"] == "overloaded"
        assert own.engine.num_open == 0
        assert len(whole(own, path, **body, n=8, max_tokens=2)["choices"]) == 8


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 2, "best_of": 1}, "best_of"),
        (CHAT, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"n": 2, "best_of": 3}, "best_of"),
        (CHAT, {"n": MAX_ANSWERS + 1}, "n"),
        (COMPLETIONS, {"n": MAX_ANSWERS // 2 + 1, "prompt": ["a", "b"]}, "n"),
        (COMPLETIONS, {"n": 10**18}, "n"),
        (COMPLETIONS, {"n": 0}, "n"),
    ],
)
def test_what_cannot_be_asked_for(served: Harness, path: str, fields: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "a"}
    assert error(served.post(path, **body | fields), 400)["param"] == param


def test_answers_do_not_repeat_a_long_prompt_without_bound() -> None:
    check_repeated(1, MAX_REPEATED_TOKENS + 1)
    check_repeated(4, MAX_REPEATED_TOKENS // 4)
    with pytest.raises(ApiError) as caught:
        check_repeated(4, MAX_REPEATED_TOKENS // 4 + 1)
    assert (caught.value.status, caught.value.param) == (400, "n")
