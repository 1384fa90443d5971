"""The layers stage: compares every chosen layer of the engine with the reference, in one pass over the checkpoint.

A layer is loaded, compared on the reference's streams, run in other batches, run on the engine's own streams, and freed
before the next is loaded. Only streams are carried from layer to layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ownpath.finding import Finding, Verdict
from ownpath.model.block import Residual
from ownpath.official import Step
from ownpath.verify.layer import load_layer
from ownpath.verify.layers import end_to_end
from ownpath.verify.layers.batching import Batching
from ownpath.verify.layers.drafting import check_drafting
from ownpath.verify.layers.measure import Measurement, dtype_name
from ownpath.verify.layers.module import Module
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.single_layer import SequenceRows, SingleLayer
from ownpath.verify.layers.state import State, key_of, restore, save
from ownpath.verify.layers.teacher_forcing import LayerComparison, compare_layer
from ownpath.verify.layers.text import SampleText, text_of
from ownpath.verify.layers.verdicts import check_growth, verdicts
from ownpath.verify.progress import StageProgress
from ownpath.verify.resume import SavedState
from ownpath.verify.subject import Subject

E4M3_ROUNDING = 2**-4 * (1 + 2**-10)
"""Three bits of mantissa: half a step is at most 2^-4 of a value; what is subnormal under its block's scale is off by
less than 2^-17 of the block's largest, which the last factor has room for."""


StageItem = Finding | Measurement


def layer_stage(
    subject: Subject, progress: StageProgress | None = None, work: Path | None = None
) -> Iterator[StageItem]:
    """Runs V01 to V12 on the chosen layers, in their order; yields each layer's measurements before its findings.

    progress: called with (layers done, layers, the next one). work: a folder for the state behind each layer, where a
    later call with the same checkpoint, plan, selection and text continues.
    Memory: one layer of the engine and one expert of the reference at a time, beside a text's streams.
    """
    yield from _Stage(subject, text_of(subject), progress or (lambda done, total, name: None)).run(work)


@dataclass(frozen=True)
class _Stage:
    subject: Subject
    text: SampleText
    progress: StageProgress

    def run(self, work: Path | None) -> Iterator[StageItem]:
        oracle = Oracle.of(self.subject, self.text.token_ids)
        layer_ids = self.subject.layer_ids
        total = max(layer_ids, default=-1) + 1
        if self.subject.module_ids:  # which go on from the backbone's last streams
            total = self.subject.config.num_hidden_layers
        key = key_of(self.subject, self.text)
        try:
            state = self._restore(work, key, total) or _begin(oracle)
        except Exception as error:  # whatever an oracle cannot read: there is nothing to compare with
            yield _stage_failure("embed", error)
            return
        yield from state.measurements
        yield from state.findings
        for layer_idx in range(state.num_done, total):
            self.progress(layer_idx, total, self._progress_text(layer_idx))
            before = len(state.measurements), len(state.findings)
            try:
                state = _next(oracle, state, layer_idx, is_chosen=layer_idx in layer_ids)
            except Exception as error:
                yield _stage_failure(f"layers.{layer_idx}", error)
                return
            if work is not None:
                save(work, key, state)
            yield from state.measurements[before[0] :]
            yield from state.findings[before[1] :]
        self.progress(total, total, "the head and the whole model")
        yield check_growth(state.measurements)
        yield from _end(oracle, state)
        if not self.subject.module_ids:
            yield from _no_module(self.subject)
        for layer_idx in self.subject.module_ids:
            self.progress(total, total, self.subject.name_of(layer_idx))
            yield from _module(oracle, state, layer_idx)

    def _progress_text(self, layer_idx: int) -> str:
        chosen = layer_idx in self.subject.layer_ids
        return f"layers.{layer_idx}" if chosen else f"layers.{layer_idx}: the reference alone, up to a chosen layer"

    def _restore(self, work: Path | None, key: str, total: int) -> State | None:
        if work is None:
            return None
        found, state = restore(work, key, self.subject.device)
        if found is SavedState.OTHER:
            self.progress(0, total, f"{work}: {found.value}; starting anew")
        if state is not None:
            self.progress(state.num_done, total, f"{work}: going on behind layers.{state.num_done - 1}")
        return state


def _stage_failure(where: str, error: Exception) -> Finding:
    message = f"the reference ends here: {type(error).__name__}: {error}"
    return Finding("V01", where, Verdict.FAIL, message, remedy="the file stage names what cannot be read")


def _layer_failure(where: str, error: Exception) -> Finding:
    """Makes the finding of a layer that does not load, or of a kernel that raises; a checkpoint's error names the
    tensor."""
    message = f"the engine does not run it: {type(error).__name__}: {error}"
    remedy = "the stages file, environment and load look at the checkpoint, the kernels and the operands alone"
    return Finding("V01", where, Verdict.FAIL, message, remedy=remedy)


