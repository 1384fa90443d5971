"""The words that clients send for reasoning effort, and the level of the model's release that each one runs.

Source: the table of efforts in the public documentation of DeepSeek's API (guide to its thinking mode).
"""

from ownpath.chat.effort import RELEASES

LEVELS = ("low", "high", "max")
"""From the least effort to the most."""

LEVEL_OF_WORD = {
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
"""Word -> level. Beside them, "none" turns thinking off."""


def level_for(word: str | None, release: str) -> str:
    """Returns the level that a release runs for a word: the word's own, or the nearest that the release has.

    word: a key of ``LEVEL_OF_WORD``; None: thinking without a word, which adds no text.
    """
    texts = RELEASES[release]
    if word is None:
        return next(level for level, text in texts.items() if not text)
    place = LEVELS.index(LEVEL_OF_WORD[word])
    return min(texts, key=lambda level: abs(LEVELS.index(level) - place))
