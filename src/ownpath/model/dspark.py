"""DSpark: a drafter that guesses a block of tokens at once, from what some layers of the backbone have said.

Context. At each position, the streams behind the target layers, each averaged over the streams and set side by side,
are projected and normed: m = main_norm(main_proj(...)). Every stage makes a key of m by its own ``wkv``, ``kv_norm``
and rotation, and keeps it in its window. Nothing else of the backbone reaches the drafter.

Block. Behind n positions of context, B rows have the positions n to n + B - 1: the token that the backbone has drawn
for position n, and B - 1 times the noise token. They pass the stages, which are layers of the sliding-window kind but
for what a row sees: the last ``sliding_window`` positions of the context, and all B rows of the block, those behind it
too. A block's keys are not kept.

Head. Row i guesses position n + i + 1: the backbone's head gives its logits, to which the Markov head adds a bias for
the token before, which is the row before's guess. A linear form of the collapsed streams, before their norm, and of the
Markov embedding is the logit of the guess being accepted.

Legend: T rows of a step, R requests, B rows of a block, S streams, D hidden, C target layers * D, M Markov rank, V
vocabulary, K keys of a window.
Source: DSpark (DeepSeek-AI, DeepSpec), as the inference code published with DeepSeek-V4-Flash-0731 has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.attention.rope import Rope
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.dspark import DSparkShape
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.runners import HyperBoundary, HyperOut, HyperWeights, Linear, RMSNorm


class BlockStep:
    """The attention of one block for each request: to the windows' keys and to the block's own.

    Not a dataclass: the tensors of a call are its projections, not these fields.
    """

    def __init__(self, caches: Sequence[SequenceCache], window: int) -> None:
        self.pool: CachePool = caches[0].pool
        ring, device = self.pool.spec.window_rows, self.pool.spec.device
        self.window_rows: list[torch.Tensor] = []
        for cache in caches:
            positions_K = torch.arange(max(0, cache.num_tokens - window), cache.num_tokens, device=device)
            self.window_rows.append(cache.slot * ring + positions_K % ring)

    def write_entries(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes nothing: the layers have no entries."""

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        """Attends from each request's block: [T, N, H]."""
        keys = self.pool.layers[layer.layer_idx].keys
        blocks = zip(rows.q_TNH.chunk(len(self.window_rows)), keys.rounded(rows.kv_TH).chunk(len(self.window_rows)),
                     self.window_rows, strict=True)  # fmt: skip
        found = []
        for q_BNH, own_BH, window_rows_K in blocks:
            keys_KH = torch.cat((keys.read(window_rows_K), own_BH))
            visible_BK = torch.ones(len(own_BH), len(keys_KH), dtype=torch.bool, device=keys_KH.device)
            found.append(layer.softmax(q_BNH, keys_KH, visible_BK))
        return torch.cat(found)

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        """Writes nothing: a block's keys are not kept."""


@dataclass(frozen=True)
class Guesses:
    """A block's guesses for each request.

    Shapes: token_ids_RB int64; logits_RBV at least float32, the Markov head's bias included; confidence_RB at least
    float32, whose sigmoid estimates that a guess is accepted if those before it are.
    """

    token_ids_RB: torch.Tensor
    logits_RBV: torch.Tensor
    confidence_RB: torch.Tensor


def likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """Draws greedily: int64 [R]."""
    return logits_RV.argmax(-1)


