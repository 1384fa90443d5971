"""``/tokenize``, ``/detokenize`` and ``/version``: vLLM's shapes, and the ids that requests are computed from."""

from typing import Any

import pytest
from cpu.chat.small_tokenizer import NUM_TOKENS, tokenizer_spec
from cpu.server.harness import HELLO, MAX_MODEL_LEN, MODEL_ID, TOKENIZER, Harness, answer, chat_ids, error, harness

from ownpath.chat.markers import BOS, EOS
from ownpath.chat.tokenizer import Tokenizer
from ownpath.server.access import AccessPolicy
from ownpath.server.app import Rules
from ownpath.server.body import Limits
from ownpath.server.token_api import MAX_TEXT_CHARS

TEXTS = ["hello", "", " ünï 🙂\n", f"{BOS}a{EOS}", "a" * 5000]
HALF = [*HELLO, {"role": "assistant", "content": "The sky"}]
KEY = "0123456789abcdef"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def tokenized(served: Harness, **fields: Any) -> dict[str, Any]:
    found = answer(served.post("/tokenize", **fields))
    assert list(found) == ["count", "max_model_len", "tokens", "token_strs"]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), MAX_MODEL_LEN)
    return found


@pytest.mark.parametrize("text", TEXTS, ids=len)
def test_a_text_comes_back_from_its_tokens(served: Harness, text: str) -> None:
    """Also one that the context has no room for: it is counted, not run."""
    found = tokenized(served, prompt=text)
    assert found["tokens"] == TOKENIZER.encode_raw(text)
    assert found["token_strs"] is None
    assert answer(served.post("/detokenize", tokens=found["tokens"])) == {"prompt": text}


def test_special_tokens_in_a_text_are_tokens(served: Harness) -> None:
    ids = tokenized(served, prompt=f"{BOS}a{EOS}")["tokens"]
    assert ids == [TOKENIZER.special_id(BOS), *TOKENIZER.encode_text("a"), TOKENIZER.special_id(EOS)]


def test_bos_is_added_as_the_tokenizer_says() -> None:
    with harness(tokenizer=Tokenizer(tokenizer_spec(), add_bos=True)) as served:
        bare = tokenized(served, prompt="hello", add_special_tokens=False)["tokens"]
        assert bare == TOKENIZER.encode_text("hello")
        assert tokenized(served, prompt="hello")["tokens"] == [TOKENIZER.special_id(BOS), *bare]
        ran = served.complete(max_tokens=1, return_token_ids=True)["choices"][0]["prompt_token_ids"]
        assert ran == [TOKENIZER.special_id(BOS), *bare]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": HELLO},
        {"messages": HELLO, "tools": TOOLS, "temperature": 0.5},
        {"messages": HELLO, "thinking": {"type": "enabled"}},
        {"messages": HELLO, "response_format": {"type": "json_object"}, "add_special_tokens": False},
        {"messages": HALF, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": HALF, "add_generation_prompt": False},
    ],
)
def test_a_conversation_has_the_tokens_of_its_prompt(fields: dict[str, Any]) -> None:
    with harness(max_model_len=2048) as served:
        found = answer(served.post("/tokenize", **fields))
        assert found["tokens"] == served.chat(max_tokens=1, return_token_ids=True, **fields)["prompt_token_ids"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_clients_that_tokenise_by_asking_learn_the_names_of_both_ends(add_bos: bool) -> None:
    with harness(tokenizer=Tokenizer(tokenizer_spec(), add_bos=add_bos)) as served:
        found = answer(served.ask("GET", "/tokenizer_info"))
        assert (found["bos_token"], found["eos_token"], found["add_bos_token"]) == (BOS, EOS, add_bos)
        assert (found["vocab_size"], found["model_max_length"]) == (NUM_TOKENS, MAX_MODEL_LEN)
        ends = [
            tokenized(served, prompt=found[name], add_special_tokens=False)["tokens"]
            for name in ("bos_token", "eos_token")
        ]
        assert ends == [[TOKENIZER.special_id(BOS)], [TOKENIZER.special_id(EOS)]]


def test_a_conversation_may_open_no_answer_while_it_thinks(served: Harness) -> None:
    """Nothing is generated, so nothing has to be read back."""
    found = tokenized(served, messages=HELLO, add_generation_prompt=False, thinking={"type": "enabled"})
    opened = chat_ids("hello")
    assert found["tokens"] == opened[:-2], "all but the assistant's marker and </think>"


def test_tokens_are_named_as_the_vocabulary_spells_them(served: Harness) -> None:
    found = tokenized(served, prompt=f"a b\n{EOS}ü", return_token_strs=True)
    names = found["token_strs"]
    assert len(names) == len(found["tokens"])
    # The byte-level alphabet: a space is U+0120, a line's end U+010A; special tokens are themselves.
    assert "".join(names) == f"aĠbĊ{EOS}Ã¼"
    long = tokenized(served, prompt="a b" * 2000, return_token_strs=True)
    assert "".join(long["token_strs"]) == "aĠb" * 2000


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (TOKENIZER.encode_text("🙂")[:-1], "\ufffd"),
        ([TOKENIZER.special_id(EOS)], EOS),
        (TOKENIZER.encode_text("ab") * 2000, "ab" * 2000),
    ],
)
def test_detokenize_shows_every_token(served: Harness, tokens: list[int], text: str) -> None:
    assert answer(served.post("/detokenize", tokens=tokens)) == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a" * (MAX_TEXT_CHARS + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * (MAX_TEXT_CHARS + 1)}]}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "typo": 1}, "typo"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HALF}, "messages"),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/detokenize", {"tokens": [NUM_TOKENS]}, "tokens"),
        ("/detokenize", {"tokens": [1], "typo": 1}, "typo"),
    ],
)
def test_other_requests_are_refused_by_name(served: Harness, path: str, fields: dict[str, Any], param: str) -> None:
    assert error(served.post(path, **fields), 400)["param"] == param


@pytest.mark.parametrize(("path", "fields"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_names_labels_and_limits_are_those_of_other_routes(path: str, fields: dict[str, Any]) -> None:
    with harness(limits=Limits(max_body_bytes=200)) as served:
        assert answer(served.post(path, model=MODEL_ID, **fields))
        assert error(served.post(path, model="other", **fields), 404)["code"] == "model_not_found"
        assert served.post(path, user="me", **fields).headers["x-ownpath-ignored"] == "user"
        error(served.post(path, user="m" * 200, **fields), 413)
        error(served.ask("POST", path, content=b"{}", headers={"content-type": "text/plain"}), 415)
        error(served.ask("GET", path), 405)
        metrics = served.ask("GET", "/metrics").text
        assert f'ownpath_http_requests_total{{handler="{path}",method="POST",status="200"}} 2' in metrics
        served.vitals.is_draining = True
        error(served.post(path, **fields), 503)


def test_they_want_a_key_where_others_do() -> None:
    with harness(rules=Rules(access=AccessPolicy(keys=(KEY,)))) as served:
        for path in ("/tokenize", "/detokenize"):
            error(served.post(path), 401)
        error(served.ask("GET", "/version"), 401)
        response = served.ask("GET", "/version", headers={"authorization": f"Bearer {KEY}"})
        assert list(answer(response)) == ["version"]
        assert answer(response)["version"]
