"""The scheduler's rules, on requests that never see a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ownpath.engine.request import Request, SamplingParams
from ownpath.engine.scheduler import ScheduledChunk, Scheduler


def make_request(num_prompt: int, max_tokens: int = 4) -> Request:
    return Request(list(range(num_prompt)), SamplingParams(max_tokens), lambda output: None)


def run_step(scheduler: Scheduler) -> list[tuple[Request, int]]:
    """Schedules, then pretends to have run: every chunk that reaches the end gains a token, or is finished."""
    chunks = scheduler.schedule()
    done = [(chunk.request, chunk.num_tokens) for chunk in chunks]
    for chunk in chunks:
        samples = chunk.reaches_end
        chunk.request.num_computed += chunk.num_tokens
        if samples:
            chunk.request.output_ids.append(0)
            if len(chunk.request.output_ids) == chunk.request.params.max_tokens:
                scheduler.remove(chunk.request)
    return done


def test_the_worked_example() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_prefill_tokens=4)
    a, b, c = make_request(6), make_request(3), make_request(1)
    for request in (a, b, c):
        scheduler.add(request)
    assert run_step(scheduler) == [(a, 4)]
    assert run_step(scheduler) == [(a, 2), (b, 2)]
    assert run_step(scheduler) == [(a, 1), (b, 1)]
    assert run_step(scheduler) == [(a, 1), (b, 1)]
    assert run_step(scheduler) == [(a, 1), (b, 1)]
    assert run_step(scheduler) == [(b, 1), (c, 1)], "a has its four tokens; c takes its place at once"


def test_decoding_never_waits_for_a_newcomer() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_prefill_tokens=2)
    old, new = make_request(1, max_tokens=100), make_request(50)
    scheduler.add(old)
    run_step(scheduler)
    scheduler.add(new)
    for _ in range(25):
        assert run_step(scheduler) == [(old, 1), (new, 2)]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 16),
)
def test_limits_hold_and_everybody_ends(sizes: list[tuple[int, int]], max_num_seqs: int, max_prefill: int) -> None:
    scheduler = Scheduler(max_num_seqs, max_prefill)
    requests = [make_request(*size) for size in sizes]
    for request in requests:
        scheduler.add(request)
    first_steps: dict[int, int] = {}
    for step in range(sum(prompt + tokens for prompt, tokens in sizes) + 1):
        if not scheduler.has_work:
            break
        before = {id(request): request.is_prefilling for request in requests}
        ran = run_step(scheduler)
        assert ran, "there is work, so a step does some"
        assert len(ran) <= max_num_seqs
        assert len({id(request) for request, _ in ran}) == len(ran)
        assert sum(n for request, n in ran if before[id(request)]) <= max_prefill
        assert all(n == 1 for request, n in ran if not before[id(request)])
        for request, _ in ran:
            first_steps.setdefault(requests.index(request), step)
    assert not scheduler.has_work, "every request ends within as many steps as there are tokens"
    starts = [first_steps[index] for index in range(len(requests))]
    assert starts == sorted(starts), "first come, first served"


@pytest.mark.parametrize("is_running", [True, False])
def test_removing_frees_the_place(is_running: bool) -> None:
    scheduler = Scheduler(max_num_seqs=1, max_prefill_tokens=8)
    first, second = make_request(2), make_request(2)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    gone = first if is_running else second
    assert scheduler.remove(gone)
    assert not scheduler.remove(gone)
    assert [chunk.request for chunk in scheduler.schedule()] == [second if is_running else first]


def test_chunks_say_whether_they_reach_the_end() -> None:
    request = make_request(5)
    assert not ScheduledChunk(request, 4).reaches_end
    assert ScheduledChunk(request, 5).reaches_end


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_must_be_positive(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(*limits)
