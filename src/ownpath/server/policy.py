"""Decisions of the operator of a server about requests."""

from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True)
class RequestPolicy:
    """Names of the model, and what becomes of requests that ask for what is not there.

    aliases: served names beside the first. path: the folder's as it was given, a name that is accepted and not listed.
    refuses_labels: fields that change nothing are refused, not ignored.
    refuses_excess: a ``max_tokens`` beyond the context is refused, not clamped.
    salts_by_key: requests with different API keys share nothing of the prefix cache.
    """

    aliases: tuple[str, ...] = ()
    path: str | None = None
    refuses_labels: bool = False
    refuses_excess: bool = False
    salts_by_key: bool = False

    def is_path(self, name: str) -> bool:
        """True for the folder's path in any spelling: ``./model/`` is ``model``."""
        return self.path is not None and name != "" and PurePath(name) == PurePath(self.path)
