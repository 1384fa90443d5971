"""Holds what vLLM's modules gave against the reference of each, module by module and step by step.

The budget of a value is measured where it is used: four times the distance between the reference computed wide and the
same rounded as an engine of that dtype rounds, from the same inputs; never less than one rounding (``verify.budgets``
has the reasons). So it knows the layer's own weights, widths and rows, and nothing of what came before. Rows that are
too few to tell it are judged by what all rows of the value tell (``noise``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ownpath.checkpoint.drafts import carried_draft
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import Encoding
from ownpath.config import CSA_RATIO, Layer, ModelConfig
from ownpath.formats import CacheFormat
from ownpath.integrations.vllm.proof.noise import Noise, total
from ownpath.integrations.vllm.proof.reference import (
    ORDER,
    SequencePart,
    chosen_entries,
    found_ends,
    found_values,
    reference_ends,
    reference_logits,
    reference_values,
)
from ownpath.integrations.vllm.proof.rounded_inputs import ROUNDINGS, rounded_values
from ownpath.integrations.vllm.proof.seen import StepRun
from ownpath.integrations.vllm.proof.shares import WHOLE, LayerShare, whole_values
from ownpath.integrations.vllm.proof.taps import Kept
from ownpath.oracle.arithmetic import Arithmetic, OracleRun
from ownpath.oracle.formulas import expert_scores
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.census import take_census
from ownpath.verify.layers.choices import expert_candidates, judge, mask_of
from ownpath.verify.layers.measure import Measurement


@dataclass(frozen=True)
class Proof:
    """The model's files and the dtype that vLLM runs it in. cache_format: of its keys."""

    config: ModelConfig
    stored: StoredWeights
    encodings: Mapping[str, Encoding]
    dtype: torch.dtype
    cache_format: CacheFormat

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype, cache_format: CacheFormat, device: str = "cpu") -> "Proof":
        """Opens a checkpoint. device: on which the reference is computed. Errors: ConfigError, CheckpointError."""
        index, config = CheckpointIndex.open(folder), ModelConfig.from_file(folder / "config.json")
        census = take_census(config, index, carried_draft(index))
        encodings = {module.spec.name: module.encoding for module in census.modules}
        wide = torch.float64 if dtype.itemsize >= 4 else torch.float32
        return cls(config, StoredWeights(index, torch.device(device), wide), encodings, dtype, cache_format)

    def run(self, *, is_narrow: bool) -> OracleRun:
        """Starts a forward of the reference, wide or rounded as the engine rounds."""
        arithmetic = Arithmetic(self.stored.dtype, self.dtype if is_narrow else None, cache_format=self.cache_format)
        return OracleRun(self.config, self.stored, self.encodings, arithmetic)

    def moved(self, kept: Kept) -> Kept:
        """Returns values on the reference's device."""
        return {name: value.to(self.stored.device) for name, value in kept.items()}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self.config.backbone_layers())


@dataclass(frozen=True)
class Compared:
    """One value of one step."""

    step: StepRun
    measured: Measurement


@dataclass(frozen=True)
class RankSteps:
    """The steps of a run, as one rank saw them. share: of a layer. kernels: value of it -> what ran there."""

    steps: Sequence[StepRun]
    kernels: Mapping[str, str]
    share: LayerShare = WHOLE


def compare_layer(proof: Proof, layer_idx: int, ranks: Sequence[RankSteps]) -> list[Compared]:
    """Compares every tapped value of a layer in every step that is judged, rank by rank; returns them in the order in
    which they are made.

    All steps' rows go through the reference together. A value that only some steps have is compared in those alone.
    Errors: CheckpointError naming a tensor that cannot be read; ValueError for rows of nobody.
    """
    tapped: list[list[tuple[StepRun, Kept]]] = [[] for _ in ranks]
    for step in zip(*(rank.steps for rank in ranks), strict=True):
        whole = whole_values(proof.config, [seen.layer(layer_idx) for seen in step])
        for own, seen, values in zip(tapped, step, whole, strict=True):
            own.append((seen, values))
    found = [one for rank, own in zip(ranks, tapped, strict=True) for one in _compare_rank(proof, layer_idx, rank, own)]
    place = {name: idx for idx, name in enumerate(ORDER)}
    return sorted(found, key=lambda compared: place[compared.measured.slot])


def _compare_rank(
    proof: Proof, layer_idx: int, rank: RankSteps, tapped: Sequence[tuple[StepRun, Kept]]
) -> list[Compared]:
    common = set(tapped[0][1]).intersection(*(values for _, values in tapped[1:]))
    comparison = _LayerProof(proof, layer_idx, rank)
    found = comparison.run(tapped, common, segments_of(rank.steps))
    groups: dict[tuple[str, ...], list[tuple[StepRun, Kept]]] = {}
    for step, values in tapped:
        if step.is_judged and values.keys() - common:
            groups.setdefault(tuple(sorted(values)), []).append((step, values))
    done = {(id(compared.step), compared.measured.slot) for compared in found}
    for names, group in groups.items():
        found += [one for one in comparison.run(group, set(names)) if (id(one.step), one.measured.slot) not in done]
    return found


