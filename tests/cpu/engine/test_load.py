"""The times of steps as the engine counts them, by a clock of the test's."""

import pytest

from ownpath.engine.load import GAP_SECONDS, Durations, StepTimes


def test_steps_one_behind_the_other() -> None:
    times = StepTimes()
    assert times.add(10.0, 10.25) == 0.25
    assert times.add(10.375, 10.5) == 0.25  # launched an eighth of a second after the last was read
    assert (times.num_steps, times.busy_s, times.gap_s) == (2, 0.375, 0.125)


def test_steps_that_overlap_have_no_gap_and_count_no_time_twice() -> None:
    times = StepTimes()
    times.add(10.0, 10.5)
    times.add(10.25, 11.0)  # launched before the last was read
    assert (times.busy_s, times.gap_s) == (1.0, 0.0)
    assert sum(times.gaps.counts) == times.gaps.counts[0] == 1, "a gap of 0"


def test_what_is_behind_a_pause_is_no_gap() -> None:
    times = StepTimes()
    times.add(10.0, 11.0)
    times.pause()
    times.add(500.0, 501.0)
    assert (times.busy_s, sum(times.gaps.counts)) == (2.0, 0)


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (5e-6, 0), (5.1e-6, 1), (1.0, 14), (1.5, 15)])
def test_a_duration_at_a_bound_is_below_it(seconds: float, bucket: int) -> None:
    durations = Durations(GAP_SECONDS)
    durations.observe(seconds)
    assert durations.counts.index(1) == bucket
    assert durations.total_s == seconds
