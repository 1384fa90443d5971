"""Decides which requests run in a step, and how many of their tokens. Pure bookkeeping: no tensor, no model, no clock.

A step costs time with every token in it, so each step has two limits: ``max_num_seqs`` sequences and
``max_prefill_tokens`` prompt tokens. The rules, in order:

1. Every running request that has read its prompt decodes one token. An answer once begun never waits for a
   newcomer.
2. What is left of the prefill limit goes to the prompts, oldest request first; a long prompt is read in
   chunks.
3. A waiting request is admitted, oldest first, when a sequence is free and prefill tokens are left for it.

Example: 2 sequences, 4 prefill tokens. A has a 6-token prompt, B a 3-token one, C waits.

    step 1: A reads 4            (limit reached: B is not admitted, it could do nothing yet)
    step 2: A reads 2, B reads 2 (A's prompt is complete: its first token is sampled)
    step 3: A decodes 1, B reads 1
    step 4: A and B decode 1 each; C waits until one of them ends

Nobody starves: the oldest unread prompt always gets the whole limit, so it ends after finitely many steps;
and requests are admitted in the order in which they came.
"""

from collections import deque
from dataclasses import dataclass

from ownpath.engine.request import Request


@dataclass(frozen=True)
class ScheduledChunk:
    """A request's share of one step: its next ``num_tokens`` tokens."""

    request: Request
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """True if no known token is left after this chunk, so that its last row predicts the next token."""
        return self.num_tokens == self.request.num_pending


class Scheduler:
    """FIFO continuous batching with chunked prefill."""

    def __init__(self, max_num_seqs: int, max_prefill_tokens: int) -> None:
        if max_num_seqs < 1 or max_prefill_tokens < 1:
            raise ValueError("max_num_seqs and max_prefill_tokens must be at least 1")
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request behind all others."""
        assert request.num_computed == 0, "a request is added once, before anything of it has run"
        assert request.prompt_ids, "an empty prompt has no row to sample from"
        self.waiting.append(request)

    def remove(self, request: Request) -> bool:
        """Forgets a finished or aborted request, queued or running. Returns whether it was known."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
                return True
        return False

    def schedule(self) -> list[ScheduledChunk]:
        """Plans the next step. Its requests stay in ``running`` until they are removed."""
        chunks = [ScheduledChunk(request, 1) for request in self.running if not request.is_prefilling]
        budget = self._max_prefill_tokens
        for request in self.running:
            if request.is_prefilling and budget:
                chunks.append(ScheduledChunk(request, min(budget, request.num_pending)))
                budget -= chunks[-1].num_tokens
        while self.waiting and budget and len(self.running) < self._max_num_seqs:
            request = self.waiting.popleft()
            self.running.append(request)
            chunks.append(ScheduledChunk(request, min(budget, request.num_pending)))
            budget -= chunks[-1].num_tokens
        return chunks
