"""Multi-token prediction (MTP): one more layer guesses the token after the next one.

Row p of a step has the backbone's residual streams of position p, and the token at position p + 1, which the backbone's
logits predict. Both are normed and projected, and their sum enters a layer of the sliding-window kind:

    x[s] = e_proj(enorm(embed(next token))) + h_proj(hnorm(streams[s]))     for each stream s

Embedding and head are the backbone's; the collapse of the streams and the norm before the head are the module's own.
The layer has a window of its own in each sequence's cache: every step of a sequence passes through it, in order. A
further module continues from the hidden of the one before it, and from the token after that one's.

Legend: T tokens of the step, S streams, D hidden, V vocabulary.
Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2, as DeepSeek-V4's published inference code has it.
"""

from dataclasses import dataclass

import torch

from ownpath.attention.interface import DecodeStep, PreparedStep
from ownpath.attention.rope import Rope, Rotation
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Hidden, Residual
from ownpath.runners import HyperBoundary, Linear, Mix, RMSNorm


@dataclass(frozen=True)
class Mtp:
    """One module. e_proj, h_proj: [D, D]. embed_VD and rope (the one without YaRN) are the backbone's.

    adding: the mix by which the first boundary adds the token's part to every stream, of as many rows as decode steps
    have: ones, and identities.
    """

    embed_VD: torch.Tensor
    enorm: RMSNorm
    hnorm: RMSNorm
    e_proj: Linear
    h_proj: Linear
    block: Block
    hc_head: HyperBoundary
    rope: Rope
    adding: Mix

    @torch.inference_mode()
    def hidden(self, before: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch) -> Hidden:
        """Computes the hidden of every row; ``Model.logits`` of it predict the token after ``next_ids_T``.

        before: the hidden of the same step, of the backbone or of the module before this one.
        Shapes: next_ids_T int64 [T], the token that follows each row's.
        """
        assert len(next_ids_T) == len(before.streams_TSD) == len(batch.token_ids_T)
        return self._hidden(before, next_ids_T, self.rope.at(batch.positions_T), self.block.prepare(batch.tables))

    @torch.inference_mode()
    def decode(self, before: Hidden, next_ids_T: torch.Tensor, step: DecodeStep) -> Hidden:
        """Computes the hidden of every row of a decode step that the backbone has run, from arrays on the device alone.
        A negative token marks a padded row, as of ``Model.decode``.

        Shapes: next_ids_T int32 [T].
        """
        return self._hidden(before, next_ids_T, step.rotations[0], step)

    def _hidden(self, before: Hidden, next_ids_T: torch.Tensor, rotation: Rotation, step: PreparedStep) -> Hidden:
        streams_TSD = before.streams_TSD
        e_TD = self.e_proj(self.enorm(self.embed_VD[next_ids_T].to(streams_TSD.dtype)))
        h_TSD = self.h_proj(self.hnorm(streams_TSD).flatten(0, 1)).unflatten(0, streams_TSD.shape[:2])
        residual = self.block(Residual(h_TSD, e_TD, self._adding(len(e_TD))), rotation, next_ids_T, step)
        at = residual.enter(self.hc_head)
        return Hidden(at.x_TSD, at.h_TD)

    def _adding(self, count: int) -> Mix:
        post_TS, comb_TSS = self.adding
        if count <= len(post_TS):
            return Mix(post_TS[:count], comb_TSS[:count])
        return Mix(post_TS[:1].expand(count, -1).contiguous(), comb_TSS[:1].expand(count, -1, -1).contiguous())
