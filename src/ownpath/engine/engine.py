"""The engine: one thread that runs steps while there is work. Token ids in and out; it knows no text."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.config import EngineConfig
from ownpath.engine.adjust import Adjuster
from ownpath.engine.data_leading import DataLeadingModel
from ownpath.engine.decoder import Decoder
from ownpath.engine.device import device_problem
from ownpath.engine.draft_decoder import MOST_AHEAD
from ownpath.engine.drafting import Drafting, Drafts
from ownpath.engine.load import DraftCounts, EngineCounts, EngineLoad, Usage
from ownpath.engine.memory import RequestMemory
from ownpath.engine.places import WaitingPlaces
from ownpath.engine.prefix import PrefixCache
from ownpath.engine.prompt_graphs import prompts_of
from ownpath.engine.rank_memory import RankPrefixes, RanksMemory, most_running
from ownpath.engine.reports import Reporter
from ownpath.engine.request import ROOM_AHEAD, FinishReason, Request, RequestError, StepOutput
from ownpath.engine.retry import chunks_alone
from ownpath.engine.scheduler import ScheduledChunk, Scheduler
from ownpath.engine.steps import LanguageModel, StepRunner
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.ranks.peers import PeerLost, RanksDiffer

logger = logging.getLogger(__name__)

_STEP_FAILED = "the step that this request was part of failed"
_STOPPED = "the engine has stopped"
_NO_MEMORY = "there is no memory for this request"


def _memory_of(
    model: LanguageModel,
    release: Callable[[Request], None],
    prefix: PrefixCache | RankPrefixes | None,
    room_ahead: int,
) -> RequestMemory | RanksMemory:
    """Makes the memory of requests: of one rank's caches, or of those of ranks that have requests of their own."""
    if isinstance(model, DataLeadingModel):
        assert not isinstance(prefix, PrefixCache), "each rank has a prefix cache of its own"
        return model.memory(release, prefix, room_ahead)
    assert not isinstance(prefix, RankPrefixes), "the caches are one rank's"
    return RequestMemory(model, release, prefix, room_ahead)


class EngineStopped(RuntimeError):
    """The engine runs no more requests."""


