"""V12: the engine drafts with the real module behind a made-up backbone, and every step of it is looked at.

The backbone's place has a target that draws what a script says: the guess at some positions, another token at others,
so that steps of every outcome follow each other. Its streams are the reference's of the text, whatever the tokens are.
Engine, steps with drafts, sampler, caches and module are those of serving; two requests of different lengths run beside
each other, over the window's end. What must hold is known of each row: it reads the answer's token at its position; the
answer has the tokens that the target drew; a guess counts if it is that token; and the module's streams are those of
one forward over the whole text, at the rows that count.
"""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.engine.draft_decoder import ROWS, DraftDecoder
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.finding import Finding, Verdict
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Hidden
from ownpath.model.model import Model, Verified
from ownpath.verify.layers.measure import ROW_FACTOR, row_distances
from ownpath.verify.layers.module import Module

PROMPTS, ANSWERS, CHUNK = (139, 61), (24, 30), 64
"""Tokens of each request's prompt and answer, and the most that one step reads: the first one's window is full."""
WAIT_S = 600
_REMEDY = "engine/draft_decoder, its kernels (kernels/drafts), or the module's window in the caches"


class GuessedRow(NamedTuple):
    """A row that the module has run. token_id: of the row; next_id: behind it. guess: the likeliest by its logits,
    ``None`` where none were computed."""

    slot: int
    position: int
    token_id: int
    next_id: int
    streams_SD: torch.Tensor
    guess: int | None


class VerifiedRow(NamedTuple):
    """A row that the target has run in a step with drafts. drawn: its token; guess: the request's in this step."""

    slot: int
    position: int
    token_id: int
    drawn: int
    guess: int
    is_first: bool


@dataclass
class Heard:
    """The module, whose last hidden is kept."""

    mtp: Any
    last: Hidden | None = None

    def hidden(self, *given: Any) -> Hidden:
        """See ``Mtp``."""
        self.last = self.mtp.hidden(*given)
        return self.last

    def decode(self, *given: Any) -> Hidden:
        """See ``Mtp``."""
        self.last = self.mtp.decode(*given)
        return self.last


