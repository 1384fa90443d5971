"""Takes the engine's steps apart for ``bench_grammar``: times of the host's parts, the device's, torch's calls; and a
model without cost, for the host's parts alone."""

import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.kernels.sample.ref import go_on
from ownpath.kernels.sample.types import NextStep, Sampled, SampleRows
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.structured.matcher import AnswerMatcher

LIMIT_S = 600.0


class Crowd:
    """Requests that run together, each submitted by itself. rate: tokens per second from the moment when all have begun
    to the first end."""

    def __init__(
        self, engine: Engine, prompt: list[int], matchers: Sequence[AnswerMatcher | None], num_tokens: int
    ) -> None:
        self._num_waiting = self._num_left = len(matchers)
        self._num_heard, self._ended = 0, threading.Event()
        self._start = self._end = (0.0, 0)
        for idx, matcher in enumerate(matchers):
            params = SamplingParams(num_tokens, seed=idx, ignore_eos=True)
            engine.submit([Request(list(prompt), params, self._sink(), matcher=matcher)])

    def _sink(self) -> Callable[[StepOutput], None]:
        has_begun = False

        def hear(output: StepOutput) -> None:
            nonlocal has_begun
            assert output.error is None, output.error
            self._num_heard += 1
            if not has_begun:
                has_begun, self._num_waiting = True, self._num_waiting - 1
                if not self._num_waiting:
                    self._start = time.perf_counter(), self._num_heard
            if output.finish_reason is not None:
                self._end = self._end if self._end[1] else (time.perf_counter(), self._num_heard)
                self._num_left -= 1
                if not self._num_left:
                    self._ended.set()

        return hear

    def rate(self) -> float:
        """Waits for all and returns the tokens per second."""
        assert self._ended.wait(LIMIT_S), "a request did not end"
        assert self._start < self._end, "the first request ended before the last began: ask for more tokens"
        return (self._end[1] - self._start[1]) / (self._end[0] - self._start[0])


class StepParts:
    """Times of the parts of an engine's decode steps on the host, by a clock, each without the parts inside it."""

    WAIT, LEFT_OUT = "wait for the device", "left out"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Watches the engine's steps meanwhile."""
        runner, adjuster = engine._runner, engine._adjuster
        decoder = runner._decoder
        assert decoder is not None, "the model's forward runs all steps here"
        places: list[tuple[str, object, str]] = [
            ("schedule", engine, "_schedule"),
            ("launch", decoder, "_begin"),
            ("read and report", runner, "_land"),
            ("masks", adjuster, "_fill_masks"),
            ("rows", adjuster, "rows_of"),
            ("second draw", decoder, "redraw"),
            *((self.WAIT, mark, "wait") for mark in decoder._marks),
        ]
        if isinstance(decoder, FreeDecoder):
            places += [(self.LEFT_OUT, decoder, "launch"), (self.LEFT_OUT, decoder.kernel, "run")]
        with ExitStack() as stack:
            for name, owner, method in places:
                stack.enter_context(_replaced(owner, method, self._timed(name, getattr(owner, method))))
            step = self._timed("other", engine._step_or_fail)
            stack.enter_context(_replaced(engine, "_step_or_fail", lambda: self._note(step)))
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            begun = self._clock()
            try:
                return function(*args, **named)
            finally:
                spent = self._clock() - begun
                self._now[name] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return run

    def _note(self, step: Callable[[], None]) -> None:
        self._now = defaultdict(float)
        step()
        if "launch" in self._now and "read and report" in self._now:
            self._steps.append(dict(self._now))

    def medians_us(self) -> dict[str, float]:
        """Returns the median of each part, of steps that launched one and read one."""
        names = dict.fromkeys(name for step in self._steps for name in step)
        return {name: 1e6 * statistics.median(step.get(name, 0.0) for step in self._steps) for name in names}

    def line(self) -> str:
        """Writes the parts, and their sum but for waiting and what is left out."""
        medians = self.medians_us()
        parts = {name: us for name, us in medians.items() if name not in (self.WAIT, self.LEFT_OUT)}
        said = ", ".join(f"{name} {us:.0f}" for name, us in parts.items())
        return f"{said}: {sum(parts.values()):.0f}; {self.WAIT} {medians.get(self.WAIT, 0.0):.0f}"