class Engine:
    """Runs requests together, each with its own parameters, random stream and reports.

    model: runs steps by its ``forward``; one in ``PromptGraphs`` reads prompts in graphs.
    num_vocab: ids below it are tokens; embedding rows from there on are padding, never chosen or scored.
    max_num_queued: requests of a client that may wait beyond those that run, if no other client's do (``places``).
    end_token_ids: tokens that end an answer; ``None``: those of the model's config.json alone.
    decoder: runs the steps in which every request has one row; ``None``: the model's ``forward`` runs all steps.
    prefix: what the model's caches hold of earlier requests; ``None``: every request computes its whole prompt.
    drafts: runs steps with drafts, and the policy that says which; ``None``: none has any.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        num_vocab: int,
        max_num_queued: int = 256,
        end_token_ids: Iterable[int] | None = None,
        decoder: Decoder | None = None,
        prefix: PrefixCache | RankPrefixes | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        if not 0 < num_vocab <= model.config.vocab_size:
            raise ValueError(f"{num_vocab} tokens do not fit the model's vocab_size {model.config.vocab_size}")
        self.config = config
        self.num_vocab = num_vocab
        self.end_token_ids = frozenset(model.config.eos_token_id if end_token_ids is None else end_token_ids)
        self._adjuster = Adjuster(num_vocab, torch.device(config.device), self.end_token_ids)
        self._decoder = decoder
        self._places = WaitingPlaces(most_running(config), max_num_queued)
        self._reporter = Reporter(self.end_token_ids, self._close)
        self._drafting = None if drafts is None else Drafting(drafts, self._reporter, config.device)
        self.prompt_graphs = prompts_of(model)
        """Graphs that prompts are read in; ``None``: there are none."""
        self._graphs = decoder, None if drafts is None else drafts.decoder, self.prompt_graphs
        run = config.device, num_vocab, self._adjuster, self._reporter, self._drafting
        self._runner = StepRunner(model, decoder, *run)
        room_ahead = ROOM_AHEAD if drafts is None else MOST_AHEAD
        self._memory = _memory_of(model, self._runner.release, prefix, room_ahead)
        self._scheduler = Scheduler(most_running(config), config.max_prefill_tokens, self._memory)
        self._planned: list[ScheduledChunk] = []
        self._open: set[Request] = set()
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = False
        self._is_stepping = False
        self._made_before = (COMPILATIONS.count, COMPILATIONS.num_captured)
        self.prefix = prefix
        self.counts = EngineCounts() if prefix is None else prefix.counts
        self.num_steps = 0
        """Turns of the engine's thread so far: each begins a step or reads the last one."""
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
        slots = self._memory.slots
        use = sum(request.num_computed for request in running) / (slots.num_blocks * BLOCK_TOKENS)
        blocks = Usage(slots.num_blocks - slots.num_free_blocks - slots.num_idle_blocks, slots.num_blocks)
        taken = Usage(slots.num_slots - slots.num_free_slots, slots.num_slots)
        compiled, captured = self._made_before
        drafting = self._drafting
        replays = sum(one.num_replays for one in self._graphs if one is not None)
        made = COMPILATIONS.count - compiled, COMPILATIONS.num_captured - captured, replays
        waiting, counts = self._scheduler.num_waiting, self.counts
        drafts = DraftCounts() if drafting is None else drafting.counts
        return EngineLoad(len(running), waiting, use, *made, blocks, taken, counts, self._runner.times, drafts)

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
        self._memory.check(request)

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes all of these requests, or none; they are one party in the scheduler's turns.

        Errors: RequestError, EngineOverloaded, EngineStopped.
        """
        for request in requests:
            self.check(request)
            if self.prefix is not None:
                self.prefix.name(request)
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise EngineStopped(self._why_stopped())
            self._places.check(self._open, requests)
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
            with torch.inference_mode():
                while self._take_messages():
                    self._is_stepping = True
                    self.num_steps += 1
                    self._step_or_fail()
                    self._is_stepping = False
        except BaseException as error:
            logger.exception("the engine's thread failed")
            self.failure = self.failure or (str(error) if isinstance(error, PeerLost) else "the engine's thread failed")
        finally:
            self._is_stepping = False
            with self._lock:
                self._stopping = True
                abandoned = list(self._open)
            self._runner.abandon()
            for request in abandoned:
                self._reporter.fail(request, self._why_stopped())

    def _add(self, requests: Sequence[Request]) -> None:
        self._scheduler.add(*requests)
        for request in requests:
            self._adjuster.add(request)

    def _take_messages(self) -> bool:
        """Handles messages from other threads; sleeps while there is nothing to do. Returns False to stop."""
        while not self._stopping:
            is_idle = not self._scheduler.has_work and not self._runner.is_flying
            if is_idle:
                self._runner.times.pause()
            try:
                handle = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            handle()
        return False

    def _step_or_fail(self) -> None:
        """Runs a step, and reads the one before. If one fails, its requests are run again one by one: only those fail
        whose own step does."""
        chunks: list[ScheduledChunk] = []
        try:
            if self._scheduler.is_short:
                self._runner.settle()  # who ends there makes room, and who is sent back has no row that runs
            chunks = self._schedule()
            self._note(chunks)
            self._runner.step(chunks)
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(chunks))
            affected = [*self._runner.abandon(), *chunks]
            if not affected:
                raise
            self._stop_if_lost(error)
            self._run_one_by_one(affected)

    def _run_one_by_one(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Runs what failed together again, each request by itself; none if the engine stops."""
        most = self.config.max_prefill_tokens
        for request, num_tokens in dict(chunks).items():
            if request not in self._open or request.cache is None:
                continue
            try:
                if self.failure is None:
                    self.counts.num_step_retries += 1
                    for chunk in chunks_alone(request, num_tokens, most, self._memory):
                        self.num_steps += 1
                        self._note([chunk])
                        self._runner.step_alone(chunk)
            except Exception as error:
                logger.exception("a step of a request of %d tokens failed by itself", request.num_tokens)
                self._runner.abandon()
                self._stop_if_lost(error)
                self._reporter.fail(request, _STEP_FAILED if self.failure is None else self._why_stopped())
        if self.failure is not None:
            for request in dict(chunks):
                if request in self._open:
                    self._reporter.fail(request, self._why_stopped())

    def _stop_if_lost(self, error: Exception | None = None) -> None:
        """Ends the engine if ranks have come apart by this error, or if the device computes nothing any more: CUDA's
        sticky errors fail every later call."""
        if isinstance(error, PeerLost | RanksDiffer):
            self.failure = self.failure or str(error)
            self._stopping = True
            return
        problem = device_problem(self.config.device)
        if problem is not None:
            logger.error("the device is lost: %s", problem)
            self.failure = "the device computes nothing any more"
            self._stopping = True

    def _why_stopped(self) -> str:
        return _STOPPED if self.failure is None else f"{_STOPPED}: {self.failure}"

    def _schedule(self) -> list[ScheduledChunk]:
        """Plans a step, and ends requests for which there is no memory."""
        planned = self._scheduler.schedule()
        if planned and planned is self._planned:
            return planned  # all have memory, and a row each
        self._planned = planned
        self.counts.num_preempted = self._scheduler.num_preempted
        unfit = [chunk.request for chunk in planned if chunk.request.cache is None]
        if unfit:
            self._stop_if_lost()
        elif not planned and not self._runner.is_flying and (stuck := self._scheduler.find_unfit()) is not None:
            unfit = [stuck]
        for request in unfit:
            self._reporter.fail(request, _NO_MEMORY if self.failure is None else self._why_stopped())
            planned = [chunk for chunk in planned if chunk.request.cache is not None]
        return self._runner.in_rows(planned)

    def _note(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Has the prefix cache take up what the requests of the next step have filled."""
        if self.prefix is not None:
            self.prefix.note([chunk.request for chunk in chunks])

    def _close(self, request: Request) -> None:
        self._scheduler.remove(request)
        self._adjuster.drop(request)
        with self._lock:
            self._open.discard(request)
