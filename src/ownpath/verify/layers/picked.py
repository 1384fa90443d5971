"""What a run of one layer picked, experts and compressed entries, and the reference's scores that judge it."""

from dataclasses import dataclass

import torch

from ownpath.config import CSA_RATIO, Layer, ModelConfig
from ownpath.oracle.block import Trace
from ownpath.verify.layers.choices import Candidates, Judged, entry_candidates, expert_candidates, judge, mask_of
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.record import Record


@dataclass(frozen=True)
class Picked:
    """A run's choices and their verdicts: entries bool [T, C], ``None`` where none are chosen; experts bool [T, E]."""

    entries_TC: torch.Tensor | None
    experts_TE: torch.Tensor
    entries: Judged | None
    experts: Judged

    @property
    def num_experts(self) -> int:
        return self.experts_TE.shape[1]

    @property
    def differs(self) -> bool:
        """Whether any row picked something else than the reference."""
        return self.experts.num_differing > 0 or (self.entries is not None and self.entries.num_differing > 0)

    @property
    def wrong_T(self) -> torch.Tensor:
        """Rows that picked what no near tie excuses. A row with other entries has other router scores: not judged."""
        if self.entries is None:
            return self.experts.wrong_T
        return self.entries.wrong_T | (self.experts.wrong_T & ~self.entries.differs_T)

    def agrees(self, other: "Picked") -> torch.Tensor:
        """Rows in which both chose the same: bool [T] of the shorter."""
        num_rows = min(len(self.experts_TE), len(other.experts_TE))
        agree_T = (self.experts_TE[:num_rows] == other.experts_TE[:num_rows]).all(1)
        if self.entries_TC is None or other.entries_TC is None:
            return agree_T
        num_entries = min(self.entries_TC.shape[1], other.entries_TC.shape[1])
        mine, others = (mask[:num_rows, :num_entries] for mask in (self.entries_TC, other.entries_TC))
        return agree_T & (mine == others).all(1)


@dataclass(frozen=True)
class Scores:
    """The reference's scores of one layer: what a run's choices are judged by.

    index_scores_TC: of CSA layers. expert_scores_TE and the bias_E in them; or hash_ids_TK, for experts looked up by
    token id.
    """

    config: ModelConfig
    layer: Layer
    index_scores_TC: torch.Tensor | None
    expert_scores_TE: torch.Tensor
    bias_E: torch.Tensor | None
    hash_ids_TK: torch.Tensor | None

    def judged(self, record: Record, keys_CH: torch.Tensor | None) -> Picked:
        """A run's choices, of a sequence's first rows. keys_CH: index keys that its cache then held."""
        name = self.layer.name
        engine_logits_TE = record.value(f"{name}.ffn.gate")
        experts_TE = mask_of(record.value(f"{name}.ffn.router.ids"), self.config.n_routed_experts)
        experts = judge(experts_TE, self._experts(engine_logits_TE))
        if self.index_scores_TC is None or keys_CH is None or not len(keys_CH):
            return Picked(None, experts_TE, None, experts)
        entries_TC = record.index_mask(self.layer.ratio, len(keys_CH))
        return Picked(entries_TC, experts_TE, judge(entries_TC, self._entries(record, keys_CH)), experts)

    def _experts(self, engine_logits_TE: torch.Tensor) -> Candidates:
        num_rows, num_chosen = len(engine_logits_TE), self.config.num_experts_per_tok
        scores_TE = self.expert_scores_TE[:num_rows]
        if self.hash_ids_TK is None:
            assert self.bias_E is not None
            return expert_candidates(scores_TE, engine_logits_TE, self.bias_E, num_chosen)
        named_TE = mask_of(self.hash_ids_TK[:num_rows], self.config.n_routed_experts)
        zeros_TE = torch.zeros_like(scores_TE, dtype=torch.float64)
        return Candidates(zeros_TE, zeros_TE, named_TE, named_TE.sum(1), zeros_TE[:, 0])

    def _entries(self, record: Record, keys_CH: torch.Tensor) -> Candidates:
        assert self.index_scores_TC is not None
        indexer = f"{self.layer.name}.attn.indexer"
        operands = record.value(f"{indexer}.q"), record.value(f"{indexer}.weights"), keys_CH
        scores_TC = self.index_scores_TC[: len(operands[0]), : len(keys_CH)]
        return entry_candidates(scores_TC, operands, self.layer.ratio, self.config.index_topk)


def scores_of(oracle: Oracle, layer: Layer, trace: Trace) -> Scores:
    """The reference's scores of a layer."""
    stored, ffn = oracle.stored, f"{layer.name}.ffn"
    return Scores(
        config=oracle.subject.config,
        layer=layer,
        index_scores_TC=tensor_of(trace, f"{layer.name}.attn.indexer.scores") if layer.ratio == CSA_RATIO else None,
        expert_scores_TE=tensor_of(trace, f"{ffn}.router.scores"),
        bias_E=None if layer.is_hash else stored.param(f"{ffn}.gate.bias"),
        hash_ids_TK=stored.rows(f"{ffn}.gate.tid2eid", oracle.token_ids_T) if layer.is_hash else None,
    )


def tensor_of(trace: Trace, name: str) -> torch.Tensor:
    """One of the reference's values."""
    value = trace.values[name]
    assert isinstance(value, torch.Tensor), name
    return value