@dataclass(frozen=True)
class _StepValue:
    """A value of one step, and its references by label, each wide and rounded: rows whose references are all finite.

    What gets NaN cannot be blamed for it.
    """

    step: StepRun
    name: str
    engine: Tensor
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls, step: StepRun, name: str, engine: Tensor, pairs: Mapping[str, tuple[Tensor, Tensor]]
    ) -> "_StepValue | None":
        """``None``: there is no such row."""
        kept_T = torch.stack([wide.isfinite().flatten(1).all(1) for wide, _ in pairs.values()]).all(0)
        if not kept_T.any():
            return None
        if kept_T.all():
            return cls(step, name, engine, pairs)
        return cls(step, name, engine[kept_T], {label: (w[kept_T], n[kept_T]) for label, (w, n) in pairs.items()})

    @cached_property
    def noises(self) -> dict[str, Noise]:
        """Reference -> what rounding moves in these rows."""
        return {label: Noise.of(narrow, wide) for label, (wide, narrow) in self.pairs.items()}


@dataclass(frozen=True)
class _LayerProof:
    proof: Proof
    layer_idx: int
    rank: RankSteps

    def run(
        self, tapped: Sequence[tuple[StepRun, Kept]], names: set[str], segments: Sequence[SequencePart] | None = None
    ) -> list[Compared]:
        """Compares the values that need ``names`` alone, which every step has. segments: of all steps there are;
        ``None`` where some are left out, so that nobody knows all keys of a sequence."""
        proof, layer, share = self.proof, self.proof.layers[self.layer_idx], self.rank.share
        values = proof.moved({name: torch.cat([kept[name] for _, kept in tapped]) for name in names})
        engine = found_values(layer, proof.run(is_narrow=False), values)
        references = {"": self._pair(lambda run: reference_values(layer, run, values, segments, share))}
        for label, is_power_of_two in ROUNDINGS.items():
            references[label] = self._pair(partial(_rounded, layer, values, share, is_power_of_two))
        cases, first = list[_StepValue | None](), 0
        for step, _ in tapped:
            rows = slice(first, first + step.num_rows)
            first = rows.stop
            for name in engine.keys() & references[""][0].keys():
                cut = partial(_own_rows, share, name, engine[name].shape, rows)
                pairs = {
                    label: (cut(wide[name]), cut(narrow[name]))
                    for label, (wide, narrow) in references.items()
                    if name in wide
                }
                cases.append(_StepValue.of(step, name, cut(engine[name]), pairs))
        return self.judge([case for case in cases if case is not None])

    def _pair(self, compute: Callable[[OracleRun], Kept]) -> tuple[Kept, Kept]:
        """Computes wide, and rounded as the engine rounds."""
        return compute(self.proof.run(is_narrow=False)), compute(self.proof.run(is_narrow=True))

    def judge(self, cases: Sequence[_StepValue]) -> list[Compared]:
        """Compares each value of a judged step with the nearest of its references."""
        noises: dict[tuple[str, str], list[Noise]] = {}
        for case in cases:
            for label, noise in case.noises.items():
                noises.setdefault((case.name, label), []).append(noise)
        every = {key: total(parts) for key, parts in noises.items()}
        found = []
        for case in cases:
            if case.step.is_judged:
                measured = [self._measure(case, label, every[case.name, label]) for label in case.pairs]
                found.append(Compared(case.step, min(measured, key=lambda one: one.excess)))
        return found

    def _measure(self, case: _StepValue, label: str, every: Noise) -> Measurement:
        """every: the noise of all rows of the value."""
        budget = case.noises[label].budget(every, self.proof.dtype)
        kernel = ", ".join(filter(None, (self.rank.kernels.get(case.name, ""), label)))
        return Measurement.of(self.layer_idx, case.name, (case.engine, case.pairs[label][0]), budget, kernel)


def _own_rows(share: LayerShare, name: str, shape: torch.Size, rows: slice, value: Tensor) -> Tensor:
    """Returns a rank's part of a value in one step's rows."""
    return share.cut(name, value.reshape(shape)[rows])


def _rounded(layer: Layer, values: Kept, share: LayerShare, is_power_of_two: bool, run: OracleRun) -> Kept:
    return rounded_values(layer, run, values, share, is_power_of_two)


def segments_of(steps: Sequence[StepRun]) -> list[SequencePart]:
    """Finds each sequence's rows, in the order of their positions, among the rows of all steps."""
    history: dict[str, list[int]] = {}
    found, first = [], 0
    for step in steps:
        for part in step.parts:
            rows = list(range(first + part.first_row, first + part.first_row + part.count))
            own = history.setdefault(part.sequence, [])
            assert len(own) == part.start, (part, len(own))
            own += rows
            found.append(SequencePart(torch.tensor(rows), torch.tensor(own)))
        first += step.num_rows
    return found


