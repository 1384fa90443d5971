"""Text while tokens arrive: whole characters, and stop strings that are never shown."""

import json

import pytest
from cpu.chat.small_tokenizer import FIRST_BYTE_ID, small_tokenizer, tokenizer_spec
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer

from ownpath.chat.answer import Answer, content_of
from ownpath.chat.detokenize import Detokenizer, StopMatcher

TOKENIZER = small_tokenizer()
BACKEND = BackendTokenizer.from_str(json.dumps(tokenizer_spec()))
ANY_IDS = st.lists(st.integers(0, TOKENIZER.num_tokens - 1))


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE_ID + byte for byte in data]


@given(st.text())
def test_characters_split_over_tokens_appear_whole(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.feed(i) for i in byte_ids(text.encode())]
    assert "".join(pieces) == text
    shown = b""
    for position, piece in enumerate(pieces, start=1):
        shown += piece.encode()
        assert text.encode()[:position].startswith(shown), "a piece appears no earlier than its last byte"


@given(ANY_IDS)
def test_any_tokens_give_the_text_that_the_tokenizers_library_gives(ids: list[int]) -> None:
    """The library decodes all at once and marks an unfinished character at the end; ours leaves that tail out."""
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(detokenizer.feed(i) for i in ids)
    whole = BACKEND.decode([i for i in ids if TOKENIZER.token_bytes(i)], skip_special_tokens=True)
    assert whole in (text, text + "\ufffd")


SURROGATES = st.sampled_from([byte_ids(b"\xed\xa0\x80"), byte_ids(b"\xed\xbf"), byte_ids(b"\xed"), byte_ids(b"\xa0")])


@given(st.lists(ANY_IDS | SURROGATES), st.booleans())
def test_tokens_fed_together_give_the_text_of_single_ones(pieces: list[list[int]], show_special: bool) -> None:
    together, apart = Detokenizer(TOKENIZER, show_special), Detokenizer(TOKENIZER, show_special)
    for ids in pieces:
        assert together.feed_all(ids) == "".join(apart.feed(i) for i in ids)
        assert together.is_inside_character == apart.is_inside_character


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xe2\x82\xac", "€"),
        (b"\xe2\x82", ""),
        (b"\xe2\x82a", "\ufffda"),
        (b"\x80a", "\ufffda"),
        (b"\xed\xa0", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xed\x9f", ""),
        (b"\xf0\x9f\x99\x82", "🙂"),
        (b"\xf0\x9f\x99", ""),
    ],
)
def test_broken_bytes(data: bytes, text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert "".join(detokenizer.feed(i) for i in byte_ids(data)) == text


def test_markers_are_hidden_unless_asked_for() -> None:
    ids = [2, *byte_ids(b"a"), 1]
    hidden, shown = Detokenizer(TOKENIZER), Detokenizer(TOKENIZER, show_special=True)
    assert "".join(hidden.feed(i) for i in ids) == "a"
    assert "".join(shown.feed(i) for i in ids) == "<｜User｜>a<｜end▁of▁sentence｜>"


def shown_by(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces)
    return (shown if matcher.matched is not None else shown + matcher.flush()), matcher.matched


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "abc", "abc", None),
        (["b"], "abc", "a", "b"),
        (["bc"], "abd", "abd", None),
        (["bc"], "ab", "ab", None),
        (["aab"], "aaab", "a", "aab"),
        (["bcd", "c"], "abcd", "ab", "c"),
        (["abc", "bc"], "abc", "", "abc"),
        (["\n\n"], "a\n\n\n", "a", "\n\n"),
        (["🙂"], "a🙂b", "a", "🙂"),
    ],
)
def test_the_first_completed_stop_string_ends_the_text(
    stops: list[str], text: str, shown: str, matched: str | None
) -> None:
    assert shown_by(stops, [text]) == (shown, matched)
    assert shown_by(stops, list(text)) == (shown, matched)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=6),
)
def test_the_cut_does_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, matched = shown_by(stops, pieces)
    assert (shown, matched) == shown_by(stops, list(text))
    assert not any(stop in shown for stop in stops)
    if matched is None:
        assert shown == text
    else:
        assert text.startswith(shown + matched)


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    matcher = StopMatcher(["stop"])
    assert [matcher.feed(piece) for piece in ["a s", "t", "o", "x", "sto"]] == ["a ", "", "", "stox", ""]
    assert matcher.flush() == "sto"


def test_an_answer_stops_across_token_boundaries() -> None:
    answer = Answer(TOKENIZER, ["lo w"])
    ids = TOKENIZER.encode_text("hello world")
    assert len(ids) < len("hello world"), "the merges make multi-character tokens"
    assert "".join(content_of(answer.feed(i)) for i in ids) == "hel"
    assert answer.is_stopped
    assert answer.feed(ids[0]) == []
    assert answer.finish() == []


def test_a_marker_ends_an_unfinished_character() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.feed(byte_ids(b"\xe2")[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert "".join(detokenizer.feed(i) for i in byte_ids("€".encode())) == "€", "nothing of it is left"
