"""The prefix cache: an answer that began with a hit has the tokens of a cold one, whatever else runs, goes or ends.

The model is exact, and reads of its caches all that V4 reads; test_prefix_model has V4 itself.
"""

import random
from dataclasses import replace

import pytest
import torch
from cpu.engine.served import Served
from cpu.engine.stamp_model import VOCAB, StampModel, expected_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from ownpath.cache.pools import CachePool
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams
from ownpath.model.batch import ForwardBatch

BASE = [n * n % 89 for n in range(3000)]
"""Tokens that prompts begin with."""
PLACES = PrefixSettings(32)


def hit_of(num_tokens: int) -> int:
    """Tokens that the same prompt finds: all full blocks that leave one token to compute."""
    return (num_tokens - 1) // 256 * 256


# 3 mod 4 is where four stacks gave a wrong token; 128 ends an HCA window; 256 a block.
@pytest.mark.parametrize("length", [1, 3, 4, 255, 256, 257, 259, 260, 384, 385, 511, 512, 513, 515, 1027])
def test_the_same_prompt_again(length: int) -> None:
    """Nothing before the last full block is computed, and the last token always."""
    model, ids = StampModel(), BASE[:length]
    with Served(model, PLACES) as served:
        assert served.answer(ids) == (expected_answer(ids, 4), 0)
        before = model.num_rows
        assert served.answer(ids) == (expected_answer(ids, 4), hit_of(length))
        assert model.num_rows - before == length - hit_of(length) + 3
        counts = served.engine.counts
        assert (counts.num_prefix_queried, counts.num_prefix_hit) == (2 * length, hit_of(length))
        assert counts.num_prefix_hits == (hit_of(length) > 0)


@pytest.mark.parametrize("max_prefill_tokens", [1, 100, 256, 300, 4096])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("cuts", [True, False], ids=["cut", "passed"])
def test_chunks_of_any_size_end_at_snapshots_or_pass_them(max_prefill_tokens: int, rows: int, cuts: bool) -> None:
    model, ids = StampModel(rows=rows), BASE[:600]
    with Served(model, PrefixSettings(32, interval=256), max_prefill_tokens) as served:
        assert served.prefix is not None
        served.prefix.cuts = cuts
        for length in (600, 600, 300, 257):
            found = served.answer(ids[:length], 3)
            assert found[0] == expected_answer(ids[:length], 3)
        assert found[1] == 256


def chunk_sizes(num_tokens: int, limit: int = 512) -> list[int]:
    return [min(limit, num_tokens - start) for start in range(0, num_tokens, limit)]


@pytest.mark.parametrize("length", [257, 300, 512, 515, 700, 1027])
def test_a_cold_prompt_takes_no_step_more(length: int) -> None:
    """Nor does one that parts from what is known: snapshots are taken on the way. It would, if chunks were cut."""
    model = StampModel(2048)
    forward, sizes = model.forward, list[int]()

    def counting(batch: ForwardBatch) -> torch.Tensor:
        sizes.append(len(batch.token_ids_T))
        return forward(batch)

    model.forward = counting  # type: ignore[method-assign]
    fork = [*BASE[:259], *BASE[: length - 1]]
    with Served(model, PrefixSettings(32, interval=256)) as served:
        assert served.answer(BASE[:length], 2) == (expected_answer(BASE[:length], 2), 0)
        assert sizes == [*chunk_sizes(length), 1]
        assert served.answer(fork, 1) == (expected_answer(fork, 1), 256)
        assert sizes[len(chunk_sizes(length)) + 1 :] == chunk_sizes(len(fork) - 256)
        assert served.prefix is not None
        sizes.clear()
        served.prefix.clear()
        served.prefix.cuts = True
        assert served.answer(BASE[:length], 1) == (expected_answer(BASE[:length], 1), 0)
        assert len(sizes) > len(chunk_sizes(length))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_cut_where_the_order_of_sums_decides_tokens(dtype: torch.dtype) -> None:
    pool = CachePool(replace(StampModel(512).caches.spec, dtype=dtype))
    assert PrefixCache(pool, PrefixSettings(1)).cuts == (dtype is torch.bfloat16)


