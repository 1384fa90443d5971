"""Turns a scheduled step into the tensors of one forward, and assigns its logits to requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ownpath.cache.transfer import uploaded_ids
from ownpath.engine.scheduler import ScheduledChunk
from ownpath.model.batch import ForwardBatch


@dataclass(frozen=True)
class LogitsShare:
    """One chunk's rows of the step's logits: first those that score prompt tokens, then the one that samples.

    scored_ids: the prompt tokens that rows [start, start + len(scored_ids)) predict.
    sample_row: the row that predicts the next token; None when the chunk stops short of the last known token, or when
    no token is wanted.
    ends_prompt: whether the whole prompt has been through the model after this chunk.
    """

    chunk: ScheduledChunk
    start: int
    scored_ids: tuple[int, ...]
    sample_row: int | None
    ends_prompt: bool

    @property
    def is_answered(self) -> bool:
        """True if the request is told something after this step."""
        return self.sample_row is not None or bool(self.scored_ids) or self.ends_prompt


def build_batch(chunks: Sequence[ScheduledChunk], device: torch.device | str) -> tuple[ForwardBatch, list[LogitsShare]]:
    """Builds the forward of a step. The request of every chunk must have its cache already."""
    parts = [(chunk.request.next_ids(chunk.num_tokens), chunk.request.caches) for chunk in chunks]
    passed = [snapshot for chunk in chunks for snapshot in chunk.request.pass_stops(chunk.num_tokens)]
    batch = ForwardBatch.of(parts, device, passed=passed)
    shares: list[LogitsShare] = []
    logits_ids: list[int] = []
    for chunk, rows in zip(chunks, batch.tables.rows, strict=True):
        scored, scored_ids = _scored_rows(chunk), _scored_ids(chunk)
        samples, ends_prompt = _samples(chunk), _ends_prompt(chunk)
        start = len(logits_ids)
        logits_ids += range(rows.start + scored.start, rows.start + scored.stop)
        sample_row = len(logits_ids) if samples else None
        logits_ids += [rows.stop - 1] if samples else []
        shares.append(LogitsShare(chunk, start, scored_ids, sample_row, ends_prompt))
    return replace(batch, logits_ids=uploaded_ids(logits_ids, device)), shares


def decode_share(row: int, chunk: ScheduledChunk) -> LogitsShare:
    """Assigns a row of logits to a chunk of one token; the row may score a prompt token and sample."""
    return LogitsShare(chunk, row, _scored_ids(chunk), row if _samples(chunk) else None, _ends_prompt(chunk))


def _samples(chunk: ScheduledChunk) -> bool:
    return chunk.reaches_end and chunk.request.params.max_tokens > 0


def _ends_prompt(chunk: ScheduledChunk) -> bool:
    """Returns True for the chunk with which the prompt has been read for the first time."""
    request = chunk.request
    return chunk.reaches_end and request.is_prefilling and not request.output_ids


def _scored_rows(chunk: ScheduledChunk) -> range:
    """Returns those of the chunk's rows that predict a prompt token, if the request asks for log-probabilities of it
    and has none yet: a prompt that is read again is not scored again."""
    request = chunk.request
    if request.params.prompt_logprobs is None or not request.is_prefilling:
        return range(0)
    start, known = request.num_computed, len(request.scored_prompt)
    stop = min(start + chunk.num_tokens, len(request.prompt_ids) - 1)
    return range(max(start, known) - start, max(stop, known, start) - start)


def _scored_ids(chunk: ScheduledChunk) -> tuple[int, ...]:
    """Returns the prompt tokens that ``_scored_rows`` predict."""
    rows, first = _scored_rows(chunk), chunk.request.num_computed + 1
    return tuple(chunk.request.prompt_ids[first + rows.start : first + rows.stop])
