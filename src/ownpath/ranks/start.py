"""The beginning of several ranks: they compare what they are about to run, and learn of each other's errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from ownpath.ranks.peers import Peers, RanksDiffer


class RankFailed(ValueError):
    """Raised on every rank where one of them could not start; the message is that rank's."""


def swap_text(peers: Peers, slot: str, text: str) -> list[str]:
    """Gives every rank a text, and returns each rank's, in the order of ranks."""
    data = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())
    return [given.numpy().tobytes().decode() for (given,) in peers.swap(slot, (data,))]


def require_same(peers: Peers, facts: Mapping[str, str]) -> None:
    """Checks that all ranks have the same facts as rank 0. Errors: RanksDiffer naming the rank and the first fact."""
    for name, value in facts.items():
        for rank, (first, other) in enumerate(_beside_the_first(swap_text(peers, f"start: {name}", value))):
            if other != first:
                raise RanksDiffer(f"rank {rank} has another {name} than rank 0: {other}, not {first}")


def _beside_the_first(values: list[str]) -> Iterator[tuple[str, str]]:
    return ((values[0], value) for value in values)


@contextmanager
def phase(peers: Peers, name: str) -> Iterator[None]:
    """Runs a part of the start that may fail on one rank alone: all ranks learn it at its end.

    Errors: this rank's own; RankFailed with the first other's.
    """
    try:
        yield
    except Exception as error:
        swap_text(peers, f"start: {name}", f"{type(error).__name__}: {error}")
        raise
    for rank, told in enumerate(swap_text(peers, f"start: {name}", "")):
        if told:
            raise RankFailed(f"rank {rank}: {told.partition(': ')[2] or told}")
