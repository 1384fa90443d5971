"""Reads servers' answers as log-probs by token id. Pure; every server's form is read here and nowhere else.

A name that stands for no token, or for several, gives no id: it is never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ownpath.chat.tokenizer import Tokenizer

Json = Mapping[str, Any]


class Unreadable(ValueError):
    """An answer that lacks what was asked for; the message names the field."""


@dataclass(frozen=True)
class ScoredPosition:
    """One position.

    token_id: None where its name is no token's. logprob: None where the server gave none.
    top: the tokens it lists, by id. num_unnamed: entries of the list whose name is no token's.
    """

    token_id: int | None
    logprob: float | None
    top: Mapping[int, float]
    num_unnamed: int = 0

    @property
    def is_whole(self) -> bool:
        return self.num_unnamed == 0


@dataclass(frozen=True)
class SequenceReading:
    """A server's log-probs of one sequence.

    ids: the sequence, as far as its ids are known; scored[n] is of ids[start + n].
    unnamed: the positions from the first token whose id is not known.
    is_stopped: the answer ended by itself, not at its limit.
    refusal: the server's words where it could not write these log-probs as JSON; then none has a value.
    is_blank: such an answer shows no text either.
    """

    ids: tuple[int, ...]
    start: int
    scored: tuple[ScoredPosition, ...]
    unnamed: tuple[ScoredPosition, ...] = ()
    is_stopped: bool = False
    refusal: str = ""
    is_blank: bool = False

    @property
    def all_rows(self) -> tuple[ScoredPosition, ...]:
        return self.scored + self.unnamed

    @property
    def scored_ids(self) -> tuple[int, ...]:
        return self.ids[self.start : self.start + len(self.scored)]


@dataclass(frozen=True)
class ChatReading:
    """One answer of the chat endpoint. ids: None where the server did not report them."""

    prompt_ids: tuple[int, ...] | None
    num_prompt_tokens: int | None
    num_tokens: int | None
    ids: tuple[int, ...] | None
    content: str
    reasoning: str
    has_calls: bool
    finish_reason: str | None


class TokenNames:
    """Looks up token ids by name, with the tokenizer of the model here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._num_tokens = tokenizer.num_tokens
        self._ids: dict[str, int | None] = {}
        for token_id in range(tokenizer.num_tokens):
            name = tokenizer.token_text(token_id)
            self._ids[name] = None if name in self._ids else token_id

    def id_of(self, name: object) -> int | None:
        """Returns the id of a text or of ``token_id:N``; None if it has none."""
        if not isinstance(name, str):
            return None
        prefix, _, number = name.partition(":")
        if prefix == "token_id" and number.isascii() and number.isdecimal() and len(number) < 10:
            return self.check(int(number))
        return self._ids.get(name)

    def check(self, token_id: object) -> int | None:
        """Returns an id that the server gave; None unless it is one of the tokenizer's."""
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < self._num_tokens
        return token_id if is_id else None  # type: ignore[return-value]

    def of_entry(self, entry: Json) -> int | None:
        """Returns the token of a ``content`` entry: by its id where it has one, else by its name."""
        return self.check(entry["id"]) if "id" in entry else self.id_of(entry.get("token"))


def choice_of(answer: Json) -> Json:
    """Returns the first choice. Errors: Unreadable."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unreadable("choices: there is none")
    first: Json = choices[0]
    return first


def read_prompt_logprobs(answer: Json, prompt_ids: Sequence[int], names: TokenNames) -> SequenceReading:
    """Reads vLLM's ``prompt_logprobs``: one object per position, keyed by token id. Errors: Unreadable."""
    rows = choice_of(answer).get("prompt_logprobs", answer.get("prompt_logprobs"))
    if not isinstance(rows, list) or len(rows) != len(prompt_ids):
        raise Unreadable("prompt_logprobs: not in the answer, or not one for each prompt token")
    scored = []
    for row, token_id in zip(rows[1:], prompt_ids[1:], strict=True):
        entries = row if isinstance(row, dict) else {}
        pairs = [(names.id_of(f"token_id:{key}"), value) for key, value in entries.items()]
        top = {
            key: p for key, value in pairs if key is not None and (p := _number(_field(value, "logprob"))) is not None
        }
        scored.append(ScoredPosition(token_id, top.get(token_id), top))
    return SequenceReading(tuple(prompt_ids), 1, tuple(scored))


def read_echo(answer: Json, prompt_ids: Sequence[int], names: TokenNames) -> SequenceReading:
    """Reads OpenAI's ``echo``: the prompt's tokens before the answer's. Errors: Unreadable."""
    scored = _read_logprobs(choice_of(answer), names)[: len(prompt_ids)]
    if len(scored) < len(prompt_ids):
        raise Unreadable("logprobs: echo was ignored, the prompt's tokens are not in them")
    for row, token_id in zip(scored, prompt_ids, strict=True):
        if row.token_id not in (None, token_id):
            raise Unreadable("logprobs: echo was ignored, or other tokens were read than were sent")
    rows = (replace(row, token_id=i) for row, i in zip(scored[1:], prompt_ids[1:], strict=True))
    return SequenceReading(tuple(prompt_ids), 1, tuple(rows))