@dataclass
class ScriptedTarget:
    """A model whose backbone is a script, and whose module is real. streams_TSD: of every position."""

    model: Model
    heard: Heard
    streams_TSD: torch.Tensor
    module_rows: list[GuessedRow] = field(default_factory=list)
    target_rows: list[VerifiedRow] = field(default_factory=list)
    first_ids: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, streams_TSD: torch.Tensor) -> "ScriptedTarget":
        """Puts the model's module behind a script."""
        heard: Any = Heard(model.drafts[0])
        return cls(replace(model, drafts=(heard,)), heard, streams_TSD)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def drawn_at(self, position: int, guess: int) -> int:
        """Returns the token that is drawn at a position: the guess three times of five."""
        return guess if position % 5 in (0, 1, 3) else (guess + 1 + position) % self.model.config.vocab_size

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See ``Model.forward``."""
        logits_RV = self._one_hot([self.drawn_at(at + 1, at) for at in batch.positions_T[batch.logits_ids].tolist()])
        batch.tables.extend()
        return logits_RV

    def forward_drafting(self, batch: ForwardBatch) -> tuple[torch.Tensor, Hidden]:
        """See ``Model.forward_drafting``."""
        firsts = zip(batch.tables.slots, batch.tables.starts, batch.tables.rows, strict=True)
        self.first_ids |= {slot: int(batch.token_ids_T[rows.start]) for slot, start, rows in firsts if not start}
        return self.forward(batch), self._hidden(batch.positions_T)

    def draft_forward(
        self, hidden: Hidden, next_ids_T: torch.Tensor, batch: ForwardBatch, rows_R: torch.Tensor
    ) -> torch.Tensor:
        """See ``Model.draft_forward``."""
        logits_RV = self.model.draft_forward(hidden, next_ids_T, batch, rows_R)
        pairs = zip(batch.tables.slots, batch.tables.rows, strict=True)
        slots = [slot for slot, rows in pairs for _ in range(rows.start, rows.stop)]
        guesses = dict(zip(rows_R.tolist(), logits_RV.argmax(-1).tolist(), strict=True))
        self._keep(slots, batch.positions_T, batch.token_ids_T, next_ids_T, guesses)
        return logits_RV

    def verify(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> Verified:
        """See ``Model.verify``."""
        assert self.model.paged is not None
        step, tokens = self.model.paged.prepare_decode(tables), token_ids_T.tolist()
        positions, slots, drawn = tables.positions_T.tolist(), tables.slots_T.tolist(), []
        for row, (token_id, at, slot) in enumerate(zip(tokens, positions, slots, strict=True)):
            is_first, guess = row % ROWS == 0, max(tokens[row - row % ROWS + 1], 0)
            drawn.append(self.drawn_at(at + 1, guess if is_first else at))
            if token_id >= 0:
                self.target_rows.append(VerifiedRow(slot, at, token_id, drawn[-1], guess, is_first))
        self._read = slots, torch.tensor(positions), torch.tensor(tokens)
        return Verified(self._one_hot(drawn), self._hidden(tables.positions_T), step)

    def guess(self, verified: Verified, next_ids_T: torch.Tensor) -> torch.Tensor:
        """See ``Model.guess``."""
        logits_TV = self.model.guess(verified, next_ids_T)
        self._keep(*self._read, next_ids_T, dict(enumerate(logits_TV.argmax(-1).tolist())))
        return logits_TV

    def _hidden(self, positions_T: torch.Tensor) -> Hidden:
        streams_TSD = self.streams_TSD[positions_T.long()]
        return Hidden(streams_TSD, streams_TSD[:, 0])

    def _one_hot(self, ids: Sequence[int]) -> torch.Tensor:
        device = self.streams_TSD.device
        logits_TV = torch.zeros(len(ids), self.model.config.vocab_size, device=device)
        return logits_TV.scatter_(1, torch.tensor(ids, dtype=torch.int64, device=device)[:, None], 9.0)

    def _keep(
        self,
        slots: Sequence[int],
        positions_T: torch.Tensor,
        token_ids_T: torch.Tensor,
        next_ids_T: torch.Tensor,
        guesses: dict[int, int],
    ) -> None:
        assert self.heard.last is not None
        columns = positions_T.tolist(), token_ids_T.tolist(), next_ids_T.tolist(), self.heard.last.streams_TSD
        for row, (slot, at, token_id, next_id, streams_SD) in enumerate(zip(slots, *columns, strict=True)):
            if token_id >= 0:
                self.module_rows.append(GuessedRow(slot, at, token_id, next_id, streams_SD, guesses.get(row)))


class Ahead(DraftDecoder):
    """A decoder whose steps follow each other from what the device has, as graphs do, though each runs eagerly."""

    def has_graph(self, num_requests: int) -> bool:
        """Returns True: a step may be launched before the one before is read."""
        return True


class Always(DraftPolicy):
    """Drafts in every step that may."""

    def drafts(self, num_requests: int) -> bool:
        """Returns True."""
        return True


@dataclass(frozen=True)
class DraftedRun:
    """Two drafted answers. texts: prompt and answer by the slot of the request. num_right: guesses that the engine has
    counted as right. faults: of the caches' books afterwards."""

    target: ScriptedTarget
    texts: dict[int, list[int]]
    num_right: int
    faults: list[str]


def drafted_run(module: Module, model: Model) -> DraftedRun:
    """Answers two requests by an engine that drafts in every step. Errors: RuntimeError of a request that fails."""
    vocab, dtype, device = model.config.vocab_size, model.cache_spec.dtype, model.cache_spec.device
    target = ScriptedTarget.of(model, module.streams_TSD.to(dtype))
    config = EngineConfig(str(device), dtype, model.cache_spec.max_tokens, len(PROMPTS), max_prefill_tokens=CHUNK)
    config = replace(config, graphs=False, loads_draft=True, rows_per_request=ROWS)
    served: Any = target
    drafts = Drafts(served, Ahead(served, len(PROMPTS), vocab), Always())
    engine = Engine(served, config, vocab, end_token_ids=(), drafts=drafts)
    prompts = [[(3 + 7 * n + 11 * at * at) % vocab for at in range(count)] for n, count in enumerate(PROMPTS)]
    engine.start()
    try:
        heard = [_ask(engine, ids, count) for ids, count in zip(prompts, ANSWERS, strict=True)]
        answers = [_answer(one) for one in heard]
    finally:
        engine.stop()
    by_first = {ids[0]: [*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)}
    texts = {slot: by_first[first] for slot, first in target.first_ids.items()}
    return DraftedRun(target, texts, engine.load().drafts.num_right, model.caches.slots.faults())


def _ask(engine: Engine, ids: list[int], num_tokens: int) -> "queue.SimpleQueue[StepOutput]":
    heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine.submit([Request(ids, SamplingParams(num_tokens, temperature=0.0), heard.put)])
    return heard


