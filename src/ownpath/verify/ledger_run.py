"""One prompt and one more token through the engine, a layer in memory at a time, with everything recorded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.runners import Record, Records
from ownpath.runners.launches import Launch, NoLaunchSeen, record_launches
from ownpath.verify.layer import LoadedLayer, LoadedPart, load_ends, load_layer
from ownpath.verify.subject import Subject

PROMPT_TOKENS = 130
"""Enough for every kind of window to be complete once: compressors take 4 or 128 tokens."""


@dataclass(frozen=True)
class Ran:
    """What one part of the model did. failure: why it did not come to its end; empty where it did.

    launches: the kernels that a profiler saw; ``None`` where there is no device to launch on, or no profiler.
    """

    where: str
    records: tuple[Record, ...] = ()
    launches: tuple[Launch, ...] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Steps:
    """The steps of one sequence, and what the layers have made of it so far."""

    batches: tuple[ForwardBatch, ...]
    residuals: tuple[Residual, ...]

    @classmethod
    def of(cls, subject: Subject, embed_VD: torch.Tensor) -> "Steps":
        """A prompt, then one token, on caches of their own."""
        config, device = subject.config, subject.device
        num_tokens = min(PROMPT_TOKENS, subject.engine.max_model_len - 1)
        spec = replace(CacheSpec.of(config, subject.engine), max_tokens=num_tokens + 1, max_sequences=1)
        cache = CachePool(spec).new_sequence()
        prompt = ForwardBatch.of([([idx % config.vocab_size for idx in range(num_tokens)], cache)], device)
        cache.num_tokens = num_tokens
        batches = prompt, ForwardBatch.of([([1], cache)], device)
        embedded = (embed_VD[batch.token_ids_T].to(spec.dtype) for batch in batches)
        streams = (h_TD.unsqueeze(1).expand(-1, config.hc_mult, -1).contiguous() for h_TD in embedded)
        return cls(batches, tuple(Residual(x_TSD) for x_TSD in streams))

    def through(self, layer: LoadedLayer) -> "Steps":
        """The same steps behind one more layer."""
        rotated = ((batch, layer.rope.at(batch.positions_T)) for batch in self.batches)
        passed = (
            layer.block(residual, rotation, batch.token_ids_T, layer.block.prepare(batch.tables))
            for residual, (batch, rotation) in zip(self.residuals, rotated, strict=True)
        )
        return replace(self, residuals=tuple(passed))


def run_parts(subject: Subject, progress: Callable[[int, int, str], None] | None = None) -> Iterator[Ran]:
    """Runs the chosen layers one after the other, then the head; a part that fails does not end the run.

    A layer that was not chosen, or that failed, passes on what it got: what ran is looked at here, not what came out.
    """
    total = len(subject.layer_ids) + 1
    try:
        ends = load_ends(subject)
    except (ValueError, RuntimeError) as error:
        yield Ran("the embedding and the head", failure=_words(error))
        return
    steps, scratch = (Steps.of(subject, ends.weights.params["embed.weight"]) for _ in range(2))
    for done, layer_idx in enumerate(subject.layer_ids):
        if progress is not None:
            progress(done, total, f"layers.{layer_idx}")
        steps, scratch, ran = _run_layer(subject, layer_idx, steps, scratch)
        yield ran
    yield _run_head(ends, steps)


def _run_layer(subject: Subject, layer_idx: int, steps: Steps, scratch: Steps) -> tuple[Steps, Steps, Ran]:
    """scratch: the same steps on caches that nobody reads, for what only happens at a kernel's first call."""
    where = f"layers.{layer_idx}"
    try:
        layer = load_layer(subject, layer_idx)
        passed: list[Steps] = []
        is_cuda = subject.device.type == "cuda"
        with torch.inference_mode():
            warm = scratch.through(layer) if is_cuda else scratch
            ran = _recorded(where, layer, lambda: passed.append(steps.through(layer)), is_cuda)
    except (ValueError, RuntimeError) as error:
        return steps, scratch, Ran(where, failure=_words(error))
    return passed[0], warm, ran


def _run_head(ends: LoadedPart, steps: Steps) -> Ran:
    hc_head, head = ends.builder.ends()

    def run() -> None:
        for at in steps.residuals:
            head(hc_head(at.x_TSD, at.y_TD, at.mix).h_TD[-1:])

    is_cuda = ends.weights.params["embed.weight"].is_cuda
    try:
        with torch.inference_mode():
            if is_cuda:
                run()
            return _recorded("head", ends, run, is_cuda)
    except (ValueError, RuntimeError) as error:
        return Ran("head", failure=_words(error))


def _recorded(where: str, part: LoadedPart, run: Callable[[], object], is_cuda: bool) -> Ran:
    """Runs with records, and under the profiler where there is a device."""
    records = part.ledger.records = Records()
    if not is_cuda:
        run()
        return Ran(where, tuple(records))
    try:
        launches = tuple(record_launches(part.ledger, run))
    except NoLaunchSeen:
        launches = None
    return Ran(where, tuple(records), launches)


def _words(error: Exception) -> str:
    """One line of an error."""
    return str(error).partition("\n")[0] or type(error).__name__
