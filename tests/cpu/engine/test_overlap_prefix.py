"""The prefix cache beside steps that are launched before the tokens of the one before are read.

The model is exact and reads of its caches all that V4 reads. Its device is late: steps and copies of snapshots are done
in the order in which they were given, some time after the engine has gone on. A copy in the wrong place among the steps
has rows too few or too many.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cpu.engine.late_device import LateDecoder, LateDevice, Work
from cpu.engine.served import VOCAB, Asked, Served
from cpu.engine.stamp_model import StampModel, expected_answer
from cpu.engine.test_overlap import until

from ownpath.cache.pools import CachePool
from ownpath.cache.snapshot import PassedSnapshot, SnapshotStore
from ownpath.cache.tables import DecodeTables
from ownpath.engine.prefix import PrefixSettings
from ownpath.engine.rows import PADDED
from ownpath.model.batch import ForwardBatch
from ownpath.trace import Ledger

BASE = [n * n % 89 for n in range(1200)]
PLACES = PrefixSettings(32)


class LateStampModel(StampModel):
    """Exact whole numbers, computed on a late device. Decode steps know nothing of the host's books."""

    decodes, ledger = True, Ledger({})

    def __init__(
        self, device: LateDevice, max_sequences: int = 4, rows: int = 1, cache_blocks: int | None = None
    ) -> None:
        super().__init__(1024, max_sequences, rows, cache_blocks)
        self.device = device

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Waits, as reading its logits does."""
        found: list[torch.Tensor] = []
        self.device.put(lambda: found.append(super(LateStampModel, self).forward(batch))).wait()
        return found[0]

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        rows = [part.tolist() for part in (token_ids_T, tables.slots_T, tables.positions_T, tables.blocks_TB)]
        logits_TV = torch.zeros(len(token_ids_T), self.config.vocab_size)
        for row, (token_id, slot, position, blocks) in enumerate(zip(*rows, strict=True)):
            if token_id != PADDED:
                self._write(slot, blocks, position, token_id)
                logits_TV[row, self._read(slot, blocks, position)] = 30
        return logits_TV


class LateStore(SnapshotStore):
    """Copies in the order of the device's work."""

    def __init__(self, pool: CachePool, places: PrefixSettings, device: LateDevice) -> None:
        super().__init__(pool, places.num_snapshots, places.num_tails)
        self._device = device

    def _later(self, copy: Work) -> None:
        self._device.put(copy)

    def save(self, slot: int, place: int) -> None:
        self._later(lambda: super(LateStore, self).save(slot, place))

    def put(self, taken: PassedSnapshot, place: int) -> None:
        self._later(lambda: super(LateStore, self).put(taken, place))

    def load(self, place: int, slot: int) -> None:
        self._later(lambda: super(LateStore, self).load(place, slot))

    def save_tail(self, slot: int, block: int, place: int) -> None:
        self._later(lambda: super(LateStore, self).save_tail(slot, block, place))

    def load_tail(self, place: int, slot: int, block: int) -> None:
        self._later(lambda: super(LateStore, self).load_tail(place, slot, block))


@contextmanager
def served(
    most_s: float = 0.0, num_places: int = 32, max_sequences: int = 4, num_tails: int = 0
) -> Iterator[tuple[Served, LateDecoder]]:
    device = LateDevice(most_s, seed=1)
    model = LateStampModel(device, max_sequences)
    decoder = LateDecoder(model, max_sequences, VOCAB)
    places = PrefixSettings(num_places, num_tails=num_tails)
    running = Served(model, places, decoder=decoder)
    assert running.prefix is not None
    running.prefix.store = LateStore(model.caches, places, device)
    try:
        with running:
            yield running, decoder
    finally:
        device.end()


def test_an_answer_that_fills_a_block_is_gone_on_from() -> None:
    """The snapshot lies between two steps, of which the second is launched while the first runs; each turn ends at
    another place of a block."""
    with served(most_s=0.0005) as (running, decoder):
        ids = BASE[:250]
        for turn, cached in enumerate((0, 256, 256, 256, 512)):
            answer, num_cached = running.answer(ids, 80)
            assert answer == expected_answer(ids, 80)
            assert num_cached == cached
            ids = [*ids, *answer, *BASE[turn : turn + 4]]
        assert decoder.num_behind > 200, "else no copy lay between two unread steps"


def test_a_copy_lies_between_the_steps_that_it_was_given_between() -> None:
    """The device is held before the row that fills a block: that step, the copy and the next step wait side by side."""
    with served() as (running, decoder):
        late, ids = decoder.late, BASE[:20]
        late.hold(1 + 256 - 20 - 1)  # the prompt's step, and a row each but the block's last
        first = running.submit(ids, 300)
        until(lambda: late.num_given == late.num_done + 3)
        assert running.engine.counts.num_snapshots_taken == 1
        late.release()
        assert first.tokens() == expected_answer(ids, 300)
        known = [*ids, *first.request.output_ids[:250]]
        assert running.answer(known, 5) == (expected_answer(known, 5), 256)


def test_a_tail_is_copied_between_the_last_row_of_a_prompt_and_the_next_one() -> None:
    """Prompts that graphs read beside an answer, a row a step: the rings lose the oldest row two steps later."""
    with served(most_s=0.0005, num_tails=8) as (running, decoder):
        beside = running.submit(BASE[:5], 600)
        beside.next()
        last = 0
        for length in (34, 50, 64):
            ids, other = BASE[:length], [*BASE[: length - 1], 95]
            for asked, hit in ((ids, last), (ids, length - 1), (other, length - 1)):
                assert running.answer(asked, 40) == (expected_answer(asked, 40), hit)
            last = length - 1
        assert beside.tokens() == expected_answer(BASE[:5], 600)
        assert decoder.num_behind > 200


@pytest.mark.parametrize("num_tails", [0, 2])
def test_whoever_joins_leaves_or_begins_alike(num_tails: int) -> None:
    """Prompts that part at random places, answers over blocks' ends and aborts: every answer is exact."""
    chance, asked = random.Random(7), list[Asked]()
    with served(most_s=0.0002, num_places=2, num_tails=num_tails) as (running, decoder):
        for number in range(30):
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
        assert counts.num_prefix_hits > 2
        assert counts.num_snapshots_taken > 4
        assert counts.num_snapshots_evicted > 0
        assert decoder.num_behind > 50
