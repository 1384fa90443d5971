"""Rank 0's model, as the engine uses it: each step, and each copy of a snapshot, is told to the other ranks first.

The others hold the same caches at the same places, and run the same step on their part of the weights. So one rank
alone schedules, samples and keeps the books of slots and blocks.
"""

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.cache.snapshot import PassedSnapshot, SnapshotStore
from ownpath.config import ModelConfig
from ownpath.engine.decoding_ranks import running_together
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ranks.control import Leader, RankMessage

STEP, SAVE, PUT, LOAD = "step", "save", "put", "load"
SAVE_TAIL, LOAD_TAIL = "save-tail", "load-tail"
"""Kinds of messages, see ``engine.following``."""


class PassedNumbers:
    """Numbers for the snapshots that a step takes on its way, which its other ranks take too."""

    def __init__(self) -> None:
        self._next = count()
        self._living: WeakValueDictionary[int, PassedSnapshot] = WeakValueDictionary()

    def new(self, snapshot: PassedSnapshot) -> int:
        """Returns the number of a snapshot that is to be taken."""
        number = next(self._next)
        self._living[number] = snapshot
        return number

    def of(self, snapshot: PassedSnapshot) -> int:
        """Returns a snapshot's number."""
        return next(number for number, living in self._living.items() if living is snapshot)

    def living(self) -> list[int]:
        """Returns the numbers of snapshots that somebody still holds."""
        return list(self._living)


class LeadingModel:
    """A model that several ranks run, on rank 0; see ``steps.LanguageModel``. Its decode steps are those of a
    ``LeadingDecoder``, where there is one."""

    def __init__(self, model: Model, leader: Leader) -> None:
        self._model, self._leader = model, leader
        self.passed = PassedNumbers()

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    @property
    def caches(self) -> CachePool:
        """This rank's caches; their books are all ranks'."""
        return self._model.caches

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """See ``Model.new_cache``."""
        return self._model.new_cache(num_tokens)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See ``Model.forward``. Errors: PeerLost; RanksDiffer where this rank's step fails and the others' may not."""
        message = self._message(batch)
        with running_together(self._leader, message):
            logits_RV = self._run(batch, message)
        window = self._model.window
        if window is not None and len(batch.logits_ids):  # which the engine waits for anyway
            torch.cuda.current_stream(logits_RV.device).synchronize()
            window.check()
        return logits_RV

    def _run(self, batch: ForwardBatch, message: RankMessage) -> torch.Tensor:
        """Runs this rank's part of a step that all are told of."""
        return self._model.forward(batch)

    def _message(self, batch: ForwardBatch) -> RankMessage:
        living, tables = self.passed.living(), batch.tables
        taken = [(end.snapshot.slot, end.snapshot.num_tokens, self.passed.new(end.snapshot)) for end in tables.passed]
        owned, spans = tables.pool.slots.owned, zip(tables.slots, tables.starts, tables.rows, strict=True)
        return {
            "kind": STEP,
            "token_ids": batch.token_ids_T.tolist(),
            "sequences": [(slot, start, rows.stop - rows.start, owned[slot]) for slot, start, rows in spans],
            "logits_ids": batch.logits_ids.tolist(),
            "passed": taken,
            "living": living,
        }


class Teller(Protocol):
    """Whoever tells ranks what to do."""

    def tell(self, message: RankMessage) -> None: ...


class LeadingStore(SnapshotStore):
    """The snapshots of all ranks: each copy is made on every rank. By data, of one rank: it is made there alone, and
    here where the pool is more than books."""

    def __init__(
        self, pool: CachePool, num_places: int, leader: Teller, passed: PassedNumbers, num_tails: int = 0
    ) -> None:
        super().__init__(pool, num_places, num_tails)
        self._leader, self._passed = leader, passed

    def save(self, slot: int, place: int) -> None:
        """See ``SnapshotStore``."""
        self._leader.tell({"kind": SAVE, "slot": slot, "place": place})
        super().save(slot, place)

    def put(self, taken: PassedSnapshot, place: int) -> None:
        """See ``SnapshotStore``."""
        self._leader.tell({"kind": PUT, "taken": self._passed.of(taken), "place": place})
        super().put(taken, place)

    def load(self, place: int, slot: int) -> None:
        """See ``SnapshotStore``."""
        self._leader.tell({"kind": LOAD, "place": place, "slot": slot})
        super().load(place, slot)

    def save_tail(self, slot: int, block: int, place: int) -> None:
        """See ``SnapshotStore``."""
        self._leader.tell({"kind": SAVE_TAIL, "slot": slot, "block": block, "place": place})
        super().save_tail(slot, block, place)

    def load_tail(self, place: int, slot: int, block: int) -> None:
        """See ``SnapshotStore``."""
        self._leader.tell({"kind": LOAD_TAIL, "place": place, "slot": slot, "block": block})
        super().load_tail(place, slot, block)
