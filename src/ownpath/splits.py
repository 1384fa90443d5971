"""The ways in which ranks divide a model; ``plan.sharding`` cuts accordingly, and ``plan.exchanges`` adds up."""

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise


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


def sums_at_boundaries(layers: Sequence[str]) -> dict[str, str]:
    """Returns the sums over ranks that only a boundary of hyper-connections reads, by their slots, and that boundary's.

    layers: names of the backbone's. The last sublayer's is not among them: of its rows some are chosen first.
    """
    of_attention = {f"{name}.attn.reduce": f"{name}.hc_ffn" for name in layers}
    return of_attention | {f"{name}.ffn.reduce": f"{after}.hc_attn" for name, after in pairwise(layers)}