@contextmanager
def device_times(engine: Engine) -> Iterator[list[tuple[Any, Any]]]:
    """Puts events around the graphs meanwhile. Yields a pair for each launch."""
    decoder = engine._runner._decoder
    assert decoder is not None
    stamps: list[tuple[Any, Any]] = []
    launch = decoder.launch

    def stamped(count: int) -> torch.Tensor:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        logits_TV = launch(count)
        after.record()
        stamps.append((before, after))
        return logits_TV

    with _replaced(decoder, "launch", stamped):
        yield stamps
    torch.cuda.synchronize()


def device_line(stamps: Sequence[tuple[Any, Any]]) -> str:
    """Writes the median time of a graph, and of what lies between two: copies, second draws, waiting for the host."""
    graphs = sorted(1e3 * before.elapsed_time(after) for before, after in stamps)
    gaps = sorted(1e3 * one[1].elapsed_time(other[0]) for one, other in pairwise(stamps))
    graph, gap, most = statistics.median(graphs), statistics.median(gaps), gaps[len(gaps) * 9 // 10]
    return f"graph {graph:.1f}; to the next {gap:.1f}, 90% within {most:.1f}"


class CountedCalls(TorchDispatchMode):
    """Counts torch's calls in an engine's steps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: Counter[str] = Counter()
        self._num_steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a call and makes it."""
        self._calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Counts meanwhile."""
        step = engine._step_or_fail

        def counted() -> None:
            self._num_steps += 1
            with self:
                step()

        with _replaced(engine, "_step_or_fail", counted):
            yield

    def line(self) -> str:
        """Writes the calls a step, the most frequent first; those of fewer than one step in ten are left out."""
        each = {name: count / self._num_steps for name, count in self._calls.most_common()}
        said = ", ".join(f"{name} {count:.1f}" for name, count in each.items() if count >= 0.1)
        return f"{sum(each.values()):.1f}: {said}"


class AllowedTokens:
    """A sampler that draws any allowed token, at once."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def run(
        self, logits_TV: torch.Tensor, rows: SampleRows, operand: object, *, out: Sampled, following: NextStep
    ) -> Sampled:
        """As a sampler's; log-probs stay as they are."""
        with _disable_current_modes():
            chance = self._random.random((len(rows.seed_T), logits_TV.shape[1]), np.float32)
            if rows.mask_TW is not None:
                words = rows.mask_TW.numpy().view(np.uint8)
                chance *= np.unpackbits(words, axis=1, bitorder="little")[:, : logits_TV.shape[1]]
            places = torch.arange(len(chance)) if rows.place_T is None else rows.place_T.long()
            out.token_T[places] = torch.from_numpy(chance.argmax(axis=1)).to(out.token_T.dtype)
            out.fault_T[places] = 0
            go_on(out, following, rows.place_T)
        return out


class FreeDecoder(Decoder):
    """A decoder whose graphs cost nothing: they draw tokens at random. kernel: its sampler."""

    def __init__(self, model: "FreeModel", max_rows: int, num_vocab: int) -> None:
        super().__init__(model, max_rows, num_vocab)
        self.kernel = AllowedTokens()
        self._sampler = self.kernel  # type: ignore[assignment]
        self._logits_TV = torch.zeros(max_rows, num_vocab)

    def has_graph(self, num_rows: int) -> bool:
        """True: every step is launched ahead."""
        return True

    def launch(self, count: int) -> torch.Tensor:
        """Draws tokens, and goes on a step."""
        with _disable_current_modes():
            self._sample(self._logits_TV[:count], self._rows.sample_rows(count))
            return self._logits_TV[:count]


class FreeModel:
    """The embedded model's caches, and a forward that computes nothing."""

    decodes = True

    def __init__(self, model: Model) -> None:
        self.config, self.caches, self.ledger = model.config, model.caches, model.ledger
        self._model = model

    def new_cache(self, num_tokens: int | None = None) -> SequenceCache:
        """As the model's."""
        return self._model.new_cache(num_tokens)

    def decode(self, token_ids_T: torch.Tensor, tables: object) -> torch.Tensor:
        """Not called: graphs run all steps of one row a request."""
        raise NotImplementedError

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Advances the caches. All logits are equal."""
        batch.tables.extend()
        return torch.zeros(len(batch.logits_ids), self.config.vocab_size)


def free_engine(max_num_seqs: int, num_vocab: int) -> Engine:
    """Makes an engine of the embedded model's shape in which only the host's part costs anything."""
    config = EngineConfig("cpu", torch.float32, max_model_len=2048, max_num_seqs=max_num_seqs)
    model = FreeModel(load_model(default_model_dir(), config))
    return Engine(model, config, num_vocab, decoder=FreeDecoder(model, max_num_seqs, num_vocab))


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Has an attribute of one object be another one meanwhile."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
