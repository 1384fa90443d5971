"""An engine with a prefix cache, as tests of that ask it."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, ScoredToken, StepOutput

VOCAB, WAIT_S = 96, 60


@dataclass
class Asked:
    """A request and its answer."""

    request: Request
    outputs: "queue.SimpleQueue[StepOutput]"
    heard: list[StepOutput] = field(default_factory=list)

    def next(self) -> StepOutput:
        self.heard.append(self.outputs.get(timeout=WAIT_S))
        return self.heard[-1]

    def tokens(self) -> list[int]:
        while not self.heard or self.heard[-1].finish_reason is None:
            assert self.next().error is None
        return [output.token.token_id for output in self.heard if output.token is not None]

    @property
    def prompt(self) -> tuple[ScoredToken, ...]:
        return next(output.prompt for output in self.heard if output.prompt)


class Served:
    """A running engine. settings: ``None``: without a prefix cache. decoder: ``None``: the model's ``forward`` runs all
    steps, or a decoder of this device's if it ``decodes``. drafts: ``None``: no step has any. At the end all its books
    balance."""

    def __init__(
        self,
        model: Any,
        settings: PrefixSettings | None,
        max_prefill_tokens: int = 512,
        *,
        decodes: bool = False,
        decoder: Decoder | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        self.pool: CachePool = model.caches
        spec = self.pool.spec
        config = EngineConfig(
            dtype=spec.dtype,
            max_model_len=spec.max_tokens,
            max_num_seqs=spec.max_sequences,
            max_prefill_tokens=max_prefill_tokens,
        )
        self.prefix = None if settings is None else PrefixCache(self.pool, settings)
        decoder = Decoder(model, spec.max_sequences, VOCAB) if decodes else decoder
        run = {"decoder": decoder, "prefix": self.prefix, "drafts": drafts}
        self.engine = Engine(model, config, VOCAB, end_token_ids=(), **run)
        self.engine.start()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        slots = self.pool.slots
        assert not slots.owned
        assert slots.faults() == []
        if self.prefix is not None:
            assert self.prefix.faults() == []
            assert slots.num_free_blocks + slots.num_idle_blocks == slots.num_blocks
            self.prefix.clear()
        assert slots.num_free_blocks == slots.num_blocks

    def submit(self, ids: Sequence[int], num_tokens: int = 4, salt: str = "", **params: Any) -> Asked:
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        sampling = SamplingParams(num_tokens, **{"temperature": 0.0} | params)
        asked = Asked(Request(list(ids), sampling, heard.put, salt=salt), heard)
        self.engine.submit([asked.request])
        return asked

    def answer(self, ids: Sequence[int], num_tokens: int = 4, **params: Any) -> tuple[list[int], int]:
        """Returns an answer, and how many tokens of the prompt were not computed."""
        asked = self.submit(ids, num_tokens, **params)
        return asked.tokens(), asked.request.num_cached
