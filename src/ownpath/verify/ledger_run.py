"""Runs a prompt and one more token through the engine with recording on, one layer in memory at a time."""

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
class PartRun:
    """The calls and launches of one part of the model. failure: why it did not finish; empty where it did.

    launches: the kernels that a profiler saw; ``None`` where there is no device to launch on, or no profiler.
    """

    where: str
    records: tuple[Record, ...] = ()
    launches: tuple[DeviceLaunch, ...] | None = None
    failure: str = ""


@dataclass(frozen=True)
class PromptSteps:
    """A prompt and one more token of one sequence: their ids, and their hidden state after the layers so far."""

    token_ids: tuple[Sequence[int], ...]
    residuals: tuple[Residual, ...]

    @classmethod
    def of(cls, subject: Subject, embed_VD: torch.Tensor) -> "PromptSteps":
        """Starts before the first layer."""
        config = subject.config
        num_tokens = min(PROMPT_TOKENS, subject.engine.max_model_len - 1)
        token_ids = [idx % config.vocab_size for idx in range(num_tokens)], [1]
        embedded = (embed_VD[torch.tensor(ids, device=subject.device)].to(subject.engine.dtype) for ids in token_ids)
        return cls(token_ids, tuple(Residual.of_embedding(h_TD, config.hc_mult) for h_TD in embedded))

    def through(self, layer: LoadedLayer) -> "PromptSteps":
        """Runs one more layer on the same steps, on caches of its own."""
        cache = layer.new_pool(sum(map(len, self.token_ids)), max_sequences=1).new_sequence()
        steps = zip(self.token_ids, self.residuals, strict=True)
        device = self.residuals[0].x_TSD.device
        passed = [layer.step(residual, ForwardBatch.of([(ids, cache)], device)) for ids, residual in steps]
        return replace(self, residuals=tuple(passed))


def run_parts(subject: Subject, progress: Callable[[int, int, str], None] | None = None) -> Iterator[PartRun]:
    """Runs the chosen layers one after the other, then the head; a part that fails does not end the run.

    A layer that was not chosen, or that failed, passes its input on: this check looks at what ran, not at the results.
    """
    total = len(subject.layer_ids) + 1
    try:
        ends = load_ends(subject)
    except (ValueError, RuntimeError) as error:
        yield PartRun("the embedding and the head", failure=_words(error))
        return
    steps = PromptSteps.of(subject, ends.weights.params["embed.weight"])
    for done, layer_idx in enumerate(subject.layer_ids):
        if progress is not None:
            progress(done, total, f"layers.{layer_idx}")
        steps, ran = _run_layer(subject, layer_idx, steps)
        yield ran
    yield _run_head(ends, steps)


def _run_layer(subject: Subject, layer_idx: int, steps: PromptSteps) -> tuple[PromptSteps, PartRun]:
    where, passed = f"layers.{layer_idx}", [steps]
    try:
        layer = load_layer(subject, layer_idx)
    except (ValueError, RuntimeError) as error:
        return steps, PartRun(where, failure=_words(error))
    ran = _observe(where, layer, lambda: passed.append(steps.through(layer)))
    return (steps if ran.failure else passed[-1]), ran


def _run_head(ends: LoadedPart, steps: PromptSteps) -> PartRun:
    hc_head, head = ends.builder.ends()

    def run() -> None:
        for at in steps.residuals:
            head(at.enter(hc_head).h_TD[-1:])

    return _observe("head", ends, run)


@torch.inference_mode()
def _observe(where: str, part: LoadedPart, run: Callable[[], object]) -> PartRun:
    """Runs with records, and under the profiler where there is a device."""
    is_cuda = torch.device(part.builder.engine.device).type == "cuda"
    launches: tuple[DeviceLaunch, ...] | None = None
    try:
        if is_cuda:  # first call outside the profile: what happens only once
            run()
        with part.ledger.observe(Records()) as records:
            if not is_cuda:
                run()
            else:
                with suppress(NoLaunchSeen):
                    launches = tuple(record_launches(part.ledger, run))
    except (ValueError, RuntimeError) as error:
        return PartRun(where, failure=_words(error))
    return PartRun(where, tuple(records), launches)


def _words(error: Exception) -> str:
    """Formats an error as one line."""
    return str(error).partition("\n")[0] or type(error).__name__
