"""DeepSeek-V4's backbone and head: token ids in, logits out, caches extended on the way."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from ownpath.attention.decode import PagedAttention
from ownpath.attention.interface import DecodeStep, PreparedStep
from ownpath.attention.rope import Rope
from ownpath.cache.chunks import ChunkTables
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.cache.tables import DecodeTables
from ownpath.config import ModelConfig
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Hidden, Residual
from ownpath.model.dspark import DSpark
from ownpath.model.mtp import Mtp
from ownpath.model.ranks import GatheredHead, Product
from ownpath.runners import HyperBoundary
from ownpath.trace import Ledger

if TYPE_CHECKING:
    from ownpath.runners.exchange import Window


class Verified(NamedTuple):
    """A decode step's logits [T, vocab] and hidden, and the step, for the drafts' layers."""

    logits_TV: torch.Tensor
    hidden: Hidden
    step: DecodeStep


@dataclass(frozen=True)
class Model:
    """A loaded model. ``ledger`` counts which runner each slot really ran on.

    drafts: the loaded MTP modules, in order. Each takes the ``hidden`` of the module before it. dspark: the other
    drafter, if it is loaded.
    lossless_casts: slots whose NVFP4 weights are MXFP4 weights rewritten without loss.
    contradictions: claims of config.json about formats that the tensors do not bear out.
    share: adds up tensors [T, C] over ranks, for tokens that only one rank has; ``None`` where all have the same.
    window: where kernels push what ranks exchange; ``None`` where none does.
    """

    config: ModelConfig
    embed_VD: torch.Tensor
    blocks: tuple[Block, ...]
    hc_head: HyperBoundary
    head: Product
    sliding_rope: Rope
    compress_rope: Rope
    paged: PagedAttention | None
    cache_spec: CacheSpec
    ledger: Ledger
    drafts: tuple[Mtp, ...] = ()
    dspark: DSpark | None = None
    lossless_casts: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    share: Callable[[torch.Tensor], torch.Tensor] | None = None
    window: "Window | None" = None

    @property
    def decodes(self) -> bool:
        """True if ``decode`` is planned."""
        return self.paged is not None

    @cached_property
    def caches(self) -> CachePool:
        """The memory of all sequences' caches, allocated when the first sequence asks for its own."""
        return CachePool(self.cache_spec)

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """Takes empty caches for one sequence, see ``CachePool.new_sequence``. Errors: CacheFull."""
        return self.caches.new_sequence(num_tokens)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Runs one step and returns logits, at least float32, of the rows ``batch.logits_ids``: [R, vocab].

        Extends every sequence's caches by its rows.
        """
        return self.logits_behind(self._extend(batch), batch.logits_ids)

    @torch.inference_mode()
    def read(self, token_ids_T: torch.Tensor, tables: ChunkTables) -> Residual:
        """Runs the backbone on a step with chunks from arrays on the device alone; ``logits_behind`` follows.

        The same kernels as ``forward``, but the token counts of sequences are the caller's to keep. Reads nothing back
        from the device, so it can be captured in a graph. A negative token id marks a padded row, as of ``decode``.
        """
        assert self.paged is not None, "no step with chunks is planned"
        assert self.paged.has_chunks, "no step with chunks is planned"
        return self._backbone(token_ids_T.long(), tables.positions_T, self.paged.prepare_fixed(tables))

    @torch.inference_mode()
    def logits_behind(self, residual: Residual, ids_R: torch.Tensor) -> torch.Tensor:
        """Computes logits, at least float32, of some rows behind the backbone: [R, vocab]."""
        return self.head(residual.rows(ids_R).enter(self.hc_head).h_TD)

    @torch.inference_mode()
    def hidden_behind(self, residual: Residual) -> Hidden:
        """Computes every row's hidden behind the backbone."""
        at = residual.enter(self.hc_head)
        return Hidden(at.x_TSD, at.h_TD)

    @torch.inference_mode()
    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        """Runs a decode step from arrays on the device alone and returns every row's logits [T, vocab].

        The same kernels as ``forward`` of one token for each sequence, but the token counts of sequences are the
        caller's to keep. Reads nothing back from the device, so it can be captured in a graph. A negative token id
        marks a padded row, which goes to no expert.
        """
        assert self.paged is not None, "no decode step is planned"
        step = self.paged.prepare_decode(tables)
        residual = self._backbone(token_ids_T, tables.positions_T, step)
        return self.head(residual.enter(self.hc_head).h_TD)

    @torch.inference_mode()
    def forward_by_data(self, batch: ForwardBatch) -> torch.Tensor:
        """Runs one step of this rank's own requests as ``forward`` does, and returns the logits of all ranks' rows, in
        the order of ranks. Every rank calls it at once."""
        wanted = self._extend(batch).rows(batch.logits_ids)
        return self._shared_head.everywhere(wanted.enter(self.hc_head).h_TD)

    @torch.inference_mode()
    def decode_by_data(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor:
        """Runs a decode step of this rank's own requests as ``decode`` does, and returns the logits of all ranks' rows,
        in the order of ranks. Every rank calls it at once, with as many rows."""
        assert self.paged is not None, "no decode step is planned"
        residual = self._backbone(token_ids_T, tables.positions_T, self.paged.prepare_decode(tables))
        return self._shared_head.everywhere(residual.enter(self.hc_head).h_TD)

    @property
    def _shared_head(self) -> GatheredHead:
        assert isinstance(self.head, GatheredHead), "ranks have no tokens of their own"
        return self.head

    @torch.inference_mode()
    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Verified:
        """Runs a decode step as ``decode`` does, and keeps what the drafts continue from."""
        assert self.paged is not None, "no decode step is planned"
        step = self.paged.prepare_decode(tables)
        at = self._backbone(token_ids_T, tables.positions_T, step).enter(self.hc_head)
        return Verified(self.head(at.h_TD), Hidden(at.x_TSD, at.h_TD), step)

    @torch.inference_mode()
    def guess(self, verified: Verified, next_ids_T: torch.Tensor) -> torch.Tensor:
        """Runs the first draft behind ``verify`` and returns every row's logits [T, vocab]: of the token after
        ``next_ids_T``, int32 [T], which follow each row's own and are negative in padded rows."""
        return self.head(self.drafts[0].decode(verified.hidden, next_ids_T, verified.step).h_TD)

    @torch.inference_mode()
    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]:
        """Runs one step and returns what ``forward`` does, and every row's hidden."""
        residual = self._extend(batch)
        return self.logits_behind(residual, batch.logits_ids), self.hidden_behind(residual)

    @torch.inference_mode()
    def draft_forward(
        self, hidden: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor:
        """Runs the first draft on the rows of a step and returns the logits [R, vocab] of some.

        Shapes: next_ids_T int64 [T], the token that follows each row's; rows_R int64 [R].
        """
        return self.logits(self.drafts[0].hidden(hidden, next_ids_T, batch), rows_R)

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch) -> Hidden:
        """Runs one step, as ``forward`` does, and returns every row's hidden, from which the drafts continue.

        ``logits`` of it equal those of ``forward`` up to the order of sums.
        """
        return self.hidden_behind(self._extend(batch))

    @torch.inference_mode()
    def hidden_and_targets(self, batch: ForwardBatch) -> tuple[Hidden, torch.Tensor]:
        """Runs one step as ``hidden`` does. Returns the hidden, and what DSpark reads of each row: the streams behind
        its target layers, averaged, side by side [T, C]."""
        assert self.dspark is not None, "no DSpark is loaded"
        wanted, means, step = self.dspark.shape.target_layer_ids, [], self.blocks[0].prepare(batch.tables)
        for layer_idx, residual in enumerate(self._residuals(batch.token_ids_T, batch.positions_T, step)):
            if layer_idx in wanted:
                means.append(residual.enter(self.hc_head).x_TSD.mean(1))
        batch.tables.extend()
        at = residual.enter(self.hc_head)
        return Hidden(at.x_TSD, at.h_TD), torch.cat(means, dim=-1)

    @torch.inference_mode()
    def logits(self, hidden: Hidden, ids_R: torch.Tensor) -> torch.Tensor:
        """Computes logits, at least float32, of some rows of a hidden: the backbone's, or a draft's (they share the
        head)."""
        return self.head(hidden.h_TD[ids_R])

    def _extend(self, batch: ForwardBatch) -> Residual:
        """Runs the backbone on a batch and counts its tokens in."""
        residual = self._backbone(batch.token_ids_T, batch.positions_T, self.blocks[0].prepare(batch.tables))
        batch.tables.extend()
        return residual

    def _backbone(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: PreparedStep) -> Residual:
        return deque(self._residuals(token_ids_T, positions_T, step), maxlen=1).pop()

    def _residuals(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: PreparedStep
    ) -> Iterator[Residual]:
        """Runs the backbone, and yields the residual behind each layer."""
        if isinstance(step, DecodeStep):
            sliding, compress = step.rotations
            token_ids_T = token_ids_T.int()  # as a decoder's are: kernels are compiled for one kind of ids
        else:
            sliding, compress = self.sliding_rope.at(positions_T), self.compress_rope.at(positions_T)
        # Each stream begins as the embedding. A padded row, whose id is -1, begins as the last token's.
        ids_TS = token_ids_T[:, None].expand(-1, self.config.hc_mult)
        residual = Residual(self.embed_VD[ids_TS].to(self.cache_spec.dtype))
        for block, ratio in zip(self.blocks, self.config.compress_ratios, strict=True):
            residual = block(residual, compress if ratio else sliding, token_ids_T, step)
            yield residual
