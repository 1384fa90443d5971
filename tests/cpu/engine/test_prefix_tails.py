"""Tails: a prompt that is sent again computes its last token alone, whatever its length, and all else stays right.

The model is exact, and reads of its caches all that V4 reads; test_prefix_model has V4 itself.
"""

import random
import threading
from dataclasses import replace

import pytest
import torch
from cpu.engine.served import Asked, Served
from cpu.engine.stamp_model import VOCAB, StampModel, expected_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.cache.pools import CachePool
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import FinishReason
from ownpath.model.batch import ForwardBatch

BASE = [n * n % 89 for n in range(3000)]
"""Tokens that prompts begin with."""
PLACES = PrefixSettings(32, num_tails=8)
LEAST = 32
"""Tokens behind a block's end from which on there is a tail."""


def hit_of(num_tokens: int) -> int:
    """Tokens that the same prompt finds: all but the last, or up to a block's end where few lie behind it."""
    behind = (num_tokens - 1) % 256
    return num_tokens - 1 - (behind if behind < LEAST else 0)


# Ends of CSA's windows (4) and HCA's (128), of blocks, and of the tokens that are too few for a tail, and around them.
LENGTHS = [1, 4, 32, 33, 34, 35, 36, 37, 127, 128, 129, 130, 255, 256, 257, 258, 288, 289, 290, 384, 385, 511, 512, 513]


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("cuts", [True, False], ids=["cut", "passed"])
def test_the_same_prompt_again_computes_its_last_token(rows: int, cuts: bool) -> None:
    model = StampModel(rows=rows, max_tokens=1024)
    with Served(model, PLACES) as served:
        assert served.prefix is not None
        served.prefix.cuts = cuts
        for length in LENGTHS:
            served.prefix.clear()
            ids, before = BASE[:length], model.num_rows
            assert served.answer(ids) == (expected_answer(ids, 4), 0), length
            assert model.num_rows - before == length + 3
            for _ in range(2):
                before = model.num_rows
                assert served.answer(ids) == (expected_answer(ids, 4), hit_of(length)), length
                assert model.num_rows - before == length - hit_of(length) + 3
            assert served.prefix.faults() == []


