"""One answer on its way from tokens to what is shown of it: whole characters, its parts, up to a stop string."""

from collections.abc import Sequence

from ownpath.chat.detokenize import Detokenizer, StopMatcher
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import Content, Malformed, Part, Reasoning
from ownpath.chat.tokenizer import Tokenizer


class Answer:
    """The parts of one answer, token by token.

    Stop strings are looked for in the content alone: reasoning and tool calls are not what they are about.

    num_chars: characters generated so far, shown or held back.
    Errors: MissingMarkerError when the vocabulary lacks a marker that the parser is to be fed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], parser: AnswerParser | None = None) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._parser = parser or AnswerParser()
        self._markers = {tokenizer.special_id(marker): marker for marker in self._parser.markers}
        self._thinks = self._parser.is_reasoning
        self.num_chars = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was completed; nothing is shown any more."""
        return self._matcher.matched is not None

    @property
    def asks_for_tools(self) -> bool:
        """Whether there is a tool call, and each one is whole."""
        return self._parser.asks_for_tools

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning block is still open."""
        return self._parser.is_reasoning

    @property
    def has_reasoned(self) -> bool:
        """Whether there was a reasoning block, and it is closed."""
        return self._thinks and not self._parser.is_reasoning

    @property
    def has_cut_off_character(self) -> bool:
        """Whether the tokens so far end inside a character, which is not shown then."""
        return self._detokenizer.is_inside_character

    def feed(self, token_id: int) -> list[Part]:
        """What can be shown after this token."""
        if token_id in self._markers:
            parts = self._text(self._detokenizer.flush())
            return self._shown(parts + self._parser.feed_marker(self._markers[token_id]))
        return self._shown(self._text(self._detokenizer.feed(token_id)))

    def finish(self) -> list[Part]:
        """What was held back, once no token follows."""
        return self._shown(self._parser.finish()) + self._released()

    def _text(self, text: str) -> list[Part]:
        self.num_chars += len(text)
        return self._parser.feed(text)

    def _shown(self, parts: Sequence[Part]) -> list[Part]:
        shown: list[Part] = []
        for part in parts:
            if self.is_stopped:
                break
            if isinstance(part, Content):
                text = self._matcher.feed(part.text)
                shown += [Content(text)] if text else []
            elif isinstance(part, Reasoning | Malformed):
                shown.append(part)
            else:
                shown += [*self._released(), part]
        return shown

    def _released(self) -> list[Part]:
        """Content that a stop string could have claimed."""
        text = "" if self.is_stopped else self._matcher.flush()
        return [Content(text)] if text else []


def content_of(parts: Sequence[Part]) -> str:
    """The text for people among the parts."""
    return "".join(part.text for part in parts if isinstance(part, Content))