@dataclass(frozen=True)
class DSpark:
    """The drafter. main_proj: [D, C]; hc_head: weights of ``leave``, the boundary behind the last stage; markov_w1
    [V, M]; markov_w2: [V, M], at least float32; confidence [1, D + M].

    head: the backbone's, as ``embed_VD`` and rope (the one without YaRN) are. first_layer_idx: the first stage's index
    in the caches.
    """

    shape: DSparkShape
    embed_VD: torch.Tensor
    main_proj: Linear
    main_norm: RMSNorm
    stages: tuple[Block, ...]
    leave: HyperBoundary
    hc_head: HyperWeights
    head: Callable[[torch.Tensor], torch.Tensor]
    markov_w1_VM: torch.Tensor
    markov_w2: Linear
    confidence: torch.Tensor
    rope: Rope
    window: int
    first_layer_idx: int

    @torch.inference_mode()
    def remember(self, targets_TC: torch.Tensor, batch: ForwardBatch) -> None:
        """Keeps the context of a step that the backbone has run. targets_TC: as ``Model.hidden_and_targets`` gives
        them."""
        assert not batch.tables.passed, "no snapshot is taken of a step with DSpark"
        main_TD, rotation = self.main_norm(self.main_proj(targets_TC)), self.rope.at(batch.positions_T)
        for layer_idx, stage in enumerate(self.stages, start=self.first_layer_idx):
            keys = batch.tables.pool.layers[layer_idx].keys
            keys.write(batch.tables.writes.window_T, stage.attn.keys(main_TD, rotation))

    @torch.inference_mode()
    def guess(
        self,
        token_ids_R: torch.Tensor,
        caches: Sequence[SequenceCache],
        draw: Callable[[torch.Tensor], torch.Tensor] = likeliest,
    ) -> Guesses:
        """Guesses what follows ``token_ids_R``, the tokens that the backbone has drawn behind each sequence.

        All tokens that the sequences hold have been remembered. draw: draws a token [R] from logits [R, V].
        """
        left = self._block(token_ids_R, caches)
        at_RBD = self._collapsed(left.x_TSD).unflatten(0, (len(caches), -1))
        logits_RBV = self.head(left.h_TD).unflatten(0, (len(caches), -1))
        drawn, embedded = [token_ids_R], []
        for row in range(self.shape.block_size):
            embedded.append(self.markov_w1_VM[drawn[-1]])
            logits_RBV[:, row] += self.markov_w2(embedded[-1].to(left.h_TD.dtype))
            drawn.append(draw(logits_RBV[:, row]))
        known = torch.cat((at_RBD, torch.stack(embedded, dim=1).to(at_RBD.dtype)), dim=-1)
        confidence_RB = F.linear(known, self.confidence.to(known.dtype)).squeeze(-1)
        return Guesses(torch.stack(drawn[1:], dim=1), logits_RBV, confidence_RB)

    def _block(self, token_ids_R: torch.Tensor, caches: Sequence[SequenceCache]) -> HyperOut:
        """Runs the stages on a block of each request, R * B rows, and leaves them."""
        size, device = self.shape.block_size, token_ids_R.device
        ids_RB = token_ids_R.new_full((len(caches), size), self.shape.noise_token_id)
        ids_RB[:, 0] = token_ids_R
        starts_R = torch.tensor([cache.num_tokens for cache in caches], device=device)
        positions_T = (starts_R[:, None] + torch.arange(size, device=device)).flatten()
        h_TD = self.embed_VD[ids_RB.flatten()].to(caches[0].pool.spec.dtype)
        residual = Residual.of_embedding(h_TD, self.hc_head.fn.shape[0])
        rotation, step = self.rope.at(positions_T), BlockStep(caches, self.window)
        for stage in self.stages:
            residual = stage(residual, rotation, ids_RB.flatten(), step)
        return residual.enter(self.leave)

    def _collapsed(self, x_TSD: torch.Tensor) -> torch.Tensor:
        """Collapses the streams as ``leave`` does, without its norm: [T, D], at least float32."""
        weights = self.hc_head
        flat = x_TSD.flatten(1).to(torch.promote_types(x_TSD.dtype, torch.float32))
        mixed_TS = F.linear(F.rms_norm(flat, flat.shape[-1:], None, weights.mix_norm_eps), weights.fn.to(flat.dtype))
        pre_TS = torch.sigmoid(mixed_TS * weights.scale + weights.base) + weights.eps
        return (pre_TS.unsqueeze(-1) * x_TSD.to(flat.dtype)).sum(1)
