"""All that was seen of one server; the checks judge nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ownpath.diff.compare import (
    Distances,
    PositionComparison,
    PromptComparison,
    answer_distance,
    compare,
    distances_of,
)
from ownpath.diff.modes import ChatMode, ModeMatch
from ownpath.diff.responses import ChatReading, SequenceReading

Readings = tuple[SequenceReading, ...]


@dataclass(frozen=True)
class AskRound:
    """The same requests in turn; prompt n's answers are at index n of each tuple.

    first: alone, the first time. again, once_more: alone, with the prompt known to the server. together: at once with
    all others, several a prompt. is_cold: no server can have known the prompts before ``first``.
    """

    first: Readings
    again: Readings
    once_more: Readings
    together: tuple[Readings, ...]
    is_cold: bool

    @cached_property
    def alone(self) -> list[float | None]:
        """For each prompt, the distance of two answers that only chance or others' requests can have told apart;
        None without log-probs."""
        return [answer_distance(*pair).nats for pair in zip(self.again, self.once_more, strict=True)]

    def cold(self, tolerance: float) -> list[float]:
        """Returns, for each prompt, the distance of the first answer from the nearer of the later ones; 0 where those
        are not alike within ``tolerance``. Empty where none are."""
        repeatable = self._repeatable(tolerance)
        return (
            [self._cold_distance(n) if n in repeatable else 0.0 for n in range(len(self.first))] if repeatable else []
        )

    def _cold_distance(self, n: int) -> float:
        far = [answer_distance(self.first[n], later[n]).nats for later in (self.again, self.once_more)]
        return min((it for it in far if it is not None), default=0.0)

    def company(self, tolerance: float) -> list[float]:
        """Returns, for each answer among others to such a prompt, its distance from the answer alone."""
        pairs = ((self.again[n], other) for n in self._repeatable(tolerance) for other in self.together[n])
        return [far for far in (answer_distance(*pair).nats for pair in pairs) if far is not None]

    def _repeatable(self, tolerance: float) -> list[int]:
        return [n for n, far in enumerate(self.alone) if far is not None and far <= tolerance]


@dataclass(frozen=True)
class Conversation:
    """One answer of the chat endpoint. wish: what was asked of its thinking; empty for nothing. match: its prompt held
    against the model's modes; None where the server does not tell. text: what was generated, without special tokens;
    None likewise."""

    wish: str
    reading: ChatReading
    match: ModeMatch | None
    text: str | None

    @property
    def mode(self) -> ChatMode | None:
        """The mode in which the server wrote the prompt, where that is certain."""
        return self.match.candidates[0] if self.match is not None and len(self.match.candidates) == 1 else None


@dataclass(frozen=True)
class Observations:
    """All observations of one server.

    rounds: the second confirms what the first made suspicious; without a suspicion, or prompts for it, there is one.
    generated_rows: our log-probs of the first round's first answers, always with a first row. scored, scored_rows: the
    sequences that are compared, and our log-probs of them. comparisons: of these.
    text_ids: a prompt as the server reads its text and as we do, where text was sent; None where it does not tell.
    """

    rounds: tuple[AskRound, ...]
    generated_rows: tuple[torch.Tensor, ...]
    scored: Readings
    scored_rows: tuple[torch.Tensor, ...]
    comparisons: tuple[PromptComparison, ...]
    conversations: tuple[Conversation, ...]
    text_ids: tuple[tuple[int, ...] | None, tuple[int, ...]] | None
    special_ids: frozenset[int]
    tolerance: float

    @property
    def generated(self) -> Readings:
        return self.rounds[0].first

    @property
    def positions(self) -> Sequence[PositionComparison]:
        return [position for comparison in self.comparisons for position in comparison.positions]

    @cached_property
    def distances(self) -> Distances:
        return distances_of(self.positions, self.tolerance)

    @cached_property
    def answer_distances(self) -> Distances | None:
        """The distances over the server's own answers, which other kernels make than its prompts' log-probs; None where
        the answers are what is compared anyway."""
        if self.scored is self.generated:
            return None
        pairs = enumerate(zip(self.generated, self.generated_rows, strict=True))
        told = [compare(n, reading, rows_PV[: len(reading.scored)]) for n, (reading, rows_PV) in pairs]
        return distances_of((position for one in told for position in one.positions), self.tolerance)

    @property
    def refusals(self) -> list[str]:
        """The server's words where it could not write log-probs as JSON, one for each such answer."""
        return [reading.refusal for reading in (*self.scored, *self.generated) if reading.refusal]


FULL_SURVEY = 160


def widening(num_positions: int) -> float:
    """Returns the factor by which a mean over few positions may be further away than one over ``FULL_SURVEY``: the
    spread of a mean grows as 1/sqrt of their number."""
    return math.sqrt(max(1.0, FULL_SURVEY / max(num_positions, 1)))
