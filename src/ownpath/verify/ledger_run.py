"""One prompt and one more token through the engine, a layer in memory at a time, with everything recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ownpath.assembly import LoadedPart
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Residual
from ownpath.trace import Record, Records
from ownpath.trace.launches import DeviceLaunch, NoLaunchSeen, record_launches
from ownpath.verify.layer import LoadedLayer, load_ends, load_layer
from ownpath.verify.subject import Subject

PROMPT_TOKENS = 130
"""Enough for every kind of window to be complete once: compressors take 4 or 128 tokens."""


@dataclass(frozen=True)
class Ran:
    """The calls and launches of one part of the model. failure: why it did not come to its end; empty where it did.

    launches: the kernels that a profiler saw; ``None`` where there is no device to launch on, or no profiler.
    """

    where: str
    records: tuple[Record, ...] = ()
    launches: tuple[DeviceLaunch, ...] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Steps:
    """A prompt and one more token of one sequence: their ids, and what the layers have made of them so far."""

    token_ids: tuple[Sequence[int], ...]
    residuals: tuple[Residual, ...]

    @classmethod
    def of(cls, subject: Subject, embed_VD: torch.Tensor) -> "Steps":
        """Before the first layer."""
        config = subject.config
        num_tokens = min(PROMPT_TOKENS, subject.engine.max_model_len - 1)
        token_ids = [idx % config.vocab_size for idx in range(num_tokens)], [1]
        embedded = (embed_VD[torch.tensor(ids, device=subject.device)].to(subject.engine.dtype) for ids in token_ids)
        return cls(token_ids, tuple(Residual.of_embedding(h_TD, config.hc_mult) for h_TD in embedded))

    def through(self, layer: LoadedLayer) -> "Steps":
        """The same steps behind one more layer, on caches of its own."""
        cache = layer.new_pool(sum(map(len, self.token_ids)), max_sequences=1).new_sequence()
        steps = zip(self.token_ids, self.residuals, strict=True)
        device = self.residuals[0].x_TSD.device
        passed = [layer.step(residual, ForwardBatch.of([(ids, cache)], device)) for ids, residual in steps]
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
    steps = Steps.of(subject, ends.weights.params["embed.weight"])
    for done, layer_idx in enumerate(subject.layer_ids):
        if progress is not None:
            progress(done, total, f"layers.{layer_idx}")
        steps, ran = _run_layer(subject, layer_idx, steps)
        yield ran
    yield _run_head(ends, steps)


def _run_layer(subject: Subject, layer_idx: int, steps: Steps) -> tuple[Steps, Ran]:
    where, is_cuda = f"layers.{layer_idx}", subject.device.type == "cuda"
    passed: list[Steps] = []
    try:
        layer = load_layer(subject, layer_idx)
        with torch.inference_mode():
            if is_cuda:  # what only happens at a kernel's first call
                steps.through(layer)
            ran = _recorded(where, layer, lambda: passed.append(steps.through(layer)), is_cuda)
    except (ValueError, RuntimeError) as error:
        return steps, Ran(where, failure=_words(error))
    return passed[0], ran


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
    launches: tuple[DeviceLaunch, ...] | None = None
    with part.ledger.observe(Records()) as records:
        if not is_cuda:
            run()
        else:
            with suppress(NoLaunchSeen):
                launches = tuple(record_launches(part.ledger, run))
    return Ran(where, tuple(records), launches)


def _words(error: Exception) -> str:
    """One line of an error."""
    return str(error).partition("\n")[0] or type(error).__name__
