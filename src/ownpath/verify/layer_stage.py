"""The layers stage: every chosen layer of the engine beside the reference, in one pass over the checkpoint.

A layer is loaded, compared on the reference's streams, read in other ways, run on the engine's own streams, and let go
before the next is loaded. What goes on from layer to layer are streams.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ownpath.finding import Finding, Verdict
from ownpath.model.block import Residual
from ownpath.official import Step
from ownpath.verify.layer import load_layer
from ownpath.verify.layers import end_to_end
from ownpath.verify.layers.batching import Batching
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.single_layer import Chunk, SingleLayer
from ownpath.verify.layers.teacher_forcing import LayerComparison, compare_layer
from ownpath.verify.layers.text import Text, text_of
from ownpath.verify.layers.verdicts import growth, verdicts
from ownpath.verify.layers.work import State, key_of, restore, save
from ownpath.verify.resume import Found
from ownpath.verify.subject import Subject

Progress = Callable[[int, int, str], None]

E4M3_ROUNDING = 2**-4 * (1 + 2**-10)
"""Three bits of mantissa: half a step is at most 2^-4 of a value; what is subnormal under its block's scale is off by
less than 2^-17 of the block's largest, which the last factor has room for."""


def layer_stage(
    subject: Subject,
    progress: Progress | None = None,
    work: Path | None = None,
    measured: Callable[[Measurement], None] | None = None,
) -> Iterator[Finding]:
    """V01 to V10 of the chosen layers, in their order.

    progress: told (layers done, layers, what comes next). work: a folder for the state behind each layer, where a later
    call with the same checkpoint, plan, selection and text goes on. measured: told of every value's distance.
    Memory: one layer of the engine and one expert of the reference at a time, beside a text's streams.
    """
    progress, measured = progress or (lambda done, total, name: None), measured or (lambda row: None)
    stage = _Stage(subject, text_of(subject), progress)
    for news in stage.run(work):
        for row in news.measurements:
            measured(row)
        yield from news.findings


@dataclass(frozen=True)
class _News:
    findings: tuple[Finding, ...]
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class _Stage:
    subject: Subject
    text: Text
    progress: Progress

    def run(self, work: Path | None) -> Iterator[_News]:
        oracle = Oracle.of(self.subject, self.text.token_ids)
        layer_ids = self.subject.layer_ids
        total = max(layer_ids, default=-1) + 1
        key = key_of(self.subject, self.text)
        try:
            state = self._restored(work, key, total) or _begin(oracle)
        except Exception as error:  # whatever an oracle cannot read: there is nothing to compare with
            yield _News((_stopped("embed", error),))
            return
        yield _News(tuple(state.findings), tuple(state.measurements))
        for layer_idx in range(state.num_done, total):
            self.progress(layer_idx, total, self._doing(layer_idx))
            try:
                state, news = _next(oracle, state, layer_idx, is_chosen=layer_idx in layer_ids)
            except Exception as error:
                yield _News((_stopped(f"layers.{layer_idx}", error),))
                return
            if work is not None:
                save(work, key, state)
            yield news
        self.progress(total, total, "the head and the whole model")
        yield _News((growth(state.measurements),))
        yield _end(oracle, state)

    def _doing(self, layer_idx: int) -> str:
        chosen = layer_idx in self.subject.layer_ids
        return f"layers.{layer_idx}" if chosen else f"layers.{layer_idx}: the reference alone, up to a chosen layer"

    def _restored(self, work: Path | None, key: str, total: int) -> State | None:
        if work is None:
            return None
        found, state = restore(work, key, self.subject.device)
        if found is Found.OTHER:
            self.progress(0, total, f"{work}: {found.value}; starting anew")
        if state is not None:
            self.progress(state.num_done, total, f"{work}: going on behind layers.{state.num_done - 1}")
        return state


def _stopped(where: str, error: Exception) -> Finding:
    message = f"the reference ends here: {type(error).__name__}: {error}"
    return Finding("V01", where, Verdict.FAIL, message, remedy="the file stage names what cannot be read")


def _broke(where: str, error: Exception) -> Finding:
    """A layer that does not load, or a kernel that raises; a checkpoint's error names the tensor."""
    message = f"the engine does not run it: {type(error).__name__}: {error}"
    remedy = "the stages file, environment and load look at the checkpoint, the kernels and the operands alone"
    return Finding("V01", where, Verdict.FAIL, message, remedy=remedy)


