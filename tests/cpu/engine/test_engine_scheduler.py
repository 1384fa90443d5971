"""The scheduler's rules, on requests that never see a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ownpath.engine.request import ROOM_AHEAD, Request, SamplingParams
from ownpath.engine.scheduler import ScheduledChunk, Scheduler, share_tokens


def make_request(num_prompt: int, max_tokens: int = 4) -> Request:
    return Request(list(range(num_prompt)), SamplingParams(max_tokens), lambda output: None)


class Plenty:
    """Memory that never ends."""

    free = 1, 1
    room_ahead = ROOM_AHEAD

    def begin(self, request: Request, num_spare: int) -> bool:
        request.room = request.most_tokens
        return True

    def extend(self, request: Request) -> bool:
        raise AssertionError("every request has all its room from the beginning")

    def end(self, request: Request) -> None:
        request.room = 0


def make_scheduler(max_num_seqs: int, max_prefill_tokens: int) -> Scheduler:
    return Scheduler(max_num_seqs, max_prefill_tokens, Plenty())


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
    scheduler = make_scheduler(max_num_seqs=2, max_prefill_tokens=4)
    a, b, c = make_request(6), make_request(3), make_request(1)
    for request in (a, b, c):
        scheduler.add(request)
    assert run_step(scheduler) == [(a, 2), (b, 2)]
    assert run_step(scheduler) == [(a, 3), (b, 1)]
    assert run_step(scheduler) == [(b, 1), (a, 1)]
    assert run_step(scheduler) == [(a, 1), (b, 1)]
    assert run_step(scheduler) == [(a, 1), (b, 1)]
    assert run_step(scheduler) == [(a, 1), (c, 1)], "b has its four tokens; c takes its place at once"


def test_a_party_leaves_a_sequence_to_others() -> None:
    """A body of many prompts, and one prompt that comes while they run: it begins at once."""
    scheduler = make_scheduler(max_num_seqs=8, max_prefill_tokens=64)
    many = [make_request(4, max_tokens=1000) for _ in range(20)]
    scheduler.add(*many)
    assert [request for request, _ in run_step(scheduler)] == many[:6]
    assert scheduler.num_waiting == 14
    one = make_request(4)
    scheduler.add(one)
    assert (one, 4) in run_step(scheduler)
    assert many[6] not in scheduler.running


def test_a_free_sequence_goes_to_the_party_with_the_fewest() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_prefill_tokens=64)
    many = [make_request(1, max_tokens=2 + n) for n in range(8)]
    scheduler.add(*many)
    run_step(scheduler)
    scheduler.add(*(others := [make_request(1, max_tokens=100) for _ in range(3)]))
    for _ in range(4):
        run_step(scheduler)
    assert [request for request in scheduler.running if request in others] == others[:2]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_prefill_tokens=64)
    long, short = make_request(10_000), make_request(30)
    scheduler.add(long)
    run_step(scheduler)
    scheduler.add(short)
    assert run_step(scheduler) == [(long, 34), (short, 30)]
    assert not short.is_prefilling


@given(st.integers(1, 100), st.lists(st.integers(1, 60), max_size=8))
def test_the_prefill_limit_is_shared_whole_and_fairly(limit: int, wanted: list[int]) -> None:
    shares = share_tokens(limit, wanted)
    assert sum(shares) == min(limit, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    if wanted:
        assert shares[0] >= min(wanted[0], limit // 2)
    least = limit // 2 // max(len(wanted) - 1, 1)
    assert all(share >= min(want, least) for share, want in zip(shares[1:], wanted[1:], strict=True))


def test_decoding_never_waits_for_a_newcomer() -> None:
    scheduler = make_scheduler(max_num_seqs=2, max_prefill_tokens=2)
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
    scheduler = make_scheduler(max_num_seqs, max_prefill)
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
    scheduler = make_scheduler(max_num_seqs=1, max_prefill_tokens=8)
    first, second = make_request(2), make_request(2)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    gone = first if is_running else second
    assert scheduler.remove(gone)
    assert not scheduler.remove(gone)
    assert [chunk.request for chunk in scheduler.schedule()] == [second if is_running else first]


def test_a_plan_stays_while_the_same_requests_go_on() -> None:
    """A change of who runs, or by how many tokens, changes the plan; one of who waits does not."""
    scheduler = make_scheduler(max_num_seqs=2, max_prefill_tokens=8)
    first, second, third = (make_request(2, max_tokens=50) for _ in range(3))
    scheduler.add(first)
    run_step(scheduler)
    plan = scheduler.schedule()
    assert plan == [(first, 1)]
    assert scheduler.schedule() is plan
    scheduler.add(second)
    assert scheduler.schedule() == [(first, 1), (second, 2)]
    run_step(scheduler)
    plan = scheduler.schedule()
    assert plan == [(first, 1), (second, 1)]
    scheduler.add(third)
    assert scheduler.schedule() is plan
    scheduler.remove(third)
    assert scheduler.schedule() is plan
    scheduler.remove(first)
    assert scheduler.schedule() == [(second, 1)]


def test_who_has_its_fill_begins_when_one_of_its_own_ends() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_prefill_tokens=64)
    many = [make_request(1, max_tokens=90) for _ in range(5)]
    scheduler.add(*many)
    for _ in range(3):
        assert [request for request, _ in run_step(scheduler)] == many[:3]
    scheduler.remove(many[1])
    assert [request for request, _ in run_step(scheduler)] == [many[0], many[2], many[3]]


def test_chunks_say_whether_they_reach_the_end() -> None:
    request = make_request(5)
    assert not ScheduledChunk(request, 4).reaches_end
    assert ScheduledChunk(request, 5).reaches_end


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_must_be_positive(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_scheduler(*limits)
