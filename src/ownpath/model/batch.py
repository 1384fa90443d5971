"""What one step computes: the only per-step state, passed as an argument through the whole forward."""

from dataclasses import dataclass

import torch

from ownpath.model.caches import SequenceCache


@dataclass(frozen=True)
class Span:
    """One sequence's share of a step: batch rows [start, stop), continuing its cache at ``position``."""

    start: int
    stop: int
    position: int
    cache: SequenceCache


@dataclass(frozen=True)
class ForwardBatch:
    """Token rows of several sequences side by side; prefill chunks and single decode tokens mix freely.

    Shapes: token_ids_T int64 [T]; positions_T int64 [T], each row's position in its sequence;
        logits_ids int64 [R], the rows whose logits are wanted.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    spans: tuple[Span, ...]
    logits_ids: torch.Tensor

    @classmethod
    def of(
        cls,
        chunks: list[tuple[list[int], SequenceCache]],
        device: torch.device | str,
        all_logits: bool = False,
    ) -> "ForwardBatch":
        """Builds a step from (new token ids, cache) pairs; each continues where its cache ends.

        Logits are computed for the last row of each chunk, or for every row with ``all_logits``.
        Errors: ValueError for an empty chunk or one that would overrun its cache.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        spans = []
        for chunk, cache in chunks:
            if not chunk:
                raise ValueError("a sequence contributes no token to this step")
            position = cache.num_tokens
            if position + len(chunk) > cache.max_tokens:
                raise ValueError(f"{position} + {len(chunk)} tokens do not fit a cache of {cache.max_tokens}")
            spans.append(Span(len(token_ids), len(token_ids) + len(chunk), position, cache))
            token_ids += chunk
            positions += range(position, position + len(chunk))
        wanted = range(len(token_ids)) if all_logits else (span.stop - 1 for span in spans)
        return cls(
            torch.tensor(token_ids, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            tuple(spans),
            torch.tensor(list(wanted), dtype=torch.int64, device=device),
        )
