"""Masks of several answers, filled together: each is its own grammar's, whatever the others are."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from ownpath.engine.masks import MaskWords
from ownpath.structured import filling
from ownpath.structured.grammar import compile_grammar
from ownpath.structured.matcher import AnswerMatcher, FreeMasks, FreePart
from ownpath.structured.vocabulary import Vocabulary, library_tokenizer

pytest.importorskip("llguidance")

LETTERS = [bytes([letter]) for letter in range(32, 127)]
THINK, EOS = len(LETTERS), len(LETTERS) + 1
VOCABULARY = Vocabulary([*LETTERS, b"</think>", b"<end>"], (THINK, EOS), (EOS,))
NUM_WORDS = -(-len(VOCABULARY.tokens) // 32)
LIBRARY = library_tokenizer(VOCABULARY)
MASKS = FreeMasks(VOCABULARY)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filling, "NUM_THREADS", request.param)
    filling._executor.cache_clear()
    yield
    filling._executor.cache_clear()


def matcher(texts: Sequence[str], free: Sequence[FreePart] = (), goes_on: bool = False) -> AnswerMatcher:
    """Follows an answer that is one of these texts."""
    return AnswerMatcher(MASKS, compile_grammar(LIBRARY, f"start: {' | '.join(map(json.dumps, texts))}"), free, goes_on)


def ids_of(text: str) -> list[int]:
    return [ord(letter) - 32 for letter in text]


def next_ids(texts: Sequence[str], said: str) -> set[int]:
    """The definition: the letters with which a text goes on, and the end where one is whole."""
    rests = [text[len(said) :] for text in texts if text.startswith(said)]
    return {ord(rest[0]) - 32 if rest else EOS for rest in rests}


def fill(answers: Sequence[tuple[AnswerMatcher, list[int]]]) -> list[set[int]]:
    """Returns the tokens that each may have next. Rows of others lie between theirs, and stay as they are."""
    rows_SW: MaskWords = np.full((2 * len(answers), NUM_WORDS), 77, np.int32)
    AnswerMatcher.fill_all([(2 * n, one, ids) for n, (one, ids) in enumerate(answers)], rows_SW)
    assert (rows_SW[1::2] == 77).all()
    bits = np.unpackbits(rows_SW[::2].view(np.uint8), axis=1, bitorder="little")[:, : len(VOCABULARY.tokens)]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


CHOICES = [["yes", "no"], ["a", "ab", "abc"], ["no", "nothing"], ["x"], ["abcdef", "abcxyz"]]
ALL = set(range(len(VOCABULARY.tokens)))


def test_each_has_its_own_grammars_mask_token_after_token() -> None:
    """Answers of other lengths: those that are over stay where they are, and are asked again."""
    answers = [(matcher(texts), texts[-1]) for texts in CHOICES]
    for length in range(7):
        said = [text[:length] for _, text in answers]
        found = fill([(one, ids_of(text)) for (one, _), text in zip(answers, said, strict=True)])
        assert found == [next_ids(texts, text) for texts, text in zip(CHOICES, said, strict=True)]


def test_several_tokens_may_be_new_at_once() -> None:
    assert fill([(matcher(["nothing"]), ids_of("noth")) for _ in range(5)]) == [{ord("i") - 32}] * 5


def test_end_tokens_wait_while_something_else_may_follow() -> None:
    texts = [["a", "ab"], ["a"], ["ab"], ["a", "ab"], ["a"]]
    found = fill([(matcher(own, goes_on=n < 3), ids_of("a")) for n, own in enumerate(texts)])
    b = ord("b") - 32
    assert found == [{b}, {EOS}, {b}, {b, EOS}, {EOS}]


def test_free_parts_and_grammars_lie_side_by_side() -> None:
    """Reasoning is free but for end tokens; behind its marker the grammar begins."""
    thinking = [FreePart(THINK)]
    answers = [matcher(["yes"], thinking), matcher(["no"]), matcher(["x"], thinking), *(matcher(["z"]) for _ in "abc")]
    ids: list[list[int]] = [[], [], [*ids_of("hm"), THINK], [], [], []]
    z = [{ord("z") - 32}] * 3
    assert fill(list(zip(answers, ids, strict=True))) == [ALL - {EOS}, {ord("n") - 32}, {ord("x") - 32}, *z]
    ids[0], ids[2] = [THINK], [*ids[2], ord("x") - 32]
    assert fill(list(zip(answers, ids, strict=True))) == [{ord("y") - 32}, {ord("n") - 32}, {EOS}, *z]


def test_a_grammar_that_cannot_go_on_bars_its_own_row_alone() -> None:
    answers = [matcher(["yes"]) for _ in range(5)]
    found = fill([(one, ids_of("q" if n == 2 else "y")) for n, one in enumerate(answers)])
    e = {ord("e") - 32}
    assert found == [e, e, set(), e, e]
    assert [one.problem is None for one in answers] == [True, True, False, True, True]
