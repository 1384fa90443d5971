"""Decides whether a step drafts. Pure: no tensor, no clock; it is told what steps took and which guesses were right.

A step with drafts takes longer than one without, and gives 1 + a tokens a request, a being the share of guesses that
are right. So it pays while

    (1 + a) * seconds of a plain step > seconds of a drafted step

Both times are means over the last steps of the same number of requests, a over the last guesses of all. Each kind of
step is tried for each number of requests, and what loses is tried again from time to time: texts and lengths change.

Example, V4-Flash on an H200: 1 request, plain 5.5 ms, drafted 6.6 ms. At a = 0.8 a drafted step gives 1.8 tokens, as
9.9 ms of plain steps would: it drafts. At a = 0.1 it gives 1.1, as 6.1 ms would: it does not. With 8 requests the rows
of guesses read as many experts again, 11.4 and 18.2 ms, and a must be 0.6; 32 read most of them anyway, 26.5 and 37.9,
and 0.43 is enough.
"""

from dataclasses import dataclass, field

MOST_DRAFTED = 32
"""Requests of a step that may draft: 64 rows, up to which every kernel is one for few rows."""
NUM_TRIED = 16
"""Steps of a trial."""
NUM_BETWEEN = 1024
"""Steps of the kind that wins between two trials of the other one."""
NUM_KEPT = 64
"""A mean is of about so many of the last steps, or guesses."""


@dataclass
class Lately:
    """A mean of the last numbers: the first ones count alike, later ones less with their age."""

    mean: float = 0.0
    num_seen: int = 0

    def add(self, value: float, count: int = 1) -> None:
        """Takes up ``count`` numbers with this mean."""
        self.num_seen = min(self.num_seen + count, NUM_KEPT)
        self.mean += (value - self.mean) * min(count / self.num_seen, 1.0)


@dataclass
class _Kind:
    """Steps of one kind and size. num_left: of the trial that is under way; the first step of all is not timed."""

    seconds: Lately = field(default_factory=Lately)
    num_left: int = NUM_TRIED

    def add(self, seconds: float) -> None:
        """Counts a step. It counts as four times the mean at most, as it may have waited for something else."""
        if self.num_left < NUM_TRIED or self.seconds.num_seen:
            self.seconds.add(min(seconds, 4 * self.seconds.mean) if self.seconds.num_seen else seconds)
        self.num_left = max(self.num_left - 1, 0)


@dataclass
class _Sized:
    """The times of steps of so many requests. since: steps of the winning kind since the other was tried."""

    plain: _Kind = field(default_factory=_Kind)
    drafted: _Kind = field(default_factory=_Kind)
    since: int = 0


@dataclass
class DraftPolicy:
    """Decides by what it was told. most_requests: of a step that may draft. right: the share of guesses that are."""

    most_requests: int = MOST_DRAFTED
    right: Lately = field(default_factory=Lately)
    _sizes: dict[int, _Sized] = field(default_factory=dict)

    def drafts(self, num_requests: int) -> bool:
        """Returns True if the next step of so many requests is to draft."""
        if num_requests > self.most_requests:
            return False
        sized = self._sizes.setdefault(num_requests, _Sized())
        if sized.drafted.num_left or sized.plain.num_left:
            return sized.drafted.num_left > 0
        return self._pays(sized)

    def note_plain(self, num_requests: int, seconds: float) -> None:
        """Takes up the time of a step without drafts."""
        if num_requests <= self.most_requests:
            sized = self._sizes.setdefault(num_requests, _Sized())
            sized.plain.add(seconds)
            self._count(sized, sized.drafted, is_winning=not self._pays(sized))

    def note_drafted(self, num_requests: int, seconds: float, num_guesses: int, num_right: int) -> None:
        """Takes up the time of a step with drafts, and how many of its guesses were right."""
        sized = self._sizes.setdefault(num_requests, _Sized())
        sized.drafted.add(seconds)
        if num_guesses:
            self.right.add(num_right / num_guesses, num_guesses)
        self._count(sized, sized.plain, is_winning=self._pays(sized))

    def _pays(self, sized: _Sized) -> bool:
        return (1 + self.right.mean) * sized.plain.seconds.mean > sized.drafted.seconds.mean

    def _count(self, sized: _Sized, other: _Kind, is_winning: bool) -> None:
        """Counts a step of the kind that wins, and has the other tried when it is time."""
        if not is_winning or sized.drafted.num_left or sized.plain.num_left:
            return
        sized.since += 1
        if sized.since >= NUM_BETWEEN:
            sized.since, other.num_left = 0, NUM_TRIED
