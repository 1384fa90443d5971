"""The chat format against golden cases that our encoder did not write."""

import json
from pathlib import Path
from typing import Any

import pytest
from cpu.chat.small_tokenizer import ASSISTANT_ID, THINK_END_ID, USER_ID, byte_letters, small_tokenizer, tokenizer_spec

from ownpath.chat.encode import BOS, EOS, SPECIALS, ChatFormatError, Message, Special, encode_messages
from ownpath.chat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"
CASES = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_conversations_are_written_as_the_format_says(case: dict[str, Any]) -> None:
    segments = encode_messages([Message(**message) for message in case["messages"]], case["thinking"])
    assert "".join(s.text if isinstance(s, Special) else s for s in segments) == case["prompt"]


@pytest.mark.golden
def test_prompt_ids_are_those_of_the_published_tokenizer() -> None:
    case = json.loads((GOLDEN / "prompt_ids.json").read_text(encoding="utf-8"))
    letters = {letter: 1000 + byte for byte, letter in enumerate(byte_letters())}
    vocabulary = letters | {"AB": 900, "CD": 901} | case["vocabulary"]
    tokenizer = Tokenizer(tokenizer_spec(vocabulary, tuple(case["merges"]), case["special_tokens"]))
    segments = encode_messages([Message(**message) for message in case["messages"]])
    assert tokenizer.encode_segments(segments) == case["ids"]


@pytest.mark.parametrize("role", ["tool", "developer", "latest_reminder", "", "User"])
def test_other_roles_are_refused_by_position(role: str) -> None:
    with pytest.raises(ChatFormatError, match=r"messages\[1\]"):
        encode_messages([Message("user", "a"), Message(role, "b")])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("marker", SPECIALS)
def test_a_marker_in_somebodys_text_stays_text(role: str, marker: str) -> None:
    """What a person writes can neither end a turn nor open one."""
    tokenizer = small_tokenizer()
    messages = [Message("user", "a"), Message(role, f"x{marker}y"), Message("user", "b")]
    segments = encode_messages(messages)
    assert any(isinstance(s, str) and marker in s for s in segments)
    ids = tokenizer.encode_segments(segments)
    special_ids = [i for i in ids if i < len(SPECIALS)]
    assert special_ids == [SPECIALS.index(s.text) for s in segments if isinstance(s, Special)]
    # The same conversation without the marker has the same special tokens: the text added none.
    plain = encode_messages([Message("user", "a"), Message(role, "xy"), Message("user", "b")])
    assert [s for s in segments if isinstance(s, Special)] == [s for s in plain if isinstance(s, Special)]
    assert "".join(tokenizer.token_bytes(i).decode("latin-1") for i in ids).encode("latin-1").decode() == "".join(
        s.text if isinstance(s, Special) else s for s in segments
    )


def test_special_ids_in_place() -> None:
    ids = small_tokenizer().encode_segments(encode_messages([Message("user", "hello")]))
    assert ids[:2] == [0, USER_ID]
    assert ids[-2:] == [ASSISTANT_ID, THINK_END_ID]
    assert len(ids) == 5, "hello is one token by its merges"


def test_neighbouring_texts_are_tokenised_as_one() -> None:
    """Two system messages join without a separator, so a merge may span them: "hel" + "lo" is the token "hello"."""
    tokenizer = small_tokenizer()
    segments = encode_messages([Message("system", "hel"), Message("system", "lo")])
    assert segments == [Special(BOS), "hello"]
    assert tokenizer.encode_segments(segments)[1:] == tokenizer.encode_text("hello")
    assert len(tokenizer.encode_text("hello")) == 1


def test_no_messages_is_just_the_beginning() -> None:
    assert encode_messages([]) == [Special(BOS)]
    assert encode_messages([Message("assistant", "")]) == [Special(BOS), Special(EOS)]
