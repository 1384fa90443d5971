"""Drafts beside the prefix cache, and in memory that ends: answers of a model that reads of its caches what V4 reads.

Its rings are longer by the spare rows. A step may pass a block's end, whose snapshot is then copied when a row or two
behind it are written.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cpu.engine.drafting_model import Always, DraftingStampModel, LateDraftDecoder
from cpu.engine.late_device import LateDecoder, LateDevice
from cpu.engine.served import VOCAB, Asked, Served
from cpu.engine.stamp_model import expected_answer
from cpu.engine.test_overlap_prefix import BASE, LateStore

from ownpath.engine.drafting import Drafts
from ownpath.engine.load import DraftCounts
from ownpath.engine.prefix import PrefixSettings


@contextmanager
def served(
    share: float, num_places: int = 32, num_tails: int = 0, cache_blocks: int | None = None
) -> Iterator[tuple[Served, LateDraftDecoder]]:
    device = LateDevice(0.0003, seed=1)
    model = DraftingStampModel(device, share, cache_blocks)
    decoder, plain = LateDraftDecoder(model, 4, VOCAB), LateDecoder(model, 4, VOCAB)
    places = PrefixSettings(num_places, num_tails=num_tails)
    drafts = Drafts(model, decoder, Always())  # type: ignore[arg-type]  # its steps are made of whole numbers
    running = Served(model, places, decoder=plain, drafts=drafts)
    assert running.prefix is not None
    running.prefix.store = LateStore(model.caches, places, device)
    try:
        with running:
            yield running, decoder
    finally:
        device.end()


def counts_of(running: Served) -> DraftCounts:
    return running.engine.load().drafts


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_an_answer_that_passes_a_blocks_end_is_gone_on_from(share: float) -> None:
    """Each turn passes block ends, by one row or by two; the next begins behind the last of them."""
    with served(share) as (running, decoder):
        ids = BASE[:249]
        for turn, cached in enumerate((0, 256, 256, 256, 512)):
            answer, num_cached = running.answer(ids, 80)
            assert answer == expected_answer(ids, 80)
            assert num_cached == cached
            ids = [*ids, *answer, *BASE[turn : turn + 4]]
        assert decoder.num_behind > 50, "else no copy lay between two unread steps"
        assert (counts_of(running).num_right > 100) == (share > 0.5)


@pytest.mark.parametrize(("num_tails", "cache_blocks"), [(0, None), (2, 9)])
def test_whoever_joins_leaves_or_begins_alike(num_tails: int, cache_blocks: int | None) -> None:
    """Prompts that part at random places, answers over blocks' ends, aborts, and few blocks: every answer is exact."""
    chance, asked = random.Random(7), list[Asked]()
    with served(0.7, 2, num_tails, cache_blocks) as (running, decoder):
        for number in range(24):
            ids = [number % 3, *BASE[: chance.choice((3, 12, 240, 255, 256, 299))], *([number] * chance.randint(0, 9))]
            asked.append(running.submit(ids, chance.choice((1, 9, 40))))
            if chance.random() < 0.2:
                running.engine.abort(asked.pop().request)
            elif chance.random() < 0.3:
                asked[-1].tokens()
        for one in asked:
            prompt_ids, num_tokens = one.request.prompt_ids, one.request.params.max_tokens
            assert one.tokens() == expected_answer(prompt_ids, num_tokens), len(prompt_ids)
        counts = running.engine.counts
        assert counts.num_prefix_hits > 0
        assert counts_of(running).num_right > 50
        assert decoder.num_behind > 20


def test_requests_are_sent_back_and_go_on() -> None:
    """The second one needs a block that the first has taken, waits, and reads its answer so far anew."""
    with served(0.7, cache_blocks=6) as (running, _):
        first, second = running.submit(BASE[:500], 280), running.submit(BASE[1:521], 300)
        assert first.tokens() == expected_answer(BASE[:500], 280)
        assert second.tokens() == expected_answer(BASE[1:521], 300)
        assert running.engine.load().counts.num_preempted >= 1
