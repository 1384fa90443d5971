"""The engine: one thread that runs steps while there is work. Token ids in and out; it knows no text."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig, ModelConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.batch import LogitsShare, build_batch, decode_share
from ownpath.engine.decoder import Decoder
from ownpath.engine.device import device_problem
from ownpath.engine.flags import IndexFlags, tell_flagged
from ownpath.engine.request import (
    FinishReason,
    NonFinite,
    Request,
    RequestError,
    ScoredToken,
    StepOutput,
    plain_output,
)
from ownpath.engine.rows import step_rows
from ownpath.engine.sampler import (
    Drawn,
    NonFiniteIndexScores,
    RowFailed,
    choose_tokens,
    no_token,
    sample_row,
    score_tokens,
    with_top,
)
from ownpath.engine.scheduler import ScheduledChunk, Scheduler
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.model.batch import ForwardBatch

logger = logging.getLogger(__name__)

_STEP_FAILED = "the step that this request was part of failed"
_STOPPED = "the engine has stopped"


class LanguageModel(Protocol):
    """The model as the engine uses it."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self) -> SequenceCache: ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor: ...


@dataclass(frozen=True)
class EngineLoad:
    """num_running, num_waiting: requests. cache_use: share of the caches' tokens that running requests fill.

    Since the engine started: num_compiled, kernels that steps had to compile, or to take from Triton's cache;
    num_captured, graphs that they had to capture. Both should stay 0.
    """

    num_running: int
    num_waiting: int
    cache_use: float
    num_compiled: int
    num_captured: int


class EngineOverloaded(RuntimeError):
    """Too many requests are open; none of this call was accepted."""


class EngineStopped(RuntimeError):
    """The engine runs no more requests."""


