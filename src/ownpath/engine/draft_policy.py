"""Decides whether a step drafts. Pure: no tensor, no clock; it is told how long steps took and what they gave.

What counts is a pace: seconds for a token of each request. A plain step gives one; a step with drafts takes longer and
gives one or two, waits for the host where requests come or go, and has the module read prompts. All of that is in the
seconds between the reading of one step and the next, so both paces are measured as they are, whole, and the better kind
goes on. For each graph (number of requests) there are two paces and a kind that is held.

The kind that is not held is tried for a few steps, anew each time, as texts and traffic change. What a trial loses is
a debt, made up for by a small share of all time; while there is any, nothing is tried, but plain steps that seem to be
better than drafts.

Example, V4-Flash on an H200, 1 request: a plain step takes 5.5 ms, one with drafts 6.6. With 0.8 of the guesses right
the paces are 5.5 and 6.6 / 1.8 = 3.7: it drafts. With 0.1 they are 5.5 and 6.0: it does not, and 16 steps that find
that out again lose 16 x 1.1 x 0.5 = 9 ms, once in 1.8 s at most.
"""

from dataclasses import dataclass, field
from math import inf

MOST_DRAFTED = 32
"""Requests of a step that may draft: 64 rows, up to which every kernel is one for few rows."""
NUM_TRIED, NUM_HELD = 16, 32
"""Steps of a trial, and after how many a kind that is held is compared again."""
NUM_LOST = 8
"""Steps' worth of time at whose loss a trial is over."""
NUM_BETWEEN = 512
"""Steps of one kind in a row, before the other one is tried though it seemed to lose."""
NUM_KEPT = 256
"""A pace is of about so many of the last steps."""
MOST_LOST = 0.005
"""The share of all time that trials may lose."""
MOST_LATE = 20
"""A step counts as so many plain ones at most, in paces and in what was lost: it may have waited for other work,
such as code that was loaded. A host that is busy keeps steps with drafts waiting: that counts."""
_MARGIN = 0.02
"""By which the other kind must be better to be chosen."""


@dataclass
class Pace:
    """Seconds for a token of each request, over the last steps: those of long ago count less."""

    seconds: float = 0.0
    tokens: float = 0.0
    num_steps: int = 0

    def add(self, seconds: float, tokens: float) -> None:
        """Takes up a step."""
        if self.num_steps >= NUM_KEPT:
            self.seconds, self.tokens = (part * (1 - 1 / NUM_KEPT) for part in (self.seconds, self.tokens))
        self.seconds, self.tokens, self.num_steps = self.seconds + seconds, self.tokens + tokens, self.num_steps + 1

    def charge(self, seconds: float) -> None:
        """Takes up time that belongs to these steps and gave no token."""
        self.seconds += seconds

    def forget(self) -> None:
        """Begins anew."""
        self.seconds = self.tokens = 0.0
        self.num_steps = 0

    @property
    def is_known(self) -> bool:
        """True if a step was taken up."""
        return self.num_steps > 0

    @property
    def step(self) -> float:
        """Seconds of a step, in the mean; 0 where none was taken up."""
        return self.seconds / min(self.num_steps, NUM_KEPT) if self.num_steps else 0.0

    @property
    def value(self) -> float:
        """The pace; endless where no step has given a token."""
        return self.seconds / self.tokens if self.tokens else inf