@torch.inference_mode()
def _begin(oracle: Oracle) -> State:
    """Makes the state before the first layer. The engine's own streams are carried if no layer will be left out."""
    reference_TSD = oracle.embed()
    subject = oracle.subject
    if len(subject.layer_ids) < subject.config.num_hidden_layers:
        return State(0, reference_TSD, None)
    try:
        engine = end_to_end.embed_text(oracle)
        finding, measured = end_to_end.check_embedding(engine, reference_TSD, oracle)
    except Exception as error:
        return State(0, reference_TSD, None, [_layer_failure("embed", error)])
    return State(0, reference_TSD, engine, [finding], [measured])


@torch.inference_mode()
def _next(oracle: Oracle, state: State, layer_idx: int, *, is_chosen: bool) -> State:
    """Returns the state behind one more layer, with the layer's results."""
    broken = []
    if is_chosen:
        try:
            compared, findings, engine = _layer(oracle, state, layer_idx)
            return State(
                layer_idx + 1,
                compared.streams_TSD,
                engine,
                [*state.findings, *findings],
                [*state.measurements, *compared.measurements],
            )
        except Exception as error:
            broken = [_layer_failure(f"layers.{layer_idx}", error)]
            state = replace(state, engine=None)
    streams_TSD = oracle.block(layer_idx, state.reference_TSD).streams_TSD
    return State(layer_idx + 1, streams_TSD, state.engine, [*state.findings, *broken], state.measurements)


def _layer(oracle: Oracle, state: State, layer_idx: int) -> tuple[LayerComparison, list[Finding], Residual | None]:
    """Runs one layer of the engine in all ways; it is freed when this returns."""
    engine = oracle.subject.engine
    single = SingleLayer.of(load_layer(oracle.subject, layer_idx), len(oracle.token_ids))
    compared = compare_layer(single, oracle, state.reference_TSD)
    batching = Batching(single, oracle, state.reference_TSD.to(engine.dtype), compared)
    findings = [
        *verdicts(compared, single),
        *batching.findings(),
        _check_keys(compared, single.layer.name, oracle.subject),
    ]
    carried = state.engine
    if carried is not None:
        carried = single.step([SequenceRows(oracle.token_ids, carried, single.new_cache())])
    return compared, findings, carried


def _check_keys(compared: LayerComparison, layer: str, subject: Subject) -> Finding:
    """V10: checks that keys are in FP8 under official numerics only, each block of 64 with a scale of its own."""
    if compared.key_rounding is None:
        kept = f"kept in {dtype_name(subject.engine.dtype)}"
        if subject.engine.cache_format.in_pages:
            kept = "rounded by the caches' FP8 pages alone, which K11 checks"
        message = f"keys are {kept} ({Step.KV} is plain)"
        return Finding("V10", layer, Verdict.SKIPPED, message)
    number = compared.key_rounding
    words = f"more than 0, at most {E4M3_ROUNDING:.1e}: half a step of E4M3"
    message = f"rounding moves the keys by {number:.1e}, relative"
    remedy = "the key quantiser: its scale per block, which channels it rounds"
    return Finding.judged("V10", layer, 0 < number <= E4M3_ROUNDING, message, number, words, remedy)


def _no_module(subject: Subject) -> Iterator[Finding]:
    """Says why no module of drafts was looked at."""
    reason = "no MTP module is planned: --draft plans it"
    if subject.plan.draft.num_modules:
        reason = "DSpark's drafter, which the engine does not run" if subject.config.dspark else "not chosen"
    yield from (Finding(check, "mtp", Verdict.SKIPPED, reason) for check in ("V11", "V12"))


@torch.inference_mode()
def _module(oracle: Oracle, state: State, layer_idx: int) -> Iterator[StageItem]:
    """Checks a module of drafts: its layer as any other, V11 and V12. The engine drafts with the first alone."""
    name = oracle.subject.name_of(layer_idx)
    module = Module(oracle, state.reference_TSD)
    if layer_idx != module.layer_idx:
        yield Finding("V11", name, Verdict.SKIPPED, "the engine drafts with the first module")
        return
    try:
        entering = State(layer_idx, module.entry.streams_TSD, None)
        compared, findings, _ = _layer(module.following, entering, layer_idx)
        yield from (replace(one, module=name) for one in compared.measurements)
        yield from findings
        model = module.load()
        yield from module.findings(model, compared.streams_TSD)
        yield check_drafting(module, model)
    except Exception as error:
        yield _layer_failure(name, error)


@torch.inference_mode()
def _end(oracle: Oracle, state: State) -> Iterator[StageItem]:
    """Checks the head, and V04 where every layer of the engine ran."""
    num_chosen, num_layers = len(oracle.subject.layer_ids), oracle.subject.config.num_hidden_layers
    if num_chosen < num_layers:
        message = f"{num_chosen} of {num_layers} layers chosen: the whole model did not run"
        yield Finding("V04", "logits", Verdict.SKIPPED, message)
        return
    try:
        ends = end_to_end.ModelEnds.of(oracle)
        finding, measured = end_to_end.check_head(oracle, ends, state.reference_TSD)
        if state.engine is None:
            whole = Finding("V04", "logits", Verdict.SKIPPED, "a layer of the engine did not run")
        else:
            whole = end_to_end.check_end_to_end(oracle, ends, state.engine, state.reference_TSD)
        yield from (measured, finding, whole)
    except Exception as error:
        yield _layer_failure("head", error)