class Engine:
    """Runs requests together, each with its own parameters, random stream and reports.

    num_vocab: ids below it are tokens; embedding rows from there on are padding, never chosen or scored.
    max_num_queued: requests that may wait beyond those that run.
    end_token_ids: tokens that end an answer; ``None``: those of the model's config.json alone.
    decoder: runs the steps in which every request has one row; ``None``: the model's ``forward`` runs all steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        num_vocab: int,
        max_num_queued: int = 256,
        end_token_ids: Iterable[int] | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        if not 0 < num_vocab <= model.config.vocab_size:
            raise ValueError(f"{num_vocab} tokens do not fit the model's vocab_size {model.config.vocab_size}")
        self.config = config
        self.num_vocab = num_vocab
        self.end_token_ids = frozenset(model.config.eos_token_id if end_token_ids is None else end_token_ids)
        self._model, self._decoder = model, decoder
        self._scheduler = Scheduler(config.max_num_seqs, config.max_prefill_tokens)
        self._adjuster = Adjuster(num_vocab, torch.device(config.device), self.end_token_ids)
        self._max_num_open = config.max_num_seqs + max_num_queued
        self._flags = IndexFlags()
        self._open: set[Request] = set()
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = False
        self._is_stepping = False
        self._made_before = (COMPILATIONS.count, COMPILATIONS.num_captured)
        self.num_steps = 0
        """Steps begun so far."""
        self.failure: str | None = None
        """The reason why the engine stopped by itself; None while it runs, and after ``stop``."""
        self._thread = threading.Thread(target=self._run, name="ownpath-engine", daemon=True)

    # -- called from any thread

    def start(self) -> None:
        """Starts the thread. Call once."""
        self._made_before = (COMPILATIONS.count, COMPILATIONS.num_captured)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after its current step; open requests end with an error."""
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive() and self.failure is None:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def give_up(self, failure: str) -> None:
        """Ends every open request with an error, now, even if the thread hangs in a step; nothing runs any more."""
        with self._lock:
            self._stopping = True
            self.failure = self.failure or failure
            abandoned = list(self._open)
            self._open.clear()
        self._inbox.put(lambda: None)
        for request in abandoned:
            request.sink(StepOutput(finish_reason=FinishReason.ERROR, error=self._why_stopped()))

    @property
    def has_died(self) -> bool:
        """True if the thread has ended although nobody asked it to."""
        return not self._thread.is_alive() and not self._stopping

    @property
    def num_open(self) -> int:
        """Requests submitted and not yet finished or aborted."""
        return len(self._open)

    @property
    def is_stepping(self) -> bool:
        """True while a step runs."""
        return self._is_stepping

    def load(self) -> EngineLoad:
        """Returns how busy the engine is; a snapshot, which the next step changes."""
        running = list(self._scheduler.running)
        room = self.config.max_num_seqs * self.config.max_model_len
        use = sum(request.num_computed for request in running) / room
        compiled, captured = self._made_before
        made = COMPILATIONS.count - compiled, COMPILATIONS.num_captured - captured
        return EngineLoad(len(running), self._scheduler.num_waiting, use, *made)

    def check(self, request: Request) -> None:
        """Checks that the request could run here. Errors: RequestError with the numbers."""
        self._adjuster.check(request.params)
        num_prompt, limit = len(request.prompt_ids), self.config.max_model_len
        if num_prompt == 0:
            raise RequestError("the prompt has no tokens")
        for token_id in (min(request.prompt_ids), max(request.prompt_ids)):
            if not 0 <= token_id < self.num_vocab:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {self.num_vocab} tokens")
        if num_prompt + request.params.max_tokens > limit:
            raise RequestError(
                f"{num_prompt} prompt tokens and {request.params.max_tokens} tokens to generate exceed the "
                f"maximum context of {limit} tokens"
            )

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes all of these requests, or none; they are one party in the scheduler's turns.

        Errors: RequestError, EngineOverloaded, EngineStopped.
        """
        for request in requests:
            self.check(request)
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise EngineStopped(self._why_stopped())
            if len(self._open) + len(requests) > self._max_num_open:
                raise EngineOverloaded(f"{len(self._open)} of at most {self._max_num_open} requests are open")
            self._open.update(requests)
            taken = tuple(requests)
            # One message: requests submitted together are admitted in one step, if they fit.
            self._inbox.put(lambda: self._add(taken))

    def abort(self, request: Request) -> None:
        """Drops a request, queued or running. It gets no more reports, apart from a step already under way."""
        self._inbox.put(lambda: self._close(request))

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._is_stepping = True
                self.num_steps += 1
                self._step_or_fail()
                self._is_stepping = False
        except BaseException:
            logger.exception("the engine's thread failed")
            self.failure = self.failure or "the engine's thread failed"
        finally:
            self._is_stepping = False
            with self._lock:
                self._stopping = True
                abandoned = list(self._open)
            for request in abandoned:
                self._fail(request, self._why_stopped())

    def _add(self, requests: Sequence[Request]) -> None:
        self._scheduler.add(*requests)
        for request in requests:
            self._adjuster.add(request)

    def _take_messages(self) -> bool:
        """Handles messages from other threads; sleeps while there is nothing to do. Returns False to stop."""
        while not self._stopping:
            try:
                handle = self._inbox.get(block=not self._scheduler.has_work)
            except queue.Empty:
                return True
            handle()
        return False

    def _step_or_fail(self) -> None:
        """Runs a step. If it fails, its requests fail with it, and only those."""
        planned = self._scheduler.schedule()
        chunks = [chunk for chunk in planned if chunk.request.cache is not None or self._prepare(chunk.request)]
        if not chunks:
            return
        self._adjuster.start(chunk.request for chunk in chunks if chunk.reaches_end)
        try:
            with torch.inference_mode():
                self.step(chunks)
        except Exception:
            logger.exception("a step of %d sequences failed", len(chunks))
            self._stop_if_device_is_lost()
            for chunk in chunks:
                self._fail(chunk.request, _STEP_FAILED if self.failure is None else self._why_stopped())

    def _stop_if_device_is_lost(self) -> None:
        """Ends the engine if the device computes nothing any more: CUDA's sticky errors fail every later call."""
        problem = device_problem(self.config.device)
        if problem is not None:
            logger.error("the device is lost: %s", problem)
            self.failure = "the device computes nothing any more"
            self._stopping = True

    def _why_stopped(self) -> str:
        return _STOPPED if self.failure is None else f"{_STOPPED}: {self.failure}"

    def _prepare(self, request: Request) -> bool:
        """Gives a newly admitted request its cache. Returns False, and ends the request, if it gets none."""
        try:
            request.cache = self._model.new_cache()
        except Exception:
            logger.exception("no cache for a request of %d tokens", request.num_tokens)
            self._stop_if_device_is_lost()
            self._fail(request, "there is no memory for this request" if self.failure is None else self._why_stopped())
            return False
        return True

    def step(self, chunks: list[ScheduledChunk]) -> None:
        """Runs the scheduled chunks: one forward, one token for each sequence that is due one."""
        if self._decoder is not None and all(chunk.num_tokens == 1 for chunk in chunks):
            self._decode(self._decoder, chunks)
            return
        batch, shares = build_batch(chunks, self.config.device)
        logits_RV = self._model.forward(batch)[:, : self.num_vocab]
        drawn = self._sample(logits_RV, shares)
        self._flags.note(batch.tables, [chunk.request for chunk in chunks])
        if any(share.is_answered for share in shares):
            self._flags.read()
        for share, one in zip(shares, drawn, strict=True):
            self._report(share, one, logits_RV)

    def _decode(self, decoder: Decoder, chunks: Sequence[ScheduledChunk]) -> None:
        """Runs a decode step, which chooses its tokens on the device.

        Most rows only extend an answer by a token, and are reported without a look at their logits.
        """
        requests = [chunk.request for chunk in chunks]
        done = decoder.step(step_rows(requests), self._adjuster.rows_of(requests))
        self._flags.read()
        tell_flagged(done.flagged, requests)
        for row, (request, token_id) in enumerate(zip(requests, done.token_ids, strict=True)):
            if token_id is None or request.needs_logits:
                self._report(
                    decode_share(row, chunks[row]), Drawn(token_id, float(done.logprobs_T[row])), done.logits_TV
                )
            elif request.params.num_logprobs is None:
                self._extend(request, token_id, plain_output(token_id))
            else:
                token = ScoredToken(token_id, float(done.logprobs_T[row]))
                self._extend(request, token_id, StepOutput(token=token))

    def _extend(self, request: Request, token_id: int, output: StepOutput) -> None:
        """Reports one more token of an answer."""
        request.output_ids.append(token_id)
        request.num_computed += 1
        output = request.with_end(output, self.end_token_ids)
        if output.finish_reason is not None:
            self._close(request)
        self._deliver(request, output)

    def _sample(self, logits_RV: torch.Tensor, shares: list[LogitsShare]) -> list[Drawn]:
        """Samples the next token of every share; without a token where none is due or none can be chosen."""
        due = {n: share.sample_row for n, share in enumerate(shares) if share.sample_row is not None}
        drawn = [Drawn()] * len(shares)
        if due:
            requests = [shares[n].chunk.request for n in due]
            rows, adjusted = [sample_row(one) for one in requests], self._adjuster.rows_of(requests)
            found = choose_tokens(logits_RV[list(due.values())], rows, adjusted)
            for n, token_id, logprob in zip(due, *found, strict=True):
                drawn[n] = Drawn(token_id, logprob)
        return drawn

    def _report(self, share: LogitsShare, drawn: Drawn, logits_RV: torch.Tensor) -> None:
        """Advances one request by its chunk and reports to it. An error here fails only this request."""
        request = share.chunk.request
        try:
            output = self._advance(share, drawn, logits_RV)
        except RowFailed as error:
            self._fail(request, str(error), error.non_finite)
            return
        if output.finish_reason is not None:
            self._close(request)
        if output != StepOutput():
            self._deliver(request, output)

    def _advance(self, share: LogitsShare, drawn: Drawn, logits_RV: torch.Tensor) -> StepOutput:
        request, params = share.chunk.request, share.chunk.request.params
        if request.flagged_layer is not None:
            raise NonFiniteIndexScores(request.flagged_layer)
        if share.sample_row is not None and drawn.token_id is None:
            raise no_token(request)
        num_top = params.num_logprobs or 0
        if share.scored_ids:
            rows = logits_RV[share.start : share.start + len(share.scored_ids)]
            request.scored_prompt += score_tokens(rows, share.scored_ids, num_top)
        token = None
        if share.sample_row is not None and drawn.token_id is not None:
            request.output_ids.append(drawn.token_id)
            token = ScoredToken(drawn.token_id)
            if params.num_logprobs is not None:
                row = logits_RV[share.sample_row : share.sample_row + 1]
                token = with_top(drawn.token_id, drawn.logprob, row, num_top)
        request.num_computed += share.chunk.num_tokens
        prompt: tuple[ScoredToken, ...] = ()
        if share.ends_prompt and params.prompt_logprobs:
            prompt = (ScoredToken(request.prompt_ids[0]), *request.scored_prompt)
        return request.with_end(StepOutput(prompt, token), self.end_token_ids)

    def _fail(self, request: Request, message: str, non_finite: NonFinite | None = None) -> None:
        self._close(request)
        output = StepOutput(finish_reason=FinishReason.ERROR, error=message, non_finite=non_finite)
        self._deliver(request, output)

    def _deliver(self, request: Request, output: StepOutput) -> None:
        """Calls the request's sink. If that fails, the request is dropped and the engine goes on."""
        try:
            request.sink(output)
        except Exception:
            logger.exception("a request's listener failed; the request is dropped")
            self._close(request)

    def _close(self, request: Request) -> None:
        self._scheduler.remove(request)
        self._adjuster.drop(request)
        if request.cache is not None:
            request.cache.release()
        request.cache = None
        with self._lock:
            self._open.discard(request)
