"""Models whose next-token logits are a function of the tokens so far and nothing else, for tests of what surrounds one.

They keep the real contract: caches of one pool, which advance by what was run, sequences that go on where their cache
ends, one logits row per ``logits_ids`` entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from support.checkpoints import SMALL

from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch

Rule = Callable[[tuple[int, ...]], torch.Tensor]
EOS_ID = 1
MAX_SEQUENCES = 16


class FakeModel:
    """``rule``: all tokens so far -> logits [vocab_size]. cache_blocks: of its caches; ``None``: enough for all."""

    def __init__(self, rule: Rule, vocab_size: int, max_model_len: int = 256, cache_blocks: int | None = None) -> None:
        self.config = ModelConfig.from_dict(SMALL | {"vocab_size": vocab_size, "eos_token_id": EOS_ID})
        self.rule, self.max_model_len = rule, max_model_len
        spec = CacheSpec(self.config, max_model_len, torch.float32, torch.device("cpu"), max_sequences=MAX_SEQUENCES)
        self.caches = CachePool(replace(spec, cache_blocks=cache_blocks))
        self.histories: dict[int, list[int]] = {}
        self.step_sizes: list[list[int]] = []

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        cache = self.caches.new_sequence(num_tokens)
        self.histories[cache.slot] = []
        return cache

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        tables = batch.tables
        self.step_sizes.append([rows.stop - rows.start for rows in tables.rows])
        rows = []
        for slot, start, own in zip(tables.slots, tables.starts, tables.rows, strict=True):
            history = self.histories[slot]
            assert start == tables.pool.slots.lengths[slot] <= len(history)
            del history[start:]  # rows that a failed step has written
            for token_id in batch.token_ids_T[own].tolist():
                history.append(token_id)
                rows.append(tuple(history))
        tables.extend()
        wanted = batch.logits_ids.tolist()
        assert len(rows) == len(batch.token_ids_T)
        return torch.stack([self.rule(rows[i]) for i in wanted]) if wanted else torch.empty(0, self.config.vocab_size)


def random_rule(vocab_size: int, forbidden: Sequence[int] = (EOS_ID,)) -> Rule:
    """Reproducible random logits for every history; ``forbidden`` tokens are very unlikely."""

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(history) % 2**63)
        logits = torch.randn(vocab_size, generator=generator) * 3
        logits[list(forbidden)] = -50.0
        return logits

    return rule


def script_rule(script: Sequence[int], vocab_size: int, prompt_len: int) -> Rule:
    """After a prompt of ``prompt_len`` tokens: the script's tokens in order, then EOS."""

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        position = len(history) - prompt_len
        token_id = script[position] if 0 <= position < len(script) else EOS_ID
        return torch.nn.functional.one_hot(torch.tensor(token_id), vocab_size).float() * 30

    return rule