@torch.inference_mode()
def _begin(oracle: Oracle) -> State:
    """Before the first layer. The engine's own streams are carried if no layer will be left out."""
    reference_TSD = oracle.embed()
    subject = oracle.subject
    if len(subject.layer_ids) < subject.config.num_hidden_layers:
        return State(0, reference_TSD, None)
    try:
        engine = end_to_end.embedded(oracle)
        finding, measured = end_to_end.embedding(engine, reference_TSD, oracle)
    except Exception as error:
        return State(0, reference_TSD, None, [_broke("embed", error)])
    return State(0, reference_TSD, engine, [finding], [measured])


@torch.inference_mode()
def _next(oracle: Oracle, state: State, layer_idx: int, *, is_chosen: bool) -> tuple[State, _News]:
    """The state behind one more layer, and what was found in it."""
    if not is_chosen:
        return _passed(oracle, state, layer_idx), _News(())
    try:
        compared, findings, engine = _layer(oracle, state, layer_idx)
    except Exception as error:
        news = _News((_broke(f"layers.{layer_idx}", error),))
        state = replace(_passed(oracle, state, layer_idx), engine=None)
        return replace(state, findings=[*state.findings, *news.findings]), news
    news = _News(tuple(findings), compared.measurements)
    done = State(
        layer_idx + 1,
        compared.streams_TSD,
        engine,
        [*state.findings, *news.findings],
        [*state.measurements, *news.measurements],
    )
    return done, news


def _passed(oracle: Oracle, state: State, layer_idx: int) -> State:
    """By the reference alone."""
    streams_TSD = oracle.block(layer_idx, state.reference_TSD).streams_TSD
    return replace(state, num_done=layer_idx + 1, reference_TSD=streams_TSD)


def _layer(oracle: Oracle, state: State, layer_idx: int) -> tuple[LayerComparison, list[Finding], Residual | None]:
    """One layer of the engine in every way; it is let go when this returns."""
    engine = oracle.subject.engine
    single = SingleLayer.of(load_layer(oracle.subject, layer_idx), len(oracle.token_ids))
    compared = compare_layer(single, oracle, state.reference_TSD)
    batching = Batching(single, oracle, state.reference_TSD.to(engine.dtype), compared)
    findings = [*verdicts(compared, single), *batching.findings(), _keys(compared, single.layer.name, oracle.subject)]
    carried = state.engine
    if carried is not None:
        carried = single.step([Chunk(oracle.token_ids, carried, single.new_cache())])
    return compared, findings, carried


def _keys(compared: LayerComparison, layer: str, subject: Subject) -> Finding:
    """V10: keys are kept in FP8 under official numerics alone, each block of 64 with a scale of its own."""
    if compared.key_rounding is None:
        dtype = str(subject.engine.dtype).removeprefix("torch.")
        return Finding("V10", layer, Verdict.SKIPPED, f"keys are kept in {dtype} ({Step.KV} is plain)")
    number = compared.key_rounding
    words = f"more than 0, at most {E4M3_ROUNDING:.1e}: half a step of E4M3"
    verdict = Verdict.PASS if 0 < number <= E4M3_ROUNDING else Verdict.FAIL
    remedy = "" if verdict is Verdict.PASS else "the key quantiser: its scale per block, which channels it rounds"
    return Finding("V10", layer, verdict, f"rounding moves the keys by {number:.1e} (rel-L2)", number, words, remedy)


@torch.inference_mode()
def _end(oracle: Oracle, state: State) -> _News:
    """The head, and V04 where every layer of the engine ran."""
    num_layers = oracle.subject.config.num_hidden_layers
    if len(oracle.subject.layer_ids) < num_layers:
        chosen = f"{len(oracle.subject.layer_ids)} of {num_layers} layers chosen"
        return _News((Finding("V04", "logits", Verdict.SKIPPED, f"{chosen}: the whole model did not run"),))
    try:
        ends = end_to_end.Ends.of(oracle)
        finding, measured = end_to_end.head(oracle, ends, state.reference_TSD)
        if state.engine is None:
            skipped = Finding("V04", "logits", Verdict.SKIPPED, "a layer of the engine did not run")
            return _News((finding, skipped), (measured,))
        return _News((finding, end_to_end.end_to_end(oracle, ends, state.engine, state.reference_TSD)), (measured,))
    except Exception as error:
        return _News((_broke("head", error),))
