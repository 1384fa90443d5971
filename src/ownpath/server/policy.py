"""Decisions of the operator of a server about requests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestPolicy:
    """Names of the model, and what becomes of requests that ask for what is not there.

    aliases: served names beside the first. paths: names that are accepted and not listed, such as the folder's.
    refuses_labels: fields that change nothing are refused, not ignored.
    refuses_excess: a ``max_tokens`` beyond the context is refused, not clamped.
    """

    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    refuses_labels: bool = False
    refuses_excess: bool = False
