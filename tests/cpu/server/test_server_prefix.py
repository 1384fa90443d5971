"""The prefix cache as clients see it: ``cached_tokens`` in usage, and who shares with whom."""

from collections.abc import Iterator
from typing import Any

import pytest
from cpu.engine.stamp_model import StampModel, expected_answer
from cpu.server.harness import TOKENIZER, Harness, error, harness

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules
from ownpath.server.policy import RequestPolicy

TEXT = "hello " * 140
KEYS = ("first-key-0123456789", "second-key-0123456789")


@pytest.fixture
def served() -> Iterator[Harness]:
    with harness(StampModel(1024), max_model_len=1024, num_snapshots=16) as running:
        yield running


def cached(usage: dict[str, Any]) -> int:
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    return found


def full_blocks(num_tokens: int) -> int:
    return (num_tokens - 1) // 256 * 256


def test_chat_tells_cached_tokens(served: Harness) -> None:
    """Whole and streamed; each further turn begins with the one before, whose answer is read as it is written."""
    messages = [{"role": "user", "content": TEXT}]
    first = served.chat(messages=messages, max_tokens=3)
    num_prompt = len(TOKENIZER.encode_segments(encode_messages([Message("user", TEXT)])))
    assert full_blocks(num_prompt) > 0
    assert first["usage"]["prompt_tokens"] == num_prompt
    assert cached(first["usage"]) == 0
    again = served.chat(messages=messages, max_tokens=3)
    assert cached(again["usage"]) == full_blocks(num_prompt)
    assert again["choices"] == first["choices"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = served.stream("/v1/chat/completions", messages=messages, max_tokens=3, stream_options=options)
    told = [cached(event["usage"]) for event in events]  # 0 in events before it has begun
    assert told == sorted(told)
    assert told[-1] == full_blocks(num_prompt)


def test_a_prompt_that_is_sent_again_is_cached_but_for_its_last_token() -> None:
    """A whole one, and what two prompts of one body find."""
    with harness(StampModel(1024), max_model_len=1024, num_snapshots=16, num_tails=4) as served:
        messages = [{"role": "user", "content": f"{TEXT} and {TEXT}"}]
        first, again = (served.chat(messages=messages, max_tokens=3) for _ in range(2))
        assert again["choices"] == first["choices"]
        assert (cached(first["usage"]), cached(again["usage"])) == (0, first["usage"]["prompt_tokens"] - 1)
        prompts = [[5 + n % 40 for n in range(600)], [6 + n % 40 for n in range(300)]]
        found = [cached(served.complete(prompt=prompts, max_tokens=2, temperature=0)["usage"]) for _ in range(2)]
        assert found == [0, 599 + 299]


def test_completions_count_each_prompt_once(served: Harness) -> None:
    """Of two prompts with two answers each, what the first answer of each found."""
    prompts = [[5 + n % 40 for n in range(600)], [6 + n % 40 for n in range(300)]]
    cold = served.complete(prompt=prompts, n=2, max_tokens=2, temperature=0, return_token_ids=True)
    assert cached(cold["usage"]) == 0
    warm = served.complete(prompt=prompts, n=2, max_tokens=2, temperature=0, return_token_ids=True)
    assert cached(warm["usage"]) == 512 + 256
    for answer in (cold, warm):
        ids = [choice["token_ids"] for choice in answer["choices"]]
        expected = [expected_answer(prompt, 2) for prompt in prompts]
        assert ids == [expected[0], expected[0], expected[1], expected[1]]


def test_a_salt_shares_with_itself_alone(served: Harness) -> None:
    def found(**fields: Any) -> int:
        return cached(served.complete(prompt=[7] * 300, max_tokens=1, **fields)["usage"])

    assert [found(), found(cache_salt="a"), found(cache_salt="b")] == [0, 0, 0]
    assert [found(), found(cache_salt="a"), found(cache_salt="b")] == [256, 256, 256]


@pytest.mark.parametrize("salt", ["", "x" * 257, 7])
def test_a_salt_is_a_text(served: Harness, salt: object) -> None:
    found = error(served.post("/v1/completions", prompt="hello", cache_salt=salt), 400)
    assert found["param"] == "cache_salt"


@pytest.mark.parametrize("form", ["Authorization: Bearer {}", "X-Api-Key: {}"])
@pytest.mark.parametrize("salts_by_key", [False, True])
def test_keys_share_unless_they_are_salts(salts_by_key: bool, form: str) -> None:
    """However a client sends its key."""
    rules, policy = Rules(access=AccessPolicy(KEYS)), RequestPolicy(salts_by_key=salts_by_key)
    with harness(StampModel(1024), max_model_len=1024, num_snapshots=16, rules=rules, policy=policy) as served:
        hits = []
        for key in (*KEYS, *KEYS):
            headers = dict([form.format(key).split(": ")])
            body = {"prompt": [7] * 300, "max_tokens": 1}
            response = served.ask("POST", "/v1/completions", json=body, headers=headers)
            hits.append(cached(response.json()["usage"]))
    assert hits == ([0, 0, 256, 256] if salts_by_key else [0, 256, 256, 256])
