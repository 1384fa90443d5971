"""Two readings of one vocabulary, and files that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest
from cpu.chat.small_tokenizer import FIRST_BYTE_ID, NUM_TOKENS, small_tokenizer, tokenizer_spec
from hypothesis import given
from hypothesis import strategies as st

import ownpath
from ownpath.chat.markers import BOS, EOS, SPECIALS, USER
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer, TokenizerError

TOKENIZER = small_tokenizer()


@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    data = b"".join(TOKENIZER.token_bytes(i) for i in TOKENIZER.encode_text(text))
    assert data.decode("utf-8") == text


@given(st.lists(st.sampled_from([BOS, EOS, USER, "<think>", "</think>", "a", "hello", "｜"])))
def test_plain_text_never_becomes_a_special_token(parts: list[str]) -> None:
    assert all(i >= FIRST_BYTE_ID for i in TOKENIZER.encode_text("".join(parts)))


def test_raw_text_recognises_special_tokens() -> None:
    assert TOKENIZER.encode_raw(f"{BOS}{USER}a") == [0, 2, FIRST_BYTE_ID + ord("a")]


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_added_to_raw_text_only_if_configured(add_bos: bool) -> None:
    tokenizer = small_tokenizer(add_bos)
    assert tokenizer.encode_raw("a") == [0] * add_bos + [FIRST_BYTE_ID + ord("a")]
    assert tokenizer.encode_text("a") == [FIRST_BYTE_ID + ord("a")]


def test_every_byte_has_its_own_token() -> None:
    assert [TOKENIZER.token_bytes(FIRST_BYTE_ID + byte) for byte in range(256)] == [bytes([b]) for b in range(256)]


def test_sizes() -> None:
    assert TOKENIZER.num_tokens == NUM_TOKENS
    assert TOKENIZER.max_token_bytes == len(BOS.encode())
    assert TOKENIZER.eos_id == 1
    assert TOKENIZER.token_bytes(FIRST_BYTE_ID - 1) == b"", "a hole in the vocabulary stands for nothing"


def test_token_names() -> None:
    assert TOKENIZER.token_text(FIRST_BYTE_ID + ord("a")) == "a"
    assert TOKENIZER.token_text(FIRST_BYTE_ID + 0xE2) == "bytes:\\xe2"
    assert TOKENIZER.token_text(0) == BOS


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(TokenizerError, match="character 1"):
        TOKENIZER.encode_text("a\ud800")


def test_from_folder_reads_both_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_spec()), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode_raw("a") == [FIRST_BYTE_ID + ord("a")]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}', encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode_raw("a")[0] == 0


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    spec = tokenizer_spec()
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": EOS,
    }  # fmt: skip
    assert len(Tokenizer(spec).encode_text("abcdef")) == 6


def test_a_vocabulary_that_cannot_keep_a_marker_as_text_says_so() -> None:
    spec = tokenizer_spec()
    spec["model"]["ignore_merges"] = True
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode_text("hello") == TOKENIZER.encode_text("hello")
    with pytest.raises(TokenizerError, match="'<think>' as plain text"):
        tokenizer.encode_text("<think>")


def _renumbered() -> list[dict[str, Any]]:
    tokens = tokenizer_spec()["added_tokens"]
    return [tokens[0] | {"id": 9}, *tokens[1:]]


BROKEN: dict[str, Any] = {
    "decoder must be ByteLevel": {"decoder": {"type": "WordPiece"}},
    "added_tokens must list": {"added_tokens": [{"id": 0}]},
    "special token": {"added_tokens": []},
    "has id 9, but would be read as 0": {"added_tokens": _renumbered()},
    "tokenizer.json": {"model": {"type": "nothing"}},
}


@pytest.mark.parametrize("problem", BROKEN)
def test_an_unusable_file_is_refused_with_its_name(problem: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_spec() | BROKEN[problem]), encoding="utf-8")
    with pytest.raises(TokenizerError, match=problem) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_an_unreadable_file_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_the_embedded_model_has_every_marker() -> None:
    tokenizer = Tokenizer.from_folder(Path(ownpath.__file__).parent / "assets" / "tiny-v4")
    assert len({tokenizer.special_id(marker) for marker in SPECIALS}) == len(SPECIALS)


def test_a_missing_marker_is_named() -> None:
    spec = tokenizer_spec(specials={BOS: 0, EOS: 1})
    with pytest.raises(MissingMarkerError) as caught:
        Tokenizer(spec).special_id(USER)
    assert caught.value.marker == USER
