"""Turns one answer's tokens into what clients see: whole characters, split into parts, up to a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from ownpath.chat.detokenize import Detokenizer, StopMatcher
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import AnswerPart, CallInReasoning, Content, MalformedMarkup, Reasoning
from ownpath.chat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shown:
    """Additions to what an answer shows: its text alone, unless asked otherwise.

    special_tokens: markers that the model wrote and that are no structure, as text where they stand; not inside and
        behind a block of calls, so that calls read the same. stop_string: the one that ended it.
    """

    special_tokens: bool = False
    stop_string: bool = False

    @property
    def has_end_token(self) -> bool:
        """True if the model's end token is shown too: it is special, and ends the answer."""
        return self.special_tokens and self.stop_string


_TEXT_ALONE = Shown()


class Answer:
    """Parses one answer into parts, token by token.

    Stop strings are searched in the content only, not in reasoning or tool calls.

    max_calls: the answer is over with this many whole calls; None: with as many as the model writes.
    min_tokens: no stop string is searched in what the first so many tokens show.
    shows_end_token: the model's end token is text too, to be fed.
    num_chars: characters generated so far, shown or held back.
    Errors: MissingMarkerError when the vocabulary lacks a marker that the parser needs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        parser: AnswerParser | None = None,
        max_calls: int | None = None,
        min_tokens: int = 0,
        shown: Shown = _TEXT_ALONE,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, show_special=shown.special_tokens)
        self._matcher = StopMatcher(stops, shown.stop_string)
        self._shows_special, self.shows_end_token = shown.special_tokens, shown.has_end_token
        self._parser = parser or AnswerParser()
        self._markers = {tokenizer.special_id(marker): marker for marker in self._parser.markers}
        self._thinks = self._parser.is_reasoning
        self._max_calls, self._num_unsearched = max_calls, min_tokens
        self._is_searching = min_tokens == 0
        self.num_chars = 0

    @property
    def has_all_calls(self) -> bool:
        """True once there are as many whole calls as there may be."""
        return self._max_calls is not None and self._parser.num_whole_calls >= self._max_calls

    @property
    def may_end_itself(self) -> bool:
        """True if its text may end the answer: there are stop strings, or a limit on calls."""
        return self._matcher.has_stops or self._max_calls is not None

    @property
    def is_stopped(self) -> bool:
        """True once a stop string was completed; nothing behind it is shown."""
        return self._matcher.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was completed; None without one."""
        return self._matcher.matched

    @property
    def asks_for_tools(self) -> bool:
        """True if there is a tool call and every one is whole."""
        return self._parser.asks_for_tools

    @property
    def is_reasoning(self) -> bool:
        """True while the reasoning block is open."""
        return self._parser.is_reasoning

    @property
    def has_reasoned(self) -> bool:
        """True if there was a reasoning block and it is closed."""
        return self._thinks and not self._parser.is_reasoning

    @property
    def has_cut_off_character(self) -> bool:
        """True if the tokens so far end inside a character, which is not shown then."""
        return self._detokenizer.is_inside_character

    def feed(self, token_id: int) -> list[AnswerPart]:
        """Takes one token and returns what can be shown after it."""
        self._is_searching = self._num_unsearched == 0
        self._num_unsearched = max(self._num_unsearched - 1, 0)
        if token_id in self._markers:
            parts = self._text(self._detokenizer.flush())
            return self._shown(parts + self._parser.feed_marker(self._markers[token_id]))
        hides_special = self._shows_special and self._parser.has_calls
        return self._shown(self._text(self._detokenizer.feed(token_id, hides_special=hides_special)))

    def is_text(self, token_ids: Sequence[int]) -> bool:
        """True if these tokens can only be more text: none of them ends the answer or changes what its text is."""
        reads_text = self._parser.reads_text and not self._parser.has_calls
        return not self._matcher.has_stops and reads_text and self._markers.keys().isdisjoint(token_ids)

    def feed_text(self, token_ids: Sequence[int]) -> list[AnswerPart]:
        """Takes tokens for which ``is_text`` holds: the parts that ``feed`` returns for them one by one, joined."""
        return self._shown(self._text(self._detokenizer.feed_all(token_ids)))

    def finish(self) -> list[AnswerPart]:
        """Ends the answer and returns what was held back."""
        return self._shown(self._parser.finish()) + self._release()

    def _text(self, text: str) -> list[AnswerPart]:
        self.num_chars += len(text)
        return self._parser.feed(text)

    def _shown(self, parts: Sequence[AnswerPart]) -> list[AnswerPart]:
        shown: list[AnswerPart] = []
        for part in parts:
            if self.is_stopped:
                break
            if isinstance(part, Content):
                text = self._matcher.feed(part.text) if self._is_searching else part.text
                shown += [Content(text)] if text else []
            elif isinstance(part, Reasoning | MalformedMarkup | CallInReasoning):
                shown.append(part)
            else:
                shown += [*self._release(), part]
        return shown

    def _release(self) -> list[AnswerPart]:
        """Returns content that was held back for a possible stop string."""
        text = "" if self.is_stopped else self._matcher.flush()
        return [Content(text)] if text else []


def content_of(parts: Sequence[AnswerPart]) -> str:
    """Joins the content among the parts."""
    return "".join(part.text for part in parts if isinstance(part, Content))
