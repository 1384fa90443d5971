"""Decides whether a step drafts. Pure: no tensor, no clock; it is told what steps took and which guesses were right.

A step with drafts takes longer than one without, and gives 1 + a tokens a request, a being the share of guesses that
are right. So it pays while

    (1 + a) * seconds of a plain step > seconds of a drafted step

Both times are means over the last steps of the same number of requests, a over the last guesses of all. A kind of step
is kept for a run of steps: where one follows the other, steps are read first and rows are uploaded, so the first of a
run is not timed. Both kinds are tried for each number of requests, and what loses is tried again from time to time:
texts and lengths change.

Example, V4-Flash on an H200: 1 request, plain 5.5 ms, drafted 6.6 ms. At a = 0.8 a drafted step gives 1.8 tokens, as
9.9 ms of plain steps would: it drafts. At a = 0.1 it gives 1.1, as 6.1 ms would: it does not. With 8 requests the rows
of guesses read as many experts again, 11.4 and 18.2 ms, and a must be 0.6; 32 read most of them anyway, 26.5 and 37.9,
and 0.43 is enough.
"""

from dataclasses import dataclass, field

MOST_DRAFTED = 32
"""Requests of a step that may draft: 64 rows, up to which every kernel is one for few rows."""
NUM_TRIED, NUM_HELD = 16, 64
"""Steps of a run that tries, and of one that was chosen."""
NUM_BETWEEN = 1024
"""Steps of one kind in a row, before the other one is tried again."""
NUM_KEPT = 64
"""A mean is of about so many of the last steps, or guesses."""
_MARGIN = 0.01
"""By which the other kind must be better to be chosen."""


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
class _Sized:
    """Steps of so many requests. plain, drafted: their seconds. drafts: the kind of the run that is under way.

    num_left: steps of the run. is_fresh: none of them has been noted. num_same: steps of its kind in a row.
    """

    plain: Lately = field(default_factory=Lately)
    drafted: Lately = field(default_factory=Lately)
    drafts: bool = True
    num_left: int = NUM_TRIED
    is_fresh: bool = True
    num_same: int = 0

    def note(self, seconds: float, *, is_drafted: bool) -> bool:
        """Takes up a step. Returns True if the run ends with it. One of the other kind is the last of the run before,
        or one that could not draft.

        It counts as four times the mean at most, as it may have waited for something else.
        """
        if is_drafted is not self.drafts:
            return False
        times = self.drafted if is_drafted else self.plain
        if not self.is_fresh:
            times.add(min(seconds, 4 * times.mean) if times.num_seen else seconds)
        self.is_fresh, self.num_left, self.num_same = False, self.num_left - 1, self.num_same + 1
        return self.num_left <= 0

    def begin(self, drafts: bool, num_steps: int) -> None:
        """Begins a run."""
        if drafts is not self.drafts:
            self.is_fresh, self.num_same = True, 0
        self.drafts, self.num_left = drafts, num_steps


@dataclass
class DraftPolicy:
    """Decides by what it was told. most_requests: of a step that may draft. right: the share of guesses that are."""

    most_requests: int = MOST_DRAFTED
    right: Lately = field(default_factory=Lately)
    _sizes: dict[int, _Sized] = field(default_factory=dict)

    def drafts(self, num_requests: int) -> bool:
        """Returns True if the next step of so many requests is to draft."""
        return num_requests <= self.most_requests and self._sizes.setdefault(num_requests, _Sized()).drafts

    def note_plain(self, num_requests: int, seconds: float) -> None:
        """Takes up the time of a step without drafts."""
        if num_requests <= self.most_requests:
            self._note(self._sizes.setdefault(num_requests, _Sized()), seconds, is_drafted=False)

    def note_drafted(self, num_requests: int, seconds: float, num_guesses: int, num_right: int) -> None:
        """Takes up the time of a step with drafts, and how many of its guesses were right."""
        if num_guesses:
            self.right.add(num_right / num_guesses, num_guesses)
        self._note(self._sizes.setdefault(num_requests, _Sized()), seconds, is_drafted=True)

    def _note(self, sized: _Sized, seconds: float, *, is_drafted: bool) -> None:
        if not sized.note(seconds, is_drafted=is_drafted):
            return
        other = sized.plain if is_drafted else sized.drafted
        if not other.num_seen or sized.num_same >= NUM_BETWEEN:
            sized.begin(not is_drafted, NUM_TRIED)
            return
        least = 1 - _MARGIN if is_drafted else 1 + _MARGIN
        pays = (1 + self.right.mean) * sized.plain.mean > least * sized.drafted.mean
        sized.begin(pays, NUM_HELD)
