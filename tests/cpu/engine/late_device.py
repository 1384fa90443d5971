"""A device that computes behind the host, as a GPU does, for tests on a CPU: work is done in order, later, by a thread.

The model beside it keeps tokens in blocks and rings as the real one keeps keys, and reads an answer's history from
there, so a row with a wrong table, slot, position or token draws other tokens.
"""

import queue
import random
import threading
import time
from collections.abc import Callable

import torch
from cpu.engine.fake_model import FakeModel, Rule

from ownpath.cache.layout import BLOCK_TOKENS, NOBODY
from ownpath.cache.tables import DecodeTables
from ownpath.engine.decoder import Decoder, StepBegun
from ownpath.engine.graphs import Mark
from ownpath.engine.rows import PADDED, Staged
from ownpath.model.batch import ForwardBatch
from ownpath.trace import Ledger

RING_ROWS = 8
WAIT_S = 20
Work = Callable[[], None]


class LateMark(Mark):
    """A point in the device's work. An error of the work before it comes to light here, as with CUDA."""

    def __init__(self, device: "LateDevice") -> None:
        self.reached, self._late = threading.Event(), device

    def wait(self) -> None:
        assert self.reached.wait(WAIT_S), "the device hangs"
        if self._late.error is not None:
            raise RuntimeError("the device failed") from self._late.error


class LateDevice:
    """Does work in order on a thread of its own, each piece after a random delay of up to ``most_s``, and only while
    nobody holds it. error: what the first failing work raised; nothing is done after it.

    num_given, num_done: pieces of work.
    """

    def __init__(self, most_s: float = 0.0, seed: int = 0) -> None:
        self._work: queue.SimpleQueue[tuple[Work, LateMark] | None] = queue.SimpleQueue()
        self._moved, self._random, self._most_s = threading.Event(), random.Random(seed), most_s
        self.num_given = self.num_done = 0
        self.error: Exception | None = None
        self.release()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Work) -> LateMark:
        mark = LateMark(self)
        self.num_given += 1
        self._work.put((work, mark))
        return mark

    def hold(self, num_more: int = 0) -> None:
        """Does so many more pieces of work, and then none until it is released."""
        self._limit = self.num_done + num_more
        self._moved.set()

    def release(self) -> None:
        self.hold(2**62)

    @property
    def is_idle(self) -> bool:
        return self.num_given == self.num_done

    def end(self) -> None:
        self.release()
        self._work.put(None)
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        with torch.inference_mode():
            while (given := self._work.get()) is not None:
                work, mark = given
                time.sleep(self._random.random() * self._most_s)
                while self.num_done >= self._limit:
                    self._moved.clear()
                    assert self._moved.wait(WAIT_S) or self.num_done < self._limit
                try:
                    if self.error is None:
                        work()
                except Exception as error:
                    self.error = error
                self.num_done += 1
                mark.reached.set()


class PagedModel(FakeModel):
    """Tokens in place of keys: blocks hold a sequence's whole history, rings its last tokens."""

    decodes, ledger = True, Ledger({})

    def __init__(self, rule: Rule, vocab_size: int, device: LateDevice, max_model_len: int = 2 * BLOCK_TOKENS) -> None:
        super().__init__(rule, vocab_size, max_model_len)
        self.device = device
        slots = self.caches.slots
        self.blocks = torch.full((slots.num_blocks + 1, BLOCK_TOKENS), -7)
        self.rings = torch.full((slots.num_slots + 1, RING_ROWS), -7)
        self.rows: list[list[tuple[int, int]]] = []
        """(slot, position) of each row that decode steps ran, a list a step."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.device.put(lambda: None).wait()  # the stream is in order
        tables, histories = batch.tables, []
        for request, (slot, start, own) in enumerate(zip(tables.slots, tables.starts, tables.rows, strict=True)):
            assert start == tables.pool.slots.lengths[slot]
            for at, token_id in enumerate(batch.token_ids_T[own].tolist(), start):
                histories.append(self._extend(slot, tables.blocks_RB[request], at, token_id))
        tables.extend()
        wanted = batch.logits_ids.tolist()
        return (
            torch.stack([self.rule(histories[i]) for i in wanted]) if wanted else torch.empty(0, self.config.vocab_size)
        )

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        found, rows = [], []
        for token_id, slot, at, blocks in zip(
            token_ids_T.tolist(), tables.slots_T.tolist(), tables.positions_T.tolist(), tables.blocks_TB, strict=True
        ):
            if token_id == PADDED:
                assert (slot, at) == (NOBODY, 0)
                found.append(torch.zeros(self.config.vocab_size))
                continue
            rows.append((slot, at))
            found.append(self.rule(self._extend(slot, blocks, at, token_id)))
        self.rows.append(rows)
        return torch.stack(found)

    def _extend(self, slot: int, blocks: torch.Tensor, at: int, token_id: int) -> tuple[int, ...]:
        """Writes a token at its position; returns all up to it."""
        assert slot != NOBODY
        assert 0 <= token_id < self.config.vocab_size
        self.blocks[blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = token_id
        self.rings[slot, at % RING_ROWS] = token_id
        history: list[int] = self.blocks[blocks[: at // BLOCK_TOKENS + 1].long()].flatten()[: at + 1].tolist()
        last = range(max(0, at + 1 - RING_ROWS), at + 1)
        assert [history[place] for place in last] == [int(self.rings[slot, place % RING_ROWS]) for place in last]
        return tuple(history)


class LateDecoder(Decoder):
    """A decoder on a late device; every step counts as a graph, and all have their logits in the same memory.

    num_behind: steps begun while another one was unread. num_uploads: steps whose rows came from the host.
    """

    def __init__(self, model: PagedModel, max_rows: int, num_vocab: int) -> None:
        super().__init__(model, max_rows, num_vocab)
        self.late, self._marks = model.device, [LateMark(model.device) for _ in self._marks]
        for mark in self._marks:
            mark.reached.set()
        self.num_behind = self.num_uploads = 0
        self._logits_TV = torch.zeros(self.buckets[-1], num_vocab)

    def has_graph(self, num_rows: int) -> bool:
        return True

    def launch(self, count: int) -> torch.Tensor:
        logits_TV = self._logits_TV[:count]
        return logits_TV.copy_(super().launch(count))

    def _launch_whole(self, begun: StepBegun, count: int, staged: Staged | None) -> None:
        self.num_uploads += staged is not None
        super()._launch_whole(begun, count, staged)

    def _take_turn(self) -> int:
        self.num_behind += self._num_unread
        return super()._take_turn()

    def _enqueue(self, work: Work, turn: int) -> Mark:
        return self.late.put(work)