def test_cold_prompts_are_cut_before_their_last_token_where_sums_decide() -> None:
    """So that it is computed by itself, as behind a hit; where chunks are not cut, no step is more."""
    model = StampModel(2048)
    forward, sizes = model.forward, list[int]()

    def counting(batch: ForwardBatch) -> torch.Tensor:
        sizes.append(len(batch.token_ids_T))
        return forward(batch)

    model.forward = counting  # type: ignore[method-assign]
    expected = {20: [20], 33: [32, 1], 256: [255, 1], 257: [256, 1], 280: [256, 24], 300: [256, 43, 1]}
    expected |= {700: [512, 187, 1], 1024: [512, 256, 255, 1]}
    with Served(model, PLACES) as served:
        assert served.prefix is not None
        for cuts in (True, False):
            served.prefix.cuts = cuts
            for length, chunks in expected.items():
                served.prefix.clear()
                sizes.clear()
                served.answer(BASE[:length], 1)
                assert sizes == (chunks if cuts else [512] * (length // 512) + [length % 512] * (length % 512 > 0))
                sizes.clear()
                assert served.answer(BASE[:length], 1)[1] == hit_of(length)
                assert sizes == [length - hit_of(length)]
                assert sizes == chunks[-1:]


def test_what_begins_with_a_prompt_goes_on_from_its_tail() -> None:
    """Another last token, the next turn of a conversation, and a longer prompt; what parts before finds no tail."""
    ids = BASE[:600]
    with Served(StampModel(), PLACES) as served:
        answer, _ = served.answer(ids, 40)
        longer = [*ids, *answer, *BASE[:90]]
        for other, hit in (([*ids[:-1], 95], 599), (longer, 599), ([*ids, *BASE[:300]], 599)):
            assert served.answer(other) == (expected_answer(other, 4), hit)
        assert served.answer([*longer, 3])[1] == len(longer) - 1
        assert served.answer(ids[:599]) == (expected_answer(ids[:599], 4), 512), "its last token is to be computed"
        parted = [*ids[:590], 95, *ids[:40]]
        assert served.answer(parted) == (expected_answer(parted, 4), 512)


def test_a_conversation_of_short_turns_computes_what_is_new() -> None:
    """No turn fills a block by itself."""
    ids, hits = BASE[:50], []
    with Served(StampModel(), PLACES) as served:
        for turn in range(9):
            answer, num_cached = served.answer(ids, 10)
            assert answer == expected_answer(ids, 10)
            hits.append(num_cached)
            ids = [*ids, *answer, *BASE[turn : turn + 20]]
    # 50 tokens, and 30 more a turn. Tail by tail; where one would be short, or the answer has ended a block, its end.
    assert hits == [0, 49, 79, 109, 139, 169, 199, 229, 256]


@pytest.mark.parametrize("salts", [("", "a"), ("a", "b")])
@pytest.mark.parametrize("length", [100, 400])
def test_other_salts_share_no_tail(salts: tuple[str, str], length: int) -> None:
    one, other = salts
    with Served(StampModel(), PLACES) as served:
        hits = [served.answer(BASE[:length], salt=salt) for salt in (one, other, one, other)]
    expected = expected_answer(BASE[:length], 4)
    assert hits == [(expected, hit) for hit in (0, 0, length - 1, length - 1)]


def test_the_tail_used_longest_ago_goes() -> None:
    prompts = [[n, *BASE[:99]] for n in range(4)]
    with Served(StampModel(), PrefixSettings(32, num_tails=2)) as served:
        found = [served.answer(prompts[n])[1] for n in (0, 1, 0, 2, 0, 1)]
        assert found == [0, 0, 99, 0, 99, 0]
        assert served.engine.counts.num_snapshots_evicted == 2


def test_tails_keep_no_block_from_anybody() -> None:
    """One place for a snapshot, which the second prompt takes: blocks and tail of the first go for a long one."""
    with Served(StampModel(1024, cache_blocks=5), PrefixSettings(1, num_tails=8)) as served:
        assert served.prefix is not None
        first, second, large = BASE[:300], [5, *BASE[:299]], [6, *BASE[:900]]
        served.answer(first)
        served.answer(second)
        assert served.answer(first)[1] == 299, "by its tail alone"
        served.answer(large)
        assert served.prefix.index.num_blocks <= 5
        assert [served.answer(ids) for ids in (first, large)] == [
            (expected_answer(first, 4), 0),
            (expected_answer(large, 4), 0 if served.prefix.index.num_blocks < 4 else 900),
        ]


def test_a_request_that_was_sent_back_begins_with_its_tail() -> None:
    """Four blocks, and two requests that grow to three each."""
    with Served(StampModel(1024, max_sequences=2, cache_blocks=4), PLACES) as served:
        prompts = [[n, *BASE[:200]] for n in range(2)]
        asked = [served.submit(ids, 400) for ids in prompts]
        assert [one.tokens() for one in asked] == [expected_answer(ids, 400) for ids in prompts]
        assert served.engine.counts.num_preempted > 0
        assert served.engine.counts.num_prefix_hit >= 200
        assert served.prefix is not None
        assert len(served.prefix.index.tails) == 2, "an answer that is read again leaves none"


def test_scored_prompts_are_computed_and_leave_a_tail() -> None:
    with Served(StampModel(), PLACES) as served:
        for length in (100, 300):
            ids = BASE[:length]
            for _ in range(2):
                asked = served.submit(ids, prompt_logprobs=0, num_logprobs=0)
                assert asked.tokens() == expected_answer(ids, 4)
                assert (asked.request.num_cached, len(asked.prompt)) == (0, length)
            assert served.answer(ids)[1] == length - 1


def test_a_failed_request_leaves_no_tail_and_takes_the_one_it_began_with() -> None:
    model = StampModel()
    forward, failing = model.forward, list[int]()

    def unreliable(batch: ForwardBatch) -> torch.Tensor:
        if failing and failing.pop():
            raise ValueError("a step that fails, by itself as well")
        return forward(batch)

    model.forward = unreliable  # type: ignore[method-assign]
    with Served(model, PLACES) as served:
        for length in (100, 300):
            for fails in ([0, 0, 1, 1], [0, 1, 1]):  # popped from their ends: the second step, then the third
                failing[:] = reversed(fails)
                asked = served.submit(BASE[:length], 30)
                while asked.next().finish_reason is None:
                    pass
                assert asked.heard[-1].finish_reason is FinishReason.ERROR
                assert served.answer(BASE[:length]) == (expected_answer(BASE[:length], 4), 0)
                assert served.answer(BASE[:length]) == (expected_answer(BASE[:length], 4), length - 1)


def test_no_tail_lies_behind_blocks_that_were_withdrawn() -> None:
    """The one that begins alike, and whose blocks were taken up, has no finite logits in the step that ends the other's
    prompt."""
    model, is_running, are_submitted = StampModel(), threading.Event(), threading.Event()
    forward = model.forward

    def failing(batch: ForwardBatch) -> torch.Tensor:
        is_running.set()
        assert are_submitted.wait(60)
        logits = forward(batch)
        logits[batch.token_ids_T[batch.logits_ids] == 95] = torch.nan
        return logits

    model.forward = failing  # type: ignore[method-assign]
    good_ids = BASE[1:441]
    assert expected_answer(good_ids, 2)[0] != 95
    with Served(model, PLACES, max_prefill_tokens=300) as served:
        assert served.prefix is not None
        first = served.submit([1], 1)  # while it runs, both others come
        assert is_running.wait(60)
        bad, good = served.submit([*good_ids[:300], 95]), served.submit(good_ids, 2)
        are_submitted.set()
        first.tokens()
        assert good.tokens() == expected_answer(good_ids, 2)
        assert bad.next().finish_reason is FinishReason.ERROR
        assert served.prefix.faults() == []
        assert served.answer(good_ids, 2) == (expected_answer(good_ids, 2), 0)
        assert served.answer(good_ids, 2)[1] == len(good_ids) - 1


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("cuts", [False, True])
def test_a_step_that_is_run_again_leaves_the_right_tail(is_behind: bool, cuts: bool) -> None:
    """Whichever of the steps of three requests fails, in front of its forward or behind it."""
    prompts = [BASE[:600], [5, *BASE[:99]], [*BASE[:560], 3]]
    for failing_step in range(6):
        model = StampModel(1024)
        forward, steps = model.forward, iter(range(1000))

        def failing(batch: ForwardBatch, model: StampModel = model, at: int = failing_step) -> torch.Tensor:
            step = next(steps)  # noqa: B023
            if step == at and not is_behind:
                raise ValueError("once")
            found = forward(batch)  # noqa: B023
            if step == at:
                raise ValueError("once")
            return found

        model.forward = failing  # type: ignore[method-assign]
        with Served(model, PLACES, max_prefill_tokens=300) as served:
            assert served.prefix is not None
            served.prefix.cuts = cuts
            asked = [served.submit(ids, 5) for ids in prompts]
            assert [one.tokens() for one in asked] == [expected_answer(ids, 5) for ids in prompts]
            assert served.engine.counts.num_step_retries > 0
            found = [served.answer(ids, 5) for ids in prompts]
            assert found == [(expected_answer(ids, 5), len(ids) - 1) for ids in prompts]


class Unreliable(StampModel):
    """Every fifth step of several requests fails, before its forward or behind it."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__(1024, max_sequences=3, rows=rows, cache_blocks=9)
        self.chance = random.Random(seed)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        dice = self.chance.random() if len(batch.tables.slots) > 1 else 1.0
        if dice < 0.1:
            raise RuntimeError("before")
        logits = super().forward(batch)
        if dice < 0.2:
            raise RuntimeError("behind")
        return logits


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(1, 1), (3, 2), (32, 16)]),
    st.sampled_from([37, 256, 700]),
    st.booleans(),
    st.sampled_from([1, 9]),
)
def test_whatever_comes_and_goes(seed: int, places: tuple[int, int], limit: int, cuts: bool, rows: int) -> None:
    """Prompts of all lengths that share beginnings or are the same, conversations, aborts, failing steps, few blocks
    and places: every answer that ends is the right one, and all books balance."""
    chance, model = random.Random(seed), Unreliable(seed, rows)
    told: list[list[int]] = [[chance.randrange(VOCAB) for _ in range(600)]]
    sent: list[list[int]] = []
    with Served(model, PrefixSettings(places[0], 256, places[1]), limit) as served:
        assert served.prefix is not None
        served.prefix.cuts = cuts
        for _ in range(6):
            crowd: list[tuple[list[int], Asked, bool]] = []
            for _ in range(chance.randint(1, 5)):
                ids = chance.choice(told)[: chance.randint(1, 700)]
                ids = [*ids, *(chance.randrange(VOCAB) for _ in range(chance.choice([0, 1, 130])))]
                ids = chance.choice(sent) if sent and chance.random() < 0.4 else ids
                sent.append(ids)
                asked = served.submit(ids, chance.choice([1, 5, 40]), salt=chance.choice(["", "", "a"]))
                crowd.append((ids, asked, chance.random() < 0.3))
            for ids, asked, is_dropped in crowd:
                if is_dropped:
                    served.engine.abort(asked.request)
                    continue
                tokens = asked.tokens()
                assert tokens == expected_answer(ids, len(tokens))
                told.append([*ids, *tokens])
        for ids, asked, is_dropped in crowd:
            assert is_dropped or asked.request.num_cached < len(ids)


@pytest.mark.parametrize(("num_drafts", "num_tails"), [(0, 3), (1, 3), (2, 0)])
def test_tails_need_the_tokens_that_drafts_look_at(num_drafts: int, num_tails: int) -> None:
    """Two modules would name the row before the last with a token that is not there yet."""
    pool = CachePool(replace(StampModel(512).caches.spec, num_drafts=num_drafts))
    prefix = PrefixCache(pool, PrefixSettings(1, num_tails=3))
    assert (prefix.index.tails.num_places, prefix.store.num_tails) == (num_tails, num_tails)


def test_less_than_no_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="tails, found -1"):
        PrefixSettings(1, num_tails=-1)
