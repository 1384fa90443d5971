"""The first MTP module of drafts beside the reference: what enters its layer, and its logits.

The reference's streams of the backbone enter, with the token that follows each row in the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ownpath.finding import Finding, Verdict
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Hidden
from ownpath.model.model import Model
from ownpath.oracle.block import LayerTrace, reference_head
from ownpath.oracle.forward import reference_draft_entry
from ownpath.verify.layer import in_layer, in_no_layer, load_part
from ownpath.verify.layers.activations import Activations
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.single_layer import MAX_SEQUENCES

KINDS = {
    "enorm": "hc_attn.h",
    "e_proj": "attn.wqa_wkv",
    "hnorm": "hc_attn.h",
    "h_proj": "attn.wqa_wkv",
    "hc_attn.x": "attn.wqa_wkv",
}
"""A value that enters the layer -> the kind of a layer's value that is made alike, by whose budget it is judged."""
_PLACES = {
    "enorm": "enorm's weight, or the token that follows each row",
    "e_proj": "e_proj, or h_proj in its place",
    "hnorm": "hnorm's weight, or the streams that the module is given",
    "h_proj": "h_proj, or e_proj in its place",
    "hc_attn.x": "the sum of both, for each stream",
    "head": "hc_head's collapse, the module's norm, or the head, which is the backbone's",
}
_ROWS = 256
"""Rows whose logits are computed at once."""


@dataclass(frozen=True)
class Module:
    """The module that the engine drafts with, loaded with what it shares with the backbone, beside the reference.

    oracle: of the backbone's text. streams_TSD: the reference's behind the backbone's last layer.
    """

    oracle: Oracle
    streams_TSD: torch.Tensor

    @property
    def layer_idx(self) -> int:
        """Its layer's index: behind the backbone's."""
        return self.oracle.subject.config.num_hidden_layers

    @property
    def name(self) -> str:
        return self.oracle.subject.name_of(self.layer_idx)

    @cached_property
    def following(self) -> Oracle:
        """The oracle of the module's rows: all but the text's last, by the tokens that follow them."""
        return replace(self.oracle, token_ids=self.oracle.token_ids[1:])

    @cached_property
    def entry(self) -> LayerTrace:
        """The reference's values in front of the layer, and the streams that enter it."""
        oracle = self.oracle
        rows_TSD, ids_T = self.streams_TSD[:-1], self.following.token_ids_T
        return reference_draft_entry(oracle.subject.plan, oracle.stored, rows_TSD, ids_T, oracle.arithmetic)

    def load(self) -> Model:
        """Loads the module and the model's ends. Errors: as ``load_weights``."""
        subject = self.oracle.subject
        is_end, is_module = in_no_layer(subject.config), in_layer(self.name)
        part = load_part(subject, lambda name: is_end(name) or is_module(name))
        model = part.builder.without_backbone()
        num_tokens = len(self.oracle.token_ids)
        spec = replace(model.cache_spec, max_tokens=num_tokens, max_sequences=MAX_SEQUENCES)
        return replace(model, cache_spec=replace(spec, layer_ids=frozenset({self.layer_idx})))

    def findings(self, model: Model, out_TSD: torch.Tensor) -> Iterator[Finding | Measurement]:
        """V11: what enters the layer, in a forward of the text, and the logits of the reference's streams behind the
        layer."""
        pairs = dict(self._entering(model))
        ids_T, dtype = self.following.token_ids_T, self.oracle.subject.engine.dtype
        measured = [self._measure(name, pair, KINDS[name]) for name, pair in pairs.items()]
        at = out_TSD[-_ROWS:].to(dtype)
        plan, stored = self.oracle.subject.plan, self.oracle.stored
        wanted = reference_head(plan.config, stored, plan, out_TSD[-_ROWS:], self.oracle.arithmetic, f"{self.name}.")
        found = model.head(model.drafts[0].hc_head(at, None, None).h_TD)
        measured.append(self._measure("head", (found, wanted), "head"))
        yield from measured
        bad = [one for one in measured if not one.is_within]
        words = f"an error of 1 budget over all rows and of {ROW_FACTOR:g} budgets in a single one, and finite values"
        for one in bad[:1]:
            where, message = f"{self.name}.{one.slot}", f"the first beyond its budget: relative error {one.rel_l2:.1e}"
            yield Finding("V11", where, Verdict.FAIL, message, one.excess, words, _PLACES[one.slot])
        if not bad:
            worst = max(measured, key=lambda one: one.excess)
            message = f"{len(measured)} values of {len(ids_T)} rows; nearest to its budget {worst.slot}"
            yield Finding("V11", self.name, Verdict.PASS, message, worst.excess, words)

    def _measure(self, name: str, pair: tuple[torch.Tensor, torch.Tensor], kind: str) -> Measurement:
        return replace(Measurement.of(self.layer_idx, name, pair, self.oracle.budget(kind)), module=self.name)

    def _entering(self, model: Model) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Runs the module on the text. Yields the engine's and the reference's values in front of its layer, in the
        order in which they depend."""
        plan, dtype = self.oracle.subject.plan, self.oracle.subject.engine.dtype
        seen = Activations({one.spec.slot: one.spec for one in plan.decided})
        ids_T, cache = self.following.token_ids_T, model.new_cache()
        batch = ForwardBatch.of([(self.oracle.token_ids[:-1], cache)], ids_T.device)
        with model.ledger.observe(seen):
            before = Hidden(self.streams_TSD[:-1].to(dtype), self.streams_TSD[:-1, 0].to(dtype))
            model.drafts[0].hidden(before, ids_T, batch)
        cache.release()
        wanted = self.entry.values | {f"{self.name}.hc_attn.x": self.entry.streams_TSD}
        for name in KINDS:
            theirs = wanted[f"{self.name}.{name}"]
            yield name, (seen.value(f"{self.name}.{name}").reshape(theirs.shape), theirs)
