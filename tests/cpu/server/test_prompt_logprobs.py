"""``prompt_logprobs``, vLLM's field: what the answer says of each token of its prompt, and what is too much."""

import json
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID, FakeModel
from cpu.server.harness import TOKENIZER, VOCAB, Harness, chat_ids, error, harness

from ownpath.server import prompt_scores

TEXT = "hello world"
IDS = TOKENIZER.encode_text(TEXT)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_IDS = TOKENIZER.num_tokens


def expected(served: Harness, ids: list[int], num_top: int) -> list[dict[str, dict[str, Any]] | None]:
    """The definition: after each prefix, the model's log-probs over the tokenizer's vocabulary, sorted."""
    entries: list[dict[str, dict[str, Any]] | None] = [None]
    for at in range(1, len(ids)):
        row = served.model.rule(tuple(ids[:at]))[:NUM_IDS].log_softmax(-1).tolist()
        order = sorted(range(NUM_IDS), key=lambda i: -row[i])
        told = {ids[at], *order[:num_top]}
        entries.append(
            {
                str(i): {"logprob": row[i], "rank": order.index(i) + 1, "decoded_token": TOKENIZER.token_text(i)}
                for i in told
            }
        )
    return entries


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_every_token_of_a_prompt_is_told_with_its_likeliest_rivals(served: Harness, num_top: int) -> None:
    (choice,) = served.complete(prompt=TEXT, prompt_logprobs=num_top, max_tokens=2, return_token_ids=True)["choices"]
    assert choice["prompt_logprobs"] == expected(served, IDS, num_top)
    assert [next(iter(entry)) for entry in choice["prompt_logprobs"][1:]] == [str(i) for i in IDS[1:]], "itself first"
    assert choice["logprobs"] is None
    assert len(choice["token_ids"]) == 2, "the answer follows"


def test_the_prompt_of_a_conversation_is_told_once(served: Harness) -> None:
    answer = served.chat(messages=[{"role": "user", "content": TEXT}], prompt_logprobs=3, n=2, max_tokens=3, seed=1)
    assert answer["prompt_logprobs"] == expected(served, chat_ids(TEXT), 3)
    plain = served.chat(messages=[{"role": "user", "content": TEXT}], n=2, max_tokens=3, seed=1)
    assert answer["choices"] == plain["choices"], "scores change nothing"
    assert "prompt_logprobs" not in plain


def test_each_answer_of_each_prompt_has_its_own(served: Harness) -> None:
    prompts = [IDS, [20, 21, 22], [23]]
    answer = served.complete(prompt=prompts, n=2, prompt_logprobs=2, max_tokens=1)
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"] == expected(served, prompts[choice["index"] // 2], 2)


def test_a_prompt_may_be_scored_and_nothing_else(served: Harness) -> None:
    answer = served.complete(prompt=IDS, prompt_logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["prompt_logprobs"] == expected(served, IDS, 1)
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("", "length", 0)


@pytest.mark.parametrize(("logprobs", "num_top"), [(1, 4), (4, 1), (0, 0)])
def test_echo_tells_the_same_numbers_in_openais_form(served: Harness, logprobs: int, num_top: int) -> None:
    fields = {"prompt": IDS, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": logprobs}
    (both,) = served.complete(**fields, prompt_logprobs=num_top)["choices"]
    (echo,) = served.complete(**fields)["choices"]
    assert both["logprobs"] == echo["logprobs"], "as many as without the other field"
    assert both["prompt_logprobs"] == expected(served, IDS, num_top)
    told = [entry[str(i)]["logprob"] for entry, i in zip(both["prompt_logprobs"][1:], IDS[1:], strict=True)]
    assert told == echo["logprobs"]["token_logprobs"][1 : len(IDS)]


def test_equal_tokens_outside_the_likeliest_share_the_last_rank() -> None:
    rows = torch.zeros(VOCAB)
    rows[[7, 8]] = torch.tensor([2.0, 1.0])
    rows[EOS_ID] = -50
    with harness(FakeModel(lambda history: rows, VOCAB)) as flat:
        (choice,) = flat.complete(prompt=[20, 30, 8, 7], prompt_logprobs=1, max_tokens=1)["choices"]
    ranks = [entry[key]["rank"] for entry, key in zip(choice["prompt_logprobs"][1:], ("30", "8", "7"), strict=True)]
    assert ranks == [NUM_IDS - 1, 2, 1], "all but EOS are as likely as token 30, or likelier"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields", [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True}, {"prompt_logprobs": 1.0}]
)
def test_other_numbers_are_refused(served: Harness, path: str, fields: dict[str, Any]) -> None:
    opening = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    body: dict[str, Any] = {**opening, "max_tokens": 2}
    assert error(served.post(path, **body, **fields), 400)["param"] == "prompt_logprobs"
    refused = error(served.post(path, **body, prompt_logprobs=0, stream=True), 400)
    assert refused["message"] == "prompt_logprobs: not with stream: true"
    assert served.post(path, **body, prompt_logprobs=None, stream=True).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "num_each"),
    [
        ({"prompt_logprobs": 4}, "prompt_logprobs", 5),
        ({"logprobs": 4, "echo": True}, "logprobs", 5),
        ({"logprobs": 4}, None, 0),
        ({"prompt_logprobs": 4, "n": 3}, "prompt_logprobs", 15),
    ],
)
def test_scores_of_long_prompts_are_bounded(
    served: Harness, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str | None, num_each: int
) -> None:
    """The bound itself is allowed; one token more is not."""
    monkeypatch.setattr(prompt_scores, "MAX_SCORES", 20 * max(num_each, 1))
    assert served.post(COMPLETIONS, prompt=[30] * 20, max_tokens=1, **fields).status_code == 200
    response = served.post(COMPLETIONS, prompt=[30] * 21, max_tokens=1, **fields)
    if param is None:
        assert response.status_code == 200
    else:
        assert error(response, 400)["param"] == param


def test_a_whole_answer_of_scores_is_json_that_reads_back(served: Harness) -> None:
    """Longer than what is written at once: names are looked up, and the text is written, beside the event loop."""
    ids = [30 + i % 40 for i in range(120)]
    text = served.post(COMPLETIONS, prompt=ids, max_tokens=1, prompt_logprobs=20).text
    assert json.loads(text)["choices"][0]["prompt_logprobs"] == expected(served, ids, 20)
