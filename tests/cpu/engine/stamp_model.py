"""A model of whole numbers that reads from its caches what V4 reads, and nothing else.

Each token has a stamp, made of its id and of the stamp before it, which is read from the window's ring. Rings of raw
rows hold stamps too, and entries their sums over the windows that V4's compressors average. The next token is a sum of
the row's own stamp, of the oldest one in its window, and of all entries: one wrong row anywhere, and it is another.
Arithmetic is exact, so an answer does not depend on how its prompt was cut, and steps cost next to nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from support.checkpoints import SMALL

from ownpath.cache.layout import ENTRIES, STATE, WINDOW, EntryKind, entry_row, first_row, ring_row
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch

VOCAB = 96
"""Answers have tokens below it; prompts may have more."""
_MODULUS = 2**16
"""Sums of 128 stamps are exact in float32."""
RATIOS = (4, 128)


def _stamp(before: int, token_id: int) -> int:
    return (before * 31 + token_id * 7 + 1) % _MODULUS


class StampModel:
    """Sequences of up to ``max_tokens``, of which ``max_sequences`` run, in ``cache_blocks`` blocks. All memory is NaN
    at first."""

    def __init__(
        self, max_tokens: int = 2048, max_sequences: int = 4, rows: int = 1, cache_blocks: int | None = None
    ) -> None:
        sizes = {"num_hidden_layers": 2, "compress_ratios": list(RATIOS), "head_dim": 4, "qk_rope_head_dim": 2}
        self.config = ModelConfig.from_dict(SMALL | sizes | {"index_head_dim": 2, "vocab_size": 512})
        spec = CacheSpec(self.config, max_tokens, torch.float32, torch.device("cpu"))
        spec = replace(spec, max_sequences=max_sequences, rows_per_request=rows, cache_blocks=cache_blocks)
        self.caches = CachePool(spec)
        for tensor in self.caches.tensors.values():
            tensor.fill_(torch.nan)
        self._of = {(m.group, m.ratio, m.part): (m, t.numpy()) for m, t in self.caches.tensors.items()}
        self.num_rows = 0
        """Rows computed so far."""

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        return self.caches.new_sequence(num_tokens)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        tables, ids = batch.tables, batch.token_ids_T.tolist()
        tokens: list[int] = []
        self.num_rows += len(ids)
        snapshots = {(end.snapshot.slot, end.snapshot.num_tokens): end.snapshot for end in tables.passed}
        for slot, start, own in zip(tables.slots, tables.starts, tables.rows, strict=True):
            blocks = self.caches.slots.owned[slot]
            for position, row in enumerate(range(own.start, own.stop), start):
                self._write(slot, blocks, position, ids[row])
                for layer_idx in self.caches.layers if (slot, position + 1) in snapshots else ():
                    snapshots[slot, position + 1].take(layer_idx)
                wanted = row in batch.logits_ids
                tokens.append(self._read(slot, blocks, position) if wanted else 0)
        tables.extend()
        chosen = torch.tensor([tokens[row] for row in batch.logits_ids.tolist()], dtype=torch.int64)
        return torch.nn.functional.one_hot(chosen, self.config.vocab_size).float() * 30

    def _write(self, slot: int, blocks: Sequence[int], position: int, token_id: int) -> None:
        stamp = _stamp(self._ring(WINDOW, 0, slot, position - 1) if position else 0, token_id)
        for (group, ratio, _), (member, memory) in self._of.items():
            if group is not ENTRIES:
                memory[ring_row(slot, position, member.num_rows)] = stamp
            elif (position + 1) % ratio == 0:
                window = position // ratio
                rows = range(first_row(window, ratio), position + 1)
                total = stamp + sum(self._ring(STATE, ratio, slot, row) for row in rows[:-1])
                memory[entry_row(blocks, window, member.num_rows)] = total % _MODULUS

    def _ring(self, group: object, ratio: int, slot: int, position: int) -> int:
        part = EntryKind.INDEX if ratio == RATIOS[0] else EntryKind.MAIN
        member, memory = self._of[group, ratio, part]  # type: ignore[index]
        return int(memory[ring_row(slot, position, member.num_rows), 0])

    def _read(self, slot: int, blocks: Sequence[int], position: int) -> int:
        total = self._ring(WINDOW, 0, slot, position)
        total += self._ring(WINDOW, 0, slot, position - 127) if position >= 127 else 0
        for (group, ratio, _), (member, memory) in self._of.items():
            if group is ENTRIES:
                rows = [entry_row(blocks, entry, member.num_rows) for entry in range((position + 1) // ratio)]
                total += int(memory[rows, 0].astype(np.int64).sum())
        return total % VOCAB


def expected_answer(prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The definition: stamps of all tokens, and sums of them, without any cache."""
    ids, stamps, entries = list(prompt_ids), [0], 0  # stamps[n] is that of token n, from 1 on
    for number in range(1, len(prompt_ids) + num_tokens + 1):
        if number > len(prompt_ids):
            oldest = stamps[number - 128] if number > 128 else 0
            ids.append((stamps[-1] + oldest + entries) % VOCAB)
        stamps.append(_stamp(stamps[-1], ids[number - 1]))
        if number % 4 == 0:  # of the last two windows; the indexer's keys as the main entries
            entries += 2 * (sum(stamps[max(1, number - 7) :]) % _MODULUS)
        if number % 128 == 0:
            entries += sum(stamps[number - 127 :]) % _MODULUS
    return ids[len(prompt_ids) :]