def read_generated(answer: Json, prompt_ids: Sequence[int], names: TokenNames) -> SequenceReading:
    """Reads the answer's own tokens, as far as their ids are known. Errors: Unreadable."""
    choice = choice_of(answer)
    scored = _read_logprobs(choice, names)
    told = _ids(choice.get("token_ids"), names)
    if told is not None and len(told) == len(scored):
        scored = [replace(row, token_id=i) for i, row in zip(told, scored, strict=True)]
    num_known = next((n for n, row in enumerate(scored) if row.token_id is None), len(scored))
    ids = (row.token_id for row in scored[:num_known] if row.token_id is not None)
    known, unnamed = tuple(scored[:num_known]), tuple(scored[num_known:])
    is_stopped = choice.get("finish_reason") == "stop"
    return SequenceReading((*prompt_ids, *ids), len(prompt_ids), known, unnamed, is_stopped)


def read_plain(answer: Json, prompt_ids: Sequence[int], names: TokenNames, refusal: str) -> SequenceReading:
    """Reads an answer to a request without log-probs, after one with them was refused. Errors: Unreadable."""
    choice = choice_of(answer)
    told = _ids(choice.get("token_ids"), names) or ()
    message = choice.get("message")
    text = _text(message.get("content") if isinstance(message, dict) else choice.get("text"))
    rows = tuple(ScoredPosition(token_id, None, {}) for token_id in told)
    is_stopped = choice.get("finish_reason") == "stop"
    return SequenceReading((*prompt_ids, *told), len(prompt_ids), rows, (), is_stopped, refusal, not text.strip())


def refused_reading(prompt_ids: Sequence[int], refusal: str) -> SequenceReading:
    """Returns a prompt's reading without a single value: its log-probs were refused."""
    return SequenceReading(
        tuple(prompt_ids), 1, tuple(ScoredPosition(i, None, {}) for i in prompt_ids[1:]), refusal=refusal
    )


def read_chat(answer: Json, names: TokenNames) -> ChatReading:
    """Reads an answer of the chat endpoint. Errors: Unreadable."""
    choice = choice_of(answer)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unreadable("choices.0.message: there is none")
    ids = _ids(choice.get("token_ids"), names)
    entries = _field(choice.get("logprobs"), "content")
    if ids is None and isinstance(entries, list):
        found = [names.of_entry(entry) if isinstance(entry, dict) else None for entry in entries]
        ids = _ids(found, names)
    return ChatReading(
        read_prompt_ids(answer, names),
        read_prompt_count(answer),
        _count(_field(answer.get("usage"), "completion_tokens")),
        ids,
        _text(message.get("content")),
        _text(message.get("reasoning_content")) or _text(message.get("reasoning")),
        bool(message.get("tool_calls")),
        _text(choice.get("finish_reason")) or None,
    )


def read_prompt_ids(answer: Json, names: TokenNames) -> tuple[int, ...] | None:
    """Returns the prompt's ids as the server read it, if it reports them."""
    return _ids(answer.get("prompt_token_ids") or choice_of(answer).get("prompt_token_ids"), names)


def read_prompt_count(answer: Json) -> int | None:
    """Returns the number of the prompt's tokens, if the server counts them."""
    return _count(_field(answer.get("usage"), "prompt_tokens"))


def _read_logprobs(choice: Json, names: TokenNames) -> list[ScoredPosition]:
    """Reads either form: parallel lists (completions), or ``content`` entries (chat, and llama.cpp's completions)."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise Unreadable("logprobs: not in the answer")
    entries = logprobs.get("content")
    if isinstance(entries, list):
        return [_of_entry(entry, names) for entry in entries if isinstance(entry, dict)]
    tokens, values, tops = (logprobs.get(key) or [] for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        raise Unreadable("logprobs: tokens and token_logprobs are not lists of one length")
    lists = tops if isinstance(tops, list) and len(tops) == len(tokens) else [None] * len(tokens)
    rows = []
    for token, value, listed in zip(tokens, values, lists, strict=True):
        top, num_unnamed = _top([(names.id_of(name), number) for name, number in (listed or {}).items()])
        rows.append(ScoredPosition(names.id_of(token), _number(value), top, num_unnamed))
    return rows


def _of_entry(entry: Json, names: TokenNames) -> ScoredPosition:
    listed = [item for item in entry.get("top_logprobs") or [] if isinstance(item, dict)]
    top, num_unnamed = _top([(names.of_entry(item), item.get("logprob")) for item in listed])
    return ScoredPosition(names.of_entry(entry), _number(entry.get("logprob")), top, num_unnamed)


def _top(pairs: Sequence[tuple[int | None, object]]) -> tuple[dict[int, float], int]:
    """Returns a list by id, and how many entries have none."""
    numbers = [(token_id, _number(value)) for token_id, value in pairs]
    top = {token_id: p for token_id, p in numbers if token_id is not None and p is not None}
    return top, len(pairs) - len(top)


def _ids(value: object, names: TokenNames) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    ids = [names.check(item) for item in value]
    return None if None in ids else tuple(item for item in ids if item is not None)


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
