"""The other ranks: each does what rank 0 says, in its order, on caches at the same places, until there is no more."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from ownpath.cache.pools import PlacedSequence
from ownpath.cache.snapshot import PassedSnapshot, SnapshotStore
from ownpath.cache.tables import StepTables
from ownpath.engine.decoding_ranks import DECODE, REDRAW, FollowingDecoder
from ownpath.engine.leading import LOAD, LOAD_TAIL, PUT, SAVE, SAVE_TAIL, STEP
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ranks.control import RankMessage


class Follower:
    """One rank's part of what rank 0's engine runs. num_snapshots, num_tails: places, as many as rank 0 has. decoder:
    where rank 0 has one."""

    def __init__(
        self, model: Model, num_snapshots: int, num_tails: int = 0, decoder: FollowingDecoder | None = None
    ) -> None:
        self._model, self._pool, self._decoder = model, model.caches, decoder
        self._store = SnapshotStore(self._pool, num_snapshots, num_tails) if num_snapshots else None
        self._passed: dict[int, PassedSnapshot] = {}

    def follow(self, hear: Callable[[], RankMessage | None]) -> None:
        """Runs until ``hear`` has no more. Errors: PeerLost."""
        with torch.inference_mode():
            while (told := hear()) is not None:
                self.do(told)

    def do(self, told: RankMessage) -> object:
        """Does what a message says."""
        return self._ways[told["kind"]](told)

    @cached_property
    def _ways(self) -> Mapping[str, Callable[[RankMessage], object]]:
        return {
            STEP: self._step,
            DECODE: lambda told: self._decoding.follow(told),
            REDRAW: lambda told: self._decoding.take_tokens(told),
            SAVE: lambda told: self._snapshots.save(told["slot"], told["place"]),
            PUT: lambda told: self._snapshots.put(self._passed[told["taken"]], told["place"]),
            LOAD: lambda told: self._snapshots.load(told["place"], told["slot"]),
            SAVE_TAIL: lambda told: self._snapshots.save_tail(told["slot"], told["block"], told["place"]),
            LOAD_TAIL: lambda told: self._snapshots.load_tail(told["place"], told["slot"], told["block"]),
        }

    @property
    def _snapshots(self) -> SnapshotStore:
        assert self._store is not None, "rank 0 has snapshots, and this rank has none"
        return self._store

    @property
    def _decoding(self) -> FollowingDecoder:
        assert self._decoder is not None, "rank 0 has a decoder, and this rank has none"
        return self._decoder

    def _take_passed(self, taken: Sequence[Sequence[int]], living: Sequence[int]) -> tuple[PassedSnapshot, ...]:
        """Returns the snapshots that a step takes, and forgets those that rank 0 has forgotten. taken: slot, tokens
        and number of each."""
        kept = {*living}
        self._passed = {number: snapshot for number, snapshot in self._passed.items() if number in kept}
        new = {number: PassedSnapshot(self._pool, slot, end) for slot, end, number in taken}
        self._passed |= new
        return tuple(new.values())

    def _step(self, told: RankMessage) -> object:
        passed, sequences = self._take_passed(told["passed"], told["living"]), told["sequences"]
        placed = [PlacedSequence(self._pool, slot, tuple(blocks), start) for slot, start, _, blocks in sequences]
        tables = StepTables.of(placed, [num_rows for *_, num_rows, _ in sequences], passed)
        device = self._pool.spec.device
        ids, wanted = (torch.tensor(told[name], dtype=torch.int64) for name in ("token_ids", "logits_ids"))
        return self._model.forward(ForwardBatch(ids.to(device), tables, wanted.to(device)))
