"""Refusals of what an answer is asked to fit."""


class GrammarRefused(ValueError):
    """A schema or grammar that cannot be enforced, or costs too much.

    place: where in it, as ``properties.a.not``. is_for_now: a machine that is less busy might not refuse it.
    """

    def __init__(self, message: str, place: str = "", is_for_now: bool = False) -> None:
        super().__init__(message)
        self.place, self.is_for_now = place, is_for_now


class GrammarQueueFull(RuntimeError):
    """Too many grammars are waiting to be compiled."""


class NoGrammarLibrary(RuntimeError):
    """The library that compiles grammars is not installed."""

    def __init__(self) -> None:
        super().__init__("grammars need llguidance, which is not installed here: pip install 'ownpath[structured]'")