def test_a_conversation_goes_on_from_its_answer() -> None:
    """The next turn begins with the whole of the one before: its last full block lies in the answer."""
    ids, hits = BASE[:250], []
    with Served(StampModel(), PLACES) as served:
        for turn in range(6):
            answer, num_cached = served.answer(ids, 150)
            assert answer == expected_answer(ids, 150)
            hits.append(num_cached)
            ids = [*ids, *answer, *BASE[turn : turn + 90]]
    # Each turn has 240 tokens more; its answer's last token is known, but was never run.
    assert hits == [0, *((250 + 150 + 240 * turn - 1) // 256 * 256 for turn in range(5))]


def test_an_answer_keeps_its_last_snapshot_alone() -> None:
    """Three ends of blocks passed by an answer: the last stays, and those of the prompt."""
    with Served(StampModel(), PLACES) as served:
        first, _ = served.answer(BASE[:700], 900)
        assert served.prefix is not None
        assert served.prefix.index.num_snapshots == 2
        assert served.answer([*BASE[:700], *first[:700]])[1] == 512
        assert served.answer([*BASE[:700], *first])[1] == 1536


def test_prompts_that_part_share_from_the_third_on() -> None:
    """The first knows no fork; the second finds it, and takes the snapshot there; the third begins with it."""
    prompts = [[*BASE[:620], n, *BASE[n : n + 200]] for n in range(4)]
    with Served(StampModel(), PLACES) as served:
        found = [served.answer(ids) for ids in prompts]
    assert found == [(expected_answer(ids, 4), hit) for ids, hit in zip(prompts, (0, 0, 512, 512), strict=True)]


def test_a_long_prompt_is_found_every_interval() -> None:
    prompts = [BASE[:2600], [*BASE[:2100], 5], [*BASE[:1500], 5], [*BASE[:900], 5]]
    with Served(StampModel(4096), PrefixSettings(32, interval=512)) as served:
        found = [served.answer(ids) for ids in prompts]
    assert found == [(expected_answer(ids, 4), hit) for ids, hit in zip(prompts, (0, 2048, 1024, 512), strict=True)]


def test_a_request_hits_while_the_first_still_runs() -> None:
    """The first goes on as if alone, beside the second in its steps."""
    with Served(StampModel(), PLACES) as served:
        first = served.submit(BASE[:700], 300)
        first.next()
        assert served.answer(BASE[:700], 20) == (expected_answer(BASE[:700], 20), 512)
        assert first.tokens() == expected_answer(BASE[:700], 300)


@pytest.mark.parametrize("salts", [("", "a"), ("a", "b")])
def test_other_salts_share_nothing(salts: tuple[str, str]) -> None:
    one, other = salts
    with Served(StampModel(), PLACES) as served:
        hits = [served.answer(BASE[:300], salt=salt) for salt in (one, other, one, other)]
    assert hits == [(expected_answer(BASE[:300], 4), hit) for hit in (0, 0, 256, 256)]


def test_a_prompt_that_is_scored_is_computed() -> None:
    """Its log-probs need every row. What it computes serves others."""
    with Served(StampModel(), PLACES) as served:
        served.answer(BASE[:300])
        asked = served.submit(BASE[:300], prompt_logprobs=0, num_logprobs=0)
        assert asked.tokens() == expected_answer(BASE[:300], 4)
        assert asked.request.num_cached == 0
        assert len(asked.prompt) == 300
        scored = served.submit(BASE[:600], prompt_logprobs=2, num_logprobs=0)
        scored.tokens()
        assert served.answer(BASE[:600])[1] == 512


def test_eviction_under_pressure_changes_no_token() -> None:
    """Blocks for three of the longest sequences, many more prompts than that, and few places for snapshots."""
    model = StampModel(1024, max_sequences=3)
    prompts = [[n % 7, *BASE[: 200 + 31 * n]] for n in range(24)]
    with Served(model, PrefixSettings(4)) as served:
        for _ in range(2):
            asked = [served.submit(ids, 6) for ids in prompts]
            assert [one.tokens() for one in asked] == [expected_answer(ids, 6) for ids in prompts]
        counts = served.engine.counts
        assert counts.num_snapshots_evicted > 0
        assert counts.num_blocks_evicted > 0


def test_a_long_prompt_leaves_others_theirs() -> None:
    """Other prefixes survive a prompt that could fill every place: at intervals it takes a quarter of them."""
    with Served(StampModel(4096), PrefixSettings(8, interval=256)) as served:
        others = [[n, *BASE[:300]] for n in range(4)]
        for ids in others:
            served.answer(ids)
        served.answer(BASE[:2900])
        assert [served.answer(ids)[1] for ids in others] == [256] * 4


def test_intervals_grow_with_the_sequence() -> None:
    some = PrefixSettings(64)
    assert [some.interval_of(count) for count in (1, 4096, 65536, 65537, 2**20)] == [4096, 4096, 4096, 8192, 65536]
    assert PrefixSettings(1).interval_of(10**5) >= 10**5


def test_a_failed_request_leaves_nothing() -> None:
    """Its numbers may be wrong: the same prompt is cold again."""
    model = StampModel()
    forward, steps = model.forward, iter(range(1000))

    def failing(batch: ForwardBatch) -> torch.Tensor:
        if next(steps) in (3, 4):
            raise ValueError("a step that fails, by itself as well")
        return forward(batch)

    model.forward = failing  # type: ignore[method-assign]
    with Served(model, PrefixSettings(8)) as served:
        asked = served.submit(BASE[:700], 30)
        while asked.next().finish_reason is None:
            pass
        assert asked.heard[-1].error is not None
        assert served.answer(BASE[:700]) == (expected_answer(BASE[:700], 4), 0)
        assert served.answer(BASE[:700]) == (expected_answer(BASE[:700], 4), 512)


@pytest.mark.parametrize(("num_snapshots", "interval"), [(0, 4096), (4, 0), (4, 100), (4, -256)])
def test_settings_that_mean_nothing_are_refused(num_snapshots: int, interval: int) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        PrefixSettings(num_snapshots, interval)


def test_ids_of_prompt_and_answer_are_one_sequence() -> None:
    request = Request([1, 2, 3], SamplingParams(4), lambda output: None, output_ids=[4, 5])
    ids = [1, 2, 3, 4, 5]
    for start in range(6):
        for stop in range(start, 6):
            assert request.ids_between(start, stop) == ids[start:stop]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 32]), st.sampled_from([100, 256, 700]))