def _answer(heard: "queue.SimpleQueue[StepOutput]") -> list[int]:
    ids: list[int] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        if output.error is not None:
            raise RuntimeError(output.error)
        ids += [] if output.token is None else [output.token.token_id]
        if output.finish_reason is not None:
            return ids


def check_drafting(module: Module, model: Model) -> Finding:
    """V12 of one module: the first thing that is wrong, of those that decide what follows first."""
    run = drafted_run(module, model)
    for found in (_wrong_rows, _wrong_answers, _wrong_counts, _wrong_guesses):
        message = next(found(run), "")
        if message:
            return Finding("V12", module.name, Verdict.FAIL, message, 1, "none", _REMEDY)
    return _check_streams(module, model, run)


def _wrong_rows(run: DraftedRun) -> Iterator[str]:
    """Rows that read another token than the answer has there: a step went on from a wrong place."""
    for row in run.target.target_rows:
        text, at = run.texts[row.slot], row.position
        if row.is_first and at < len(text) and row.token_id != text[at]:
            yield f"a step reads token {row.token_id} at position {at}, where the answer has {text[at]}"
    for slot, text in run.texts.items():
        read = {row.position for row in run.target.module_rows if row.slot == slot}
        missing = [at for at in range(len(text) - 1) if at not in read]
        if missing:
            yield f"the module has not read position {missing[0]}, and {len(missing) - 1} others"


def _wrong_answers(run: DraftedRun) -> Iterator[str]:
    """Tokens of an answer that the target did not draw behind the token before."""
    for row in run.target.target_rows:
        text, at = run.texts[row.slot], row.position
        if at + 1 < len(text) and row.token_id == text[at] and row.is_first and row.drawn != text[at + 1]:
            yield f"the answer has token {text[at + 1]} at position {at + 1}, where the target drew {row.drawn}"


def _wrong_counts(run: DraftedRun) -> Iterator[str]:
    """Guesses that are right and do not count, or count and are not right; books of the caches that disagree."""
    right = sum(row.drawn == row.guess for row in run.target.target_rows if row.is_first)
    if run.num_right != right:
        yield f"{run.num_right} guesses count as right, {right} are the token drawn"
    yield from run.faults


def _wrong_guesses(run: DraftedRun) -> Iterator[str]:
    """Guesses that are not the module's likeliest token behind the last row that counts."""
    guesses = {(row.slot, row.position, row.next_id): row.guess for row in run.target.module_rows}
    for row in run.target.target_rows:
        wanted = guesses.get((row.slot, row.position - 1, row.token_id))
        if row.is_first and wanted is not None and row.guess != wanted:
            yield f"the guess of position {row.position + 1} is {row.guess}, the module's likeliest token {wanted}"


def _check_streams(module: Module, model: Model, run: DraftedRun) -> Finding:
    """The module's streams at the rows that count, beside those of one forward over each text."""
    budget, worst, place, num_rows = module.oracle.budget("out"), 0.0, "", 0
    for slot, text in run.texts.items():
        rows = [row for row in run.target.module_rows if row.slot == slot and _counts(row, text)]
        wanted_TSD = _one_forward(module, model, text)[[row.position for row in rows]]
        gap_T = row_distances(torch.stack([row.streams_SD for row in rows]), wanted_TSD)
        at, num_rows = int(gap_T.argmax()), num_rows + len(rows)
        if float(gap_T[at]) >= worst:
            worst, place = float(gap_T[at]), f"position {rows[at].position}"
    allowed = 2 * ROW_FACTOR * budget
    right, steps = run.num_right, sum(row.is_first for row in run.target.target_rows)
    message = f"{steps} guesses verified, {right} right; {num_rows} rows of the module as in one forward, "
    message += f"the furthest {worst:.1e} away, {place}"
    words = f"{allowed:.1e}: twice 8 budgets of a layer's output"
    return Finding.judged("V12", module.name, worst <= allowed, message, worst, words, _REMEDY)


def _counts(row: GuessedRow, text: Sequence[int]) -> bool:
    return row.position + 1 < len(text) and [row.token_id, row.next_id] == [*text[row.position : row.position + 2]]


def _one_forward(module: Module, model: Model, text: Sequence[int]) -> torch.Tensor:
    device, cache = model.cache_spec.device, model.new_cache()
    batch = ForwardBatch.of([(text[:-1], cache)], device)
    streams_TSD = module.streams_TSD[: len(text) - 1].to(model.cache_spec.dtype)
    next_ids_T = torch.tensor(text[1:], dtype=torch.int64, device=device)
    found = model.drafts[0].hidden(Hidden(streams_TSD, streams_TSD[:, 0]), next_ids_T, batch)
    cache.release()
    return found.streams_TSD
