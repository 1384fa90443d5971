"""Judges the experts and the compressed entries that a run of one layer chose, by the reference's scores.

At a near tie either choice is right. An engine that picks the best of its own scores s' = s + d picks, in the
reference's s, nothing that falls behind what it leaves out by more than 2 max|d| of that row: whatever it chose has s'
>= that of what it left. So each row is compared with the distance of its own scores, which have a budget themselves.

Legend: T tokens, K experts per token, E experts, C compressed entries, N candidates of either kind.
"""

from dataclasses import dataclass

import torch

from ownpath.config import CSA_RATIO, Layer, ModelConfig
from ownpath.oracle.block import LayerTrace
from ownpath.oracle.formulas import expert_scores, index_scores
from ownpath.verify.layers.activations import Activations
from ownpath.verify.layers.oracle import Oracle


@dataclass(frozen=True)
class Candidates:
    """Candidates per row: the ``count_T`` best by score are chosen among those in ``allowed_TN`` (bool).

    scores, engine_scores: of the reference and of the engine [T, N]. size_T: the sum of a score's terms in magnitude;
    the engine sums them in float32.
    """

    scores_TN: torch.Tensor
    engine_scores_TN: torch.Tensor
    allowed_TN: torch.Tensor
    count_T: torch.Tensor
    size_T: torch.Tensor

    def best(self) -> torch.Tensor:
        """Returns the reference's choice, bool [T, N]; of equal scores the lowest index."""
        scores_TN = self.scores_TN.masked_fill(~self.allowed_TN, -torch.inf)
        order_TN = scores_TN.sort(dim=1, descending=True, stable=True).indices
        is_taken_TN = torch.arange(scores_TN.shape[1], device=scores_TN.device) < self.count_T[:, None]
        return torch.zeros_like(self.allowed_TN).scatter_(1, order_TN, is_taken_TN)

    def slack(self) -> torch.Tensor:
        """Returns how far the engine's choice may fall behind [T]: twice its scores' distance, and its sums'
        rounding."""
        gap_TN = (self.engine_scores_TN - self.scores_TN).abs().masked_fill(~self.allowed_TN, 0.0)
        return 2 * (gap_TN.amax(1) + 16 * torch.finfo(torch.float32).eps * self.size_T)


@dataclass(frozen=True)
class Judgement:
    """differs_T: rows that chose something else than the reference. wrong_T: those that no near tie excuses.

    behind: by how much the worst choice falls behind what it left out, in the scores' unit, beyond the slack.
    """

    differs_T: torch.Tensor
    wrong_T: torch.Tensor
    behind: float

    @property
    def num_differing(self) -> int:
        return int(self.differs_T.sum())

    @property
    def num_wrong(self) -> int:
        return int(self.wrong_T.sum())


def expert_candidates(
    scores_TE: torch.Tensor, engine_logits_TE: torch.Tensor, bias_E: torch.Tensor, num_chosen: int
) -> Candidates:
    """Makes the candidates of routing by score: sqrt(softplus(logits)) + bias ranks the experts."""
    engine_TE = expert_scores(engine_logits_TE.double()) + bias_E.double()
    allowed_TE = torch.ones_like(engine_TE, dtype=torch.bool)
    count_T = torch.full((len(engine_TE),), num_chosen, device=engine_TE.device)
    return Candidates(scores_TE.double(), engine_TE, allowed_TE, count_T, engine_TE.abs().amax(1))


def entry_candidates(
    scores_TC: torch.Tensor, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ratio: int, topk: int
) -> Candidates:
    """Makes the indexer's candidates: row t of a sequence may choose among the first (t + 1) // ratio entries.

    operands: the engine's index queries [T, I, H], head weights [T, I] and index keys [C, H].
    """
    q_TIH, weights_TI, keys_CH = operands
    num_tokens, num_entries = scores_TC.shape
    complete_T = (torch.arange(num_tokens, device=scores_TC.device) + 1) // ratio
    allowed_TC = torch.arange(num_entries, device=scores_TC.device) < complete_T[:, None]
    engine_TC = index_scores(q_TIH.double(), keys_CH.double(), weights_TI.double())
    size_T = index_scores(q_TIH.double(), keys_CH.double(), weights_TI.double().abs()).amax(1)
    scores_TC = scores_TC.double().masked_fill(~allowed_TC, 0.0)
    return Candidates(scores_TC, engine_TC, allowed_TC, complete_T.clamp(max=topk), size_T)


