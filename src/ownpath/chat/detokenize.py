"""Turns token ids into text while they arrive: whole characters only, up to a stop string or with it."""

import codecs
import re
from collections.abc import Sequence

from ownpath.chat.tokenizer import Tokenizer

SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
"""The UTF-8 encoding of half a UTF-16 pair begins so: well-formed bits, but no character."""


class Detokenizer:
    """Turns tokens into text as soon as their bytes are whole characters.

    A character split over tokens appears with its last byte. Bytes that can never become a character appear as U+FFFD
    once that is certain. A tail that is incomplete when the tokens end is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, show_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int, *, hides_special: bool = False) -> str:
        """Takes one token and returns the text that it completes, which may be empty. hides_special: here, whatever
        is shown elsewhere."""
        if self._tokenizer.is_hidden(token_id) and (hides_special or not self._show_special):
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        pending, _ = self._decoder.getstate()
        if SURROGATE.fullmatch(pending):
            # The decoder waits for a third byte, which cannot complete the character.
            text += self.flush()
        return text

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """Takes several tokens and returns the text that ``feed`` returns for them one by one, joined."""
        data = self._tokenizer.join_bytes(token_ids, show_hidden=self._show_special)
        if SURROGATE.search(self._decoder.getstate()[0] + data):
            return "".join(map(self.feed, token_ids))
        return self._decoder.decode(data)

    @property
    def is_inside_character(self) -> bool:
        """True while bytes wait for the rest of their character."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """Returns the text of an unfinished character whose remaining bytes will not come."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopMatcher:
    """Lets text through up to the first stop string.

    The first is the one that is complete first, so the result does not depend on how the text was cut into
    pieces. Text that could still become a stop string is held back. shows_stop: the stop string itself is let through.
    """

    def __init__(self, stops: Sequence[str], shows_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._shows_stop = shows_stop
        self._held = ""
        self.matched: str | None = None

    @property
    def has_stops(self) -> bool:
        """True if there are stop strings."""
        return bool(self._stops)

    def feed(self, text: str) -> str:
        """Takes text and returns what can be shown now. After a match nothing more is shown."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        found = self._first_match(pending)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return pending[: start + len(self.matched)] if self._shows_stop else pending[:start]
        cut = len(pending) - self._num_held(pending)
        self._held = pending[cut:]
        return pending[:cut]

    def flush(self) -> str:
        """Returns the text that was held back, when no more text can complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Finds the (start, stop) of the match that ends first; of several that end together, the longest."""
        starts = [(text.find(stop), stop) for stop in self._stops]
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Returns the length of the longest suffix that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
