"""The ways in which ranks divide a model; ``plan.sharding`` cuts accordingly, and ``plan.exchanges`` adds up."""

from enum import StrEnum


class AttentionSplit(StrEnum):
    """The division of attention and of the shared expert."""

    HEADS = "heads"
    """Each rank has some heads, of all tokens."""
    DATA = "data"
    """Each rank has all heads, of its own tokens."""


class ExpertSplit(StrEnum):
    """The division of routed experts."""

    WIDTH = "width"
    """Each rank has a part of every expert's width."""
    IDS = "ids"
    """Each rank has some experts, whole."""


class RowTravel(StrEnum):
    """The ranks to which a token's row travels, where each rank has its own tokens."""

    ALL = "all"
    """Every rank gets every row."""
    ROUTED = "routed"
    """A rank gets the rows that chose one of its experts."""


DRAWN, DRAWN_MULTIPLE = "head.drawn", 128
"""The exchange of tokens that rank 0 has drawn, as bytes, and of what their number is a multiple."""