@dataclass
class _Sized:
    """Steps of one graph. drafts: the kind of the run that is under way. is_trial: whether the other one is held.

    num_left: steps of the run. is_fresh: none of them has been noted. num_same: steps of the kind since it began.
    spent: seconds and tokens of the run, its first step among them.
    """

    plain: Pace = field(default_factory=Pace)
    drafted: Pace = field(default_factory=Pace)
    drafts: bool = False
    is_trial: bool = False
    num_left: int = NUM_TRIED
    is_fresh: bool = True
    num_same: int = 0
    spent: Pace = field(default_factory=Pace)

    @property
    def held(self) -> bool:
        """The kind that is held: of a trial, the other one."""
        return self.drafts is not self.is_trial

    @property
    def own(self) -> Pace:
        """The pace of the run's kind."""
        return self.drafted if self.drafts else self.plain

    @property
    def other(self) -> Pace:
        """The pace of the other kind."""
        return self.plain if self.drafts else self.drafted

    def note(self, seconds: float, tokens: float) -> bool:
        """Takes up a step of the run. Returns True if the run ends with it. The first step after a change is not one
        of the pace: it was not overlapped with what came before."""
        seconds = self.bounded(seconds)
        if not self.is_fresh:
            self.own.add(seconds, tokens)
        self.spent.add(seconds, tokens)
        self.is_fresh, self.num_left, self.num_same = False, self.num_left - 1, self.num_same + 1
        return self.num_left <= 0 or (self.is_trial and self.loss > NUM_LOST * self.other.value)

    def bounded(self, seconds: float) -> float:
        """Returns what a step counts as: ``MOST_LATE`` plain steps at most, as far as those are known."""
        mean = self.plain.step or self.drafted.step
        return min(seconds, MOST_LATE * mean) if mean else seconds

    @property
    def loss(self) -> float:
        """Seconds that the run has lost beside steps of the other kind, as far as that is known."""
        return max(0.0, self.spent.seconds - self.spent.tokens * self.other.value) if self.other.is_known else 0.0

    def hold(self) -> None:
        """Goes on with the kind that runs."""
        self.is_trial, self.num_left = False, NUM_HELD
        self.spent.forget()

    def turn(self, *, is_trial: bool) -> None:
        """Changes the kind. A trial forgets its pace of long ago."""
        self.drafts, self.is_trial, self.is_fresh, self.num_same = not self.drafts, is_trial, True, 0
        self.num_left = NUM_TRIED if is_trial else NUM_HELD
        self.spent.forget()
        if is_trial:
            self.own.forget()


@dataclass
class DraftPolicy:
    """Decides by what it was told. most_requests: of a step that may draft. debt: seconds that were lost."""

    most_requests: int = MOST_DRAFTED
    debt: float = 0.0
    _sizes: dict[int, _Sized] = field(default_factory=dict)
    _before: _Sized | None = None

    def drafts(self, num_requests: int) -> bool:
        """Returns True if the next step of so many requests is to draft."""
        return num_requests <= self.most_requests and self._of(num_requests).drafts

    def holds(self, num_requests: int) -> bool:
        """Returns True if steps of so many requests draft, now or after a trial of plain ones."""
        return self.drafts(num_requests) or (num_requests <= self.most_requests and self._of(num_requests).held)

    def note(self, num_requests: int, seconds: float, tokens: float, *, is_drafted: bool) -> None:
        """Takes up a step: its seconds, and the tokens that a request has got or read, in the mean. One that is not of
        the kind that runs is the last of the run before, or could not draft."""
        self.debt = max(0.0, self.debt - MOST_LOST * seconds)
        if num_requests > self.most_requests:
            return
        sized = self._of(num_requests)
        before, self._before = self._before, sized if is_drafted else None
        if before is not None and not is_drafted:
            # It waited for the step with drafts before it.
            if sized.plain.is_known:
                excess = max(0.0, sized.bounded(seconds) - tokens * sized.plain.value)
                before.drafted.charge(excess)
                if not before.held:
                    self.debt += excess
            sized.is_fresh = False
            return
        if sized.drafts is is_drafted and sized.note(seconds, tokens):
            self._end_run(sized)

    def note_reading(self, num_requests: int, seconds: float) -> None:
        """Takes up what it took to have the module read prompts."""
        sized = self._of(num_requests)
        sized.drafted.charge(seconds)
        if sized.drafts:
            sized.spent.charge(seconds)

    def _of(self, num_requests: int) -> _Sized:
        """Returns the steps of so many. New ones begin with the kind of the nearest that is known."""
        if num_requests not in self._sizes:
            nearest = min(self._sizes, key=lambda one: abs(one - num_requests), default=0)
            is_near = nearest <= 2 * num_requests <= 4 * nearest
            self._sizes[num_requests] = _Sized(drafts=is_near and self._sizes[nearest].held)
        return self._sizes[num_requests]

    def _end_run(self, sized: _Sized) -> None:
        own, other = sized.own, sized.other
        if sized.drafts or sized.is_trial:
            self.debt += sized.loss
        if sized.is_trial:
            if own.value <= (1 - _MARGIN) * other.value:
                sized.hold()
            else:
                sized.turn(is_trial=False)
            return
        seems_better = not other.is_known or other.value < (1 - _MARGIN) * own.value
        is_due = seems_better or sized.num_same >= NUM_BETWEEN
        if is_due and (sized.drafts or not self.debt):
            sized.turn(is_trial=True)
        else:
            sized.hold()