def compare_ends(proof: Proof, ranks: Sequence[RankSteps]) -> list[Compared]:
    """Compares the embedding, the last boundary with its norm, and the logits, step by step: of each rank its rows of
    the vocabulary. Errors: CheckpointError."""
    comparisons = [_LayerProof(proof, proof.config.num_hidden_layers - 1, rank) for rank in ranks]
    steps = [step for step in zip(*(rank.steps for rank in ranks), strict=True) if step[0].is_judged]
    judged = [(step, [proof.moved(seen.ends()) for seen in step]) for step in steps]
    logits = _logits(proof, [ends["head.in"] for _, all_ends in judged for ends in all_ends if "head.in" in ends])
    cases: list[list[_StepValue | None]] = [[] for _ in ranks]
    for step, all_ends in judged:
        tapped = next(({"head": ends["head"]} for ends in all_ends if "head" in ends), {})  # maybe of one rank alone
        for comparison, own_cases, seen, own in zip(comparisons, cases, step, all_ends, strict=True):
            ends, last = own | tapped, proof.moved(seen.layer(comparison.layer_idx))
            engine = found_ends(ends)
            wide, narrow = (reference_ends(proof.run(is_narrow=is_narrow), ends, last) for is_narrow in (False, True))
            pairs = {name: (wide[name], narrow[name]) for name in wide}
            if "head.in" in ends:
                pairs["head"] = next(logits)
            for name in engine.keys() & pairs.keys():
                cut = partial(_own_vocabulary, proof, comparison.rank.share, name, ends)
                pair = cut(pairs[name][0]), cut(pairs[name][1])
                own_cases.append(_StepValue.of(seen, name, cut(engine[name]), {"": pair}))
    return [
        one
        for comparison, own_cases in zip(comparisons, cases, strict=True)
        for one in comparison.judge([case for case in own_cases if case is not None])
    ]


def _logits(proof: Proof, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the logits of each step's rows on each rank, wide and rounded."""
    if inputs:
        wide, narrow = (reference_logits(proof.run(is_narrow=is_narrow), inputs) for is_narrow in (False, True))
        yield from zip(wide, narrow, strict=True)


def _own_vocabulary(proof: Proof, share: LayerShare, name: str, ends: Kept, value: Tensor) -> Tensor:
    """Returns the part of a value that comes from this rank's rows of the vocabulary; NaN in the rows of others."""
    own = share.vocabulary(proof.config.vocab_size)
    if share.is_whole or name not in ("embed", "head"):
        return value
    if name == "head":
        return value[:, own]
    ids_T = ends["token_ids"]
    return torch.where(((ids_T >= own.start) & (ids_T < own.stop))[:, None], value, torch.nan)


def count_wrong_choices(proof: Proof, layer_idx: int, step: StepRun) -> Mapping[str, int]:
    """Counts the rows whose experts, or compressed entries, are not those that the engine's own scores say.

    Experts: by the logits that the engine's router got; near ties within their float32 rounding are either's. Entries:
    all complete ones where ``index_topk`` holds them; else only their number, and that all are complete.
    """
    values, layer = proof.moved(step.layer(layer_idx)), proof.layers[layer_idx]
    config, counts = proof.config, dict[str, int]()
    if "ffn.gate" in values and "ffn.router.ids" in values:
        chosen_TE = mask_of(values["ffn.router.ids"], config.n_routed_experts)
        if layer.is_hash:
            ids_TK = proof.stored.rows(f"{layer.name}.ffn.gate.tid2eid", values["token_ids"].long())
            wrong_T = (chosen_TE != mask_of(ids_TK, config.n_routed_experts)).any(1)
        else:
            logits, bias_E = values["ffn.gate"].double(), proof.stored.param(f"{layer.name}.ffn.gate.bias").double()
            scores_TE = expert_scores(logits) + bias_E
            wrong_T = judge(chosen_TE, expert_candidates(scores_TE, logits, bias_E, config.num_experts_per_tok)).wrong_T
        counts["experts"] = int((wrong_T & values["ffn.gate"].isfinite().all(1)).sum())
    if layer.ratio == CSA_RATIO and "attn.entry_ids" in values:
        complete_T = (values["positions"] + 1) // CSA_RATIO
        num_entries = max(int(complete_T.max()), 1)
        ids_TK = values["attn.entry_ids"]
        chosen_TC = chosen_entries(ids_TK, num_entries)
        allowed_TC = torch.arange(num_entries, device=ids_TK.device) < complete_T[:, None]
        wrong_T = (chosen_TC & ~allowed_TC).any(1) | (chosen_TC.sum(1) != complete_T.clamp(max=config.index_topk))
        counts["compressed entries"] = int(wrong_T.sum())
    return counts