def test_whatever_comes_and_goes(seed: int, num_snapshots: int, max_prefill_tokens: int) -> None:
    """Prompts that share beginnings, turns of conversations, aborts, so few blocks that requests are sent back: every
    answer that ends is the right one, and all books balance."""
    chance = random.Random(seed)
    model = StampModel(1024, max_sequences=3, cache_blocks=9)
    told: list[list[int]] = [[chance.randrange(VOCAB) for _ in range(600)]]
    with Served(model, PrefixSettings(num_snapshots, interval=256), max_prefill_tokens) as served:
        for _ in range(6):
            crowd = []
            for _ in range(chance.randint(1, 5)):
                ids = chance.choice(told)[: chance.randint(1, 700)]
                ids = [*ids, *(chance.randrange(VOCAB) for _ in range(chance.choice([0, 1, 130])))]
                asked = served.submit(ids, chance.choice([1, 5, 40]), salt=chance.choice(["", "", "a"]))
                crowd.append((ids, asked, chance.random() < 0.3))
            for ids, asked, is_dropped in crowd:
                if is_dropped:
                    served.engine.abort(asked.request)
                    continue
                tokens = asked.tokens()
                assert tokens == expected_answer(ids, len(tokens))
                told.append([*ids, *tokens])
            assert model.caches.slots.faults() == [] or served.engine.num_open


def test_a_request_that_was_sent_back_goes_on_from_its_snapshot() -> None:
    """Six blocks, and two requests that grow to four each: one is sent back, and finds what it had computed."""
    model = StampModel(1024, max_sequences=3, cache_blocks=6)
    prompts = [[n, *BASE[:255]] for n in range(2)]
    with Served(model, PrefixSettings(16)) as served:
        asked = [served.submit(ids, 700) for ids in prompts]
        assert [one.tokens() for one in asked] == [expected_answer(ids, 700) for ids in prompts]
        assert [one.request.num_cached for one in asked] == [0, 0], "its own answer is not its prompt"
        assert served.engine.counts.num_preempted > 0
        assert served.engine.counts.num_prefix_hits > 0


@pytest.mark.parametrize("failing_step", [2, 3, 5])
def test_a_step_that_is_run_again_keeps_the_books(failing_step: int) -> None:
    """The retry cuts its chunks and takes snapshots as the step would have; others lose nothing."""
    model = StampModel()
    forward, steps = model.forward, iter(range(1000))

    def failing(batch: ForwardBatch) -> torch.Tensor:
        found = forward(batch)
        if next(steps) == failing_step:
            raise ValueError("a step that fails once")
        return found

    model.forward = failing  # type: ignore[method-assign]
    with Served(model, PrefixSettings(16), max_prefill_tokens=300) as served:
        prompts = [BASE[:900], [5, *BASE[:400]]]
        asked = [served.submit(ids, 8) for ids in prompts]
        assert [one.tokens() for one in asked] == [expected_answer(ids, 8) for ids in prompts]
        assert served.engine.counts.num_step_retries > 0
        found = [served.answer(ids, 8) for ids in prompts]
        assert found == [(expected_answer(ids, 8), hit) for ids, hit in zip(prompts, (768, 256), strict=True)]
