"""Models with a module of drafts that is right as often as a test wants, on a device that computes behind the host.

A guess is what the model itself would say, in a share of all places that only depends on the tokens so far, and another
token elsewhere. So an answer with drafts must be the one without, however many guesses are right.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from cpu.engine.fake_model import Rule
from cpu.engine.late_device import LateDevice, LateMark, PagedModel, Work
from cpu.engine.stamp_model import VOCAB as STAMP_VOCAB
from cpu.engine.test_overlap_prefix import LateStampModel

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import DecodeTables
from ownpath.engine.draft_decoder import ROWS, DraftBegun, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.graphs import Mark
from ownpath.engine.rows import PADDED, Staged
from ownpath.model.batch import ForwardBatch


class Seen(NamedTuple):
    """A stand-in for a step's hidden: each row's logits, and what the module makes of it and of the next token."""

    logits_TV: torch.Tensor
    guesses: Sequence[Callable[[int], torch.Tensor]]


class Always(DraftPolicy):
    """Drafts in every step that may."""

    def drafts(self, num_requests: int) -> bool:
        return True


class DraftingPagedModel(PagedModel):
    """A ``PagedModel`` that drafts. share: of guesses that are right."""

    def __init__(
        self, rule: Rule, vocab_size: int, device: LateDevice, share: float, cache_blocks: int | None = None
    ) -> None:
        super().__init__(rule, vocab_size, device)
        self.caches = CachePool(replace(self.caches.spec, rows_per_request=ROWS, cache_blocks=cache_blocks))
        self.share, self._seen = share, list[tuple[int, ...]]()
        self.has_read = False
        """True once the module has read a prompt."""

    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Seen:
        pairs = token_ids_T.view(-1, ROWS).tolist()
        assert all((one == PADDED) == (other == PADDED) for one, other in pairs)
        self._seen = []
        logits_TV = self.decode(token_ids_T, tables)
        seen = iter(self._seen)
        histories = [() if token_id == PADDED else next(seen) for token_id in token_ids_T.tolist()]
        return Seen(logits_TV, [partial(self._guess, history) for history in histories])

    def guess(self, verified: Seen, next_ids_T: torch.Tensor) -> torch.Tensor:
        return torch.stack([guess(one) for guess, one in zip(verified.guesses, next_ids_T.tolist(), strict=True)])

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Any]:
        self.device.put(lambda: None).wait()  # which notes what it sees as well
        self._seen, self.has_read = [], True
        return self.forward(batch), self._seen

    def draft_forward(
        self, hidden: Any, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor:
        next_ids = next_ids_T.tolist()
        assert len(next_ids) == len(hidden)
        found = [self._guess(hidden[row], next_ids[row]) for row in rows_R.tolist()]
        return torch.stack(found) if found else torch.empty(0, self.config.vocab_size)

    def _extend(self, slot: int, blocks: torch.Tensor, at: int, token_id: int) -> tuple[int, ...]:
        history = super()._extend(slot, blocks, at, token_id)
        self._seen.append(history)
        return history

    def _guess(self, history: tuple[int, ...], next_id: int) -> torch.Tensor:
        if next_id == PADDED:
            return torch.zeros(self.config.vocab_size)
        is_right = hash((*history, next_id, 7)) % 1000 < 1000 * self.share
        logits = self.rule((*history, next_id))
        return logits if is_right else logits.roll(1)


class DraftingStampModel(LateStampModel):
    """A ``LateStampModel`` that drafts. A guess writes the row that it looks at, as the next step does again."""

    def __init__(self, device: LateDevice, share: float, cache_blocks: int | None = None) -> None:
        super().__init__(device, rows=ROWS, cache_blocks=cache_blocks)
        self.share = share

    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Seen:
        rows = [part.tolist() for part in (token_ids_T, tables.slots_T, tables.positions_T, tables.blocks_TB)]
        logits_TV = self.decode(token_ids_T, tables)
        guesses = [partial(self._guess, slot, blocks, at + 1) for _, slot, at, blocks in zip(*rows, strict=True)]
        return Seen(logits_TV, guesses)

    def guess(self, verified: Seen, next_ids_T: torch.Tensor) -> torch.Tensor:
        return torch.stack([guess(one) for guess, one in zip(verified.guesses, next_ids_T.tolist(), strict=True)])

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Any]:
        return self.forward(batch), None

    def draft_forward(
        self, hidden: Any, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor:
        tables, next_ids = batch.tables, next_ids_T.tolist()
        places = zip(tables.slots, tables.blocks_RB.tolist(), strict=True)
        ends = dict(zip((end - 1 for end in tables.row_ends), places, strict=True))
        found: list[torch.Tensor] = []

        def look() -> None:
            for row in rows_R.tolist():
                slot, blocks = ends[row]
                found.append(self._guess(slot, blocks, int(tables.positions_T[row]) + 1, next_ids[row]))

        self.device.put(look).wait()
        return torch.stack(found) if found else torch.empty(0, self.config.vocab_size)

    def _guess(self, slot: int, blocks: Sequence[int], at: int, next_id: int) -> torch.Tensor:
        logits = torch.zeros(self.config.vocab_size)
        if next_id != PADDED:
            assert at // BLOCK_TOKENS < len(blocks)
            self._write(slot, blocks, at, next_id)
            is_right = hash((at, next_id)) % 1000 < 1000 * self.share
            logits[(self._read(slot, blocks, at) + (not is_right)) % STAMP_VOCAB] = 30
        return logits


class LateDraftDecoder(DraftDecoder):
    """A decoder of drafts on a late device; every step counts as a graph, and all have their logits in one memory.

    num_behind: steps begun while another one was unread. num_uploads: steps whose rows came from the host.
    """

    def __init__(self, model: Any, max_requests: int, num_vocab: int) -> None:
        super().__init__(model, max_requests, num_vocab)
        self.late, self._marks = model.device, [LateMark(model.device) for _ in self._marks]
        for mark in self._marks:
            mark.reached.set()
        self.num_behind = self.num_uploads = 0
        self._logits_TV = torch.zeros(ROWS * self.buckets[-1], num_vocab)

    def has_graph(self, num_requests: int) -> bool:
        return True

    def launch(self, count: int) -> torch.Tensor:
        logits_TV = self._logits_TV[: ROWS * count]
        return logits_TV.copy_(super().launch(count))

    def _launch_whole(self, begun: DraftBegun, staged: Staged | None) -> None:
        self.num_uploads += staged is not None
        super()._launch_whole(begun, staged)

    def _take_turn(self) -> int:
        self.num_behind += self._num_unread
        return super()._take_turn()

    def _enqueue(self, work: Work, turn: int) -> Mark:
        return self.late.put(work)