def mask_of(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Converts expert ids to a mask bool [T, E]; an id that does not exist counts as no choice."""
    ids_TK = ids_TK.long()
    exists_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    mask_TE = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return mask_TE.scatter_(1, torch.where(exists_TK, ids_TK, num_experts), True)[:, :num_experts]


def judge(chosen_TN: torch.Tensor, candidates: Candidates) -> Judgement:
    """Compares a choice, bool [T, N], with the reference's and, where they differ, with the reference's scores.

    A row that chose what is not allowed, or another number, is wrong whatever the scores.
    """
    allowed_TN, scores_TN = candidates.allowed_TN, candidates.scores_TN
    differs_T = (chosen_TN != candidates.best()).any(1)
    lowest_T = scores_TN.masked_fill(~chosen_TN, torch.inf).amin(1)
    left_T = scores_TN.masked_fill(chosen_TN | ~allowed_TN, -torch.inf).amax(1)
    behind_T = left_T - lowest_T - candidates.slack()
    is_forbidden_T = (chosen_TN & ~allowed_TN).any(1) | (chosen_TN.sum(1) != candidates.count_T)
    wrong_T = differs_T & (is_forbidden_T | ~(behind_T <= 0))
    behind = torch.nan_to_num(behind_T[wrong_T & ~is_forbidden_T], nan=torch.inf)
    return Judgement(differs_T, wrong_T, float(behind.max()) if len(behind) else 0.0)


@dataclass(frozen=True)
class RunChoices:
    """The judged choices of a run: entries bool [T, C], ``None`` where none are chosen; experts bool [T, E]."""

    entries_TC: torch.Tensor | None
    experts_TE: torch.Tensor
    entries: Judgement | None
    experts: Judgement

    @property
    def num_experts(self) -> int:
        return self.experts_TE.shape[1]

    @property
    def differs(self) -> bool:
        """True if any row chose something else than the reference."""
        return self.experts.num_differing > 0 or (self.entries is not None and self.entries.num_differing > 0)

    @property
    def wrong_T(self) -> torch.Tensor:
        """Rows with a choice that no near tie excuses. A row with other entries has other router scores: not judged."""
        if self.entries is None:
            return self.experts.wrong_T
        return self.entries.wrong_T | (self.experts.wrong_T & ~self.entries.differs_T)

    def agrees(self, other: "RunChoices") -> torch.Tensor:
        """Returns the rows in which both chose the same: bool [T] of the shorter."""
        num_rows = min(len(self.experts_TE), len(other.experts_TE))
        agree_T = (self.experts_TE[:num_rows] == other.experts_TE[:num_rows]).all(1)
        if self.entries_TC is None or other.entries_TC is None:
            return agree_T
        num_entries = min(self.entries_TC.shape[1], other.entries_TC.shape[1])
        mine, others = (mask[:num_rows, :num_entries] for mask in (self.entries_TC, other.entries_TC))
        return agree_T & (mine == others).all(1)


@dataclass(frozen=True)
class Scores:
    """The reference's scores of one layer, by which a run's choices are judged.

    index_scores_TC: of CSA layers. expert_scores_TE and the bias_E in them; or hash_ids_TK, for experts looked up by
    token id.
    """

    config: ModelConfig
    layer: Layer
    index_scores_TC: torch.Tensor | None
    expert_scores_TE: torch.Tensor
    bias_E: torch.Tensor | None
    hash_ids_TK: torch.Tensor | None

    def judge(self, run: Activations, keys_CH: torch.Tensor | None) -> RunChoices:
        """Judges a run's choices for a sequence's first rows. keys_CH: the index keys that its cache held."""
        name = self.layer.name
        engine_logits_TE = run.value(f"{name}.ffn.gate")
        experts_TE = mask_of(run.value(f"{name}.ffn.router.ids"), self.config.n_routed_experts)
        experts = judge(experts_TE, self._experts(engine_logits_TE))
        if self.index_scores_TC is None or keys_CH is None or not len(keys_CH):
            return RunChoices(None, experts_TE, None, experts)
        entries_TC = run.index_mask(f"{name}.attn", len(keys_CH))
        return RunChoices(entries_TC, experts_TE, judge(entries_TC, self._entries(run, keys_CH)), experts)

    def _experts(self, engine_logits_TE: torch.Tensor) -> Candidates:
        num_rows, num_chosen = len(engine_logits_TE), self.config.num_experts_per_tok
        scores_TE = self.expert_scores_TE[:num_rows]
        if self.hash_ids_TK is None:
            assert self.bias_E is not None
            return expert_candidates(scores_TE, engine_logits_TE, self.bias_E, num_chosen)
        named_TE = mask_of(self.hash_ids_TK[:num_rows], self.config.n_routed_experts)
        zeros_TE = torch.zeros_like(scores_TE, dtype=torch.float64)
        return Candidates(zeros_TE, zeros_TE, named_TE, named_TE.sum(1), zeros_TE[:, 0])

    def _entries(self, run: Activations, keys_CH: torch.Tensor) -> Candidates:
        assert self.index_scores_TC is not None
        indexer = f"{self.layer.name}.attn.indexer"
        operands = run.value(f"{indexer}.q"), run.value(f"{indexer}.weights"), keys_CH
        scores_TC = self.index_scores_TC[: len(operands[0]), : len(keys_CH)]
        return entry_candidates(scores_TC, operands, self.layer.ratio, self.config.index_topk)


def scores_of(oracle: Oracle, layer: Layer, trace: LayerTrace) -> Scores:
    """Returns the reference's scores of a layer."""
    stored, ffn = oracle.stored, f"{layer.name}.ffn"
    return Scores(
        config=oracle.subject.config,
        layer=layer,
        index_scores_TC=trace.values[f"{layer.name}.attn.indexer.scores"] if layer.ratio == CSA_RATIO else None,
        expert_scores_TE=trace.values[f"{ffn}.router.scores"],
        bias_E=None if layer.is_hash else stored.param(f"{ffn}.gate.bias"),
        hash_ids_TK=stored.rows(f"{ffn}.gate.tid2eid", oracle.token_ids_T) if layer.is_hash else None,
    )
