"""The rows of one step: the only per-step state, passed as an argument through the whole forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ownpath.cache.pools import SequenceCache
from ownpath.cache.snapshot import PassedSnapshot
from ownpath.cache.tables import StepTables
from ownpath.cache.transfer import uploaded_ids


@dataclass(frozen=True)
class ForwardBatch:
    """Token rows of several sequences side by side; prefill chunks and single decode tokens mix freely.

    tables: the sequence and position of each row, and its places in the caches.
    Shapes: token_ids_T int64 [T]; logits_ids int64 [L], the rows whose logits are wanted.
    """

    token_ids_T: torch.Tensor
    tables: StepTables
    logits_ids: torch.Tensor

    @property
    def positions_T(self) -> torch.Tensor:
        """Each row's position in its sequence: int64 [T]."""
        return self.tables.positions_T

    @classmethod
    def of(
        cls,
        chunks: Sequence[tuple[Sequence[int], SequenceCache]],
        device: torch.device | str,
        all_logits: bool = False,
        passed: Sequence[PassedSnapshot] = (),
    ) -> "ForwardBatch":
        """Builds a step from (new token ids, cache) pairs; each continues where its cache ends.

        Logits are computed for the last row of each chunk, or for every row with ``all_logits``. passed: as of
        ``StepTables.of``.
        Errors: ValueError for an empty chunk or one that would overrun its cache.
        """
        for chunk, cache in chunks:
            if not chunk:
                raise ValueError("a sequence contributes no token to this step")
            if cache.num_tokens + len(chunk) > cache.max_tokens:
                raise ValueError(f"{cache.num_tokens} + {len(chunk)} tokens do not fit a cache of {cache.max_tokens}")
        tables = StepTables.of([cache for _, cache in chunks], [len(chunk) for chunk, _ in chunks], passed)
        token_ids = [token_id for chunk, _ in chunks for token_id in chunk]
        wanted = range(len(token_ids)) if all_logits else [end - 1 for end in tables.row_ends]
        return cls(uploaded_ids(token_ids, device), tables, uploaded_ids(wanted, device))
