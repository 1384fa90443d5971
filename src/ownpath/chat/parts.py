"""What an answer is made of, in the order of its arrival."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """More of the thinking part."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer for people."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A tool call begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class Malformed:
    """The markup broke here, for this reason; from here on everything is content."""

    reason: str


Part = Reasoning | Content | CallStarted | Arguments | Malformed
