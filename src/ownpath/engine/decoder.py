"""Decode steps on a GPU: each request has a row of arrays that live on the device, and a step is a captured graph.

A step of n rows runs in the smallest bucket of at least n rows. The rest is padded: a negative token, nobody's slot.
The graph reads token, position, slot and block table of each row, runs the model, chooses the next token, and writes
token and position back, so that the next step of the same requests needs nothing from the host. The host uploads the
arrays when other requests take the rows, and reads tokens.

A step is begun, and read later: meanwhile the next one may be begun, so that the device has work while the host reads.
Rows of the next step that go on from tokens which nobody has read name them (``rows.unread``), and the device puts them
in. Example, rows A and B, of which A has ended:

    begin A B           graph 1
    begin A B           graph 2, nothing uploaded
    finish the first    A's token ends its answer; its row in graph 2 is one too many
    begin C B           upload; B's token is the one that row 1 of graph 2 draws; graph 3
    finish the second   only B's token is of use

Where logits change before a token is chosen (``adjust``), the step is begun like any other. Its rows are drawn again
(``redraw``) when the tokens before it are known, while its graph runs:

    begin A B           graph 1
    begin A B           graph 2
    finish the first    A's and B's tokens, from which A's grammar goes on
    redraw              behind graph 2; the next graph goes on from what this draws

Without graphs the same step runs eagerly, in the same buckets, with the same bits.

Legend: T rows of a step, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch

from ownpath.cache.pools import CachePool
from ownpath.cache.tables import DecodeTables
from ownpath.config import EngineConfig
from ownpath.engine.graphs import StepGraphs, no_graph_of
from ownpath.engine.rows import (
    NO_ROWS,
    HeldRows,
    ResidentRows,
    RowArrays,
    Staged,
    StepResults,
    StepRows,
    StepTokens,
)
from ownpath.engine.sampler import adjusted_kinds, sampler_of
from ownpath.engine.tops import PendingTops, read_tops, start_tops
from ownpath.kernels.sample.types import SampleRows
from ownpath.terminal.console import tell
from ownpath.terminal.progress import Progress
from ownpath.trace import Ledger

NOTHING: Mapping[int, int] = MappingProxyType({})


class DecodingModel(Protocol):
    """The model as a decoder uses it."""

    @property
    def caches(self) -> CachePool: ...

    @property
    def ledger(self) -> Ledger: ...

    @property
    def decodes(self) -> bool: ...

    def decode(self, token_ids_T: torch.Tensor, tables: DecodeTables) -> torch.Tensor: ...


OfRow = TypeVar("OfRow")


@dataclass
class StepBegun:
    """A step that is launched and not read. turn: the buffers of its results. num_tops: row -> number of its
    likeliest tokens. Once it is launched its logits are there, and what is on the way of those tokens.

    is_open: its rows are still to be drawn again. count: the bucket that runs it. places: of the rows in arrays and
    logits; ``None``: they are the first ones, in order.
    """

    num_rows: int
    turn: int
    num_tops: Mapping[int, int] = field(default_factory=dict)
    is_open: bool = False
    logits_TV: torch.Tensor = field(init=False)
    tops: PendingTops | None = None
    count: int = 0
    places: Sequence[int] | None = None

    def place_of(self, row: int) -> int:
        """Returns a row's place."""
        return row if self.places is None else self.places[row]

    def placed(self, values: Sequence[OfRow]) -> Sequence[OfRow | None]:
        """Returns a value of each row at its place, and ``None`` between them."""
        if self.places is None:
            return values
        found: list[OfRow | None] = [None] * (max(self.places) + 1)
        for place, value in zip(self.places, values, strict=True):
            found[place] = value
        return found


class Decoder(StepGraphs):
    """Runs decode steps of up to ``max_rows`` requests. num_vocab: ids below it are tokens. num_parts: of the arrays,
    each with as many rows as a bucket has."""

    num_parts = 1

    def __init__(self, model: DecodingModel, max_rows: int, num_vocab: int) -> None:
        super().__init__(model, max_rows, num_vocab)
        self._model, device = model, self.pool.spec.device
        self._rows = RowArrays(self.num_parts * max_rows, self.pool.blocks_per_sequence, device)
        self._sampler, self._sampler_operand = sampler_of(device)
        self._results = StepResults(self.pool, self.num_parts * max_rows)
        self._following = self._results.following(self._rows.columns)
        self._last: StepBegun | None = None
        self._held: HeldRows | None = None

    def pad(self) -> None:
        """See ``StepGraphs``."""
        self.upload(NO_ROWS)

    def warm_up_rest(self, logits_TV: torch.Tensor) -> None:
        """Draws a row again in every way there is."""
        for rows in adjusted_kinds(self.num_vocab, self.pool.spec.device):
            self._sample(logits_TV, rows)

    def step(self, rows: StepRows, adjusted: SampleRows | None = None) -> StepTokens:
        """Runs a step of at least one row and extends the rows' caches by one token; see ``begin`` and ``redraw``."""
        begun = self.begin(rows, is_open=adjusted is not None)
        if begun.is_open:
            self.redraw(begun, adjusted)
        return self.finish(begun)

    def begin(self, rows: StepRows, tops: Mapping[int, int] = NOTHING, is_open: bool = False) -> StepBegun:
        """Launches a step of at least one row and extends the rows' caches by one token. Does not wait; at most one
        other step may be unread.

        tops: row -> number of its likeliest tokens that the results are to have. is_open: ``redraw`` follows, before
        this step is finished and before another one is begun.
        """
        lengths, slots = self.pool.slots.lengths, [cache.slot for cache in rows.caches]
        positions, held = [lengths[slot] for slot in slots], self._held
        wanted = ResidentRows(slots, [cache.blocks for cache in rows.caches], positions, *rows[1:])
        next_held = HeldRows(rows.caches, wanted)
        assert next_held.num_left > 0, "a row has no room"
        self._held = None  # as a turn without a step leaves the device behind
        begun = StepBegun(rows.num_rows, self._take_turn(), tops, is_open)
        begun.count, begun.places = self.place(rows)
        staged = self._stage(rows, begun) if held is None or not wanted.continues(held.rows()) else None
        return self._begin(next_held, begun, staged)

    def _stage(self, rows: StepRows, begun: StepBegun) -> Staged:
        return self._rows.stage(rows, begun.turn)

    def place(self, rows: StepRows) -> tuple[int, list[int] | None]:
        """Returns the bucket that runs these rows, and the places that they have in it; see ``StepBegun``."""
        return self._bucket_of(rows.num_rows), None

    @property
    def can_repeat(self) -> bool:
        """True if the rows of the last step may run once more as they are."""
        return self._held is not None and self._held.are_those_of(self.pool)

    def repeat(self, is_open: bool = False) -> StepBegun:
        """Launches the rows of the last step once more, as ``begin`` does: each goes on from its own token, and as many
        of its likeliest tokens are wanted."""
        held, last = self._held, self._last
        assert held is not None
        assert last is not None
        assert held.num_left > 0, "a row has no room"
        begun = StepBegun(last.num_rows, self._take_turn(), last.num_tops, is_open)
        begun.count, begun.places = last.count, last.places
        return self._begin(held, begun, None)

    def redraw(self, begun: StepBegun, adjusted: SampleRows | None) -> None:
        """Draws rows of an open step again, behind its graph and before anything reads their tokens. Does not wait.
        adjusted: these rows, with their places in the step; ``None``: none of them, after all."""
        assert begun.is_open
        begun.is_open = False
        self._marks[begun.turn] = self._enqueue(lambda: self._launch_redraw(begun, adjusted), begun.turn)

    def _begin(self, held: HeldRows, begun: StepBegun, staged: Staged | None) -> StepBegun:
        self._held = None  # until the step is launched: one that fails leaves rows that nobody knows
        assert self._last is None or not self._last.is_open or not self._num_unread, "the step before is open"
        lengths, turn = self.pool.slots.lengths, begun.turn
        self._marks[turn] = self._enqueue(lambda: self._launch_whole(begun, begun.count, staged), turn)
        held.advance()
        for slot, position in zip(held.first.slots, held.positions, strict=True):
            lengths[slot] = position
        self._held, self._num_unread, self._last = held, self._num_unread + 1, begun
        return begun

    def finish(self, begun: StepBegun) -> StepTokens:
        """Waits for the oldest unread step and returns its results."""
        assert not begun.is_open
        self._marks[begun.turn].wait()
        tokens, results = self._results.read(begun.turn, begun.num_rows, begun.logits_TV, begun.places)
        self._num_unread -= 1
        if begun is self._last and self._held is not None:
            self._held.token_ids = tokens
        if begun.tops is None:
            return results
        found = read_tops(begun.tops)
        return results._replace(tops={row: found[begun.place_of(row)] for row in begun.num_tops})

    def forget(self) -> None:
        """Gives unread steps up: nobody will read them, and nothing goes on from their rows."""
        self._num_unread, self._held = 0, None
        self._rows.forget()

    def upload(self, rows: StepRows) -> None:
        """Uploads rows for ``launch`` and ``run``, whatever the device holds."""
        turn = self._take_turn()
        self._held, staged = None, self._rows.stage(rows, turn)
        self._marks[turn] = self._enqueue(lambda: self._rows.send(staged, self._results.drawn_R), turn)

    def _launch_whole(self, begun: StepBegun, count: int, staged: Staged | None) -> None:
        """Launches a step: upload, bucket, and likeliest tokens, unless rows are still to be drawn again."""
        if staged is not None:
            self._rows.send(staged, self._results.drawn_R)
        begun.logits_TV = self.launch(count)
        if not begun.is_open:
            self._launch_tops(begun)

    def _launch_redraw(self, begun: StepBegun, adjusted: SampleRows | None) -> None:
        """Launches the second draw, and what follows it."""
        if adjusted is not None:
            self._sample(begun.logits_TV, adjusted)
        self._launch_tops(begun)

    def _launch_tops(self, begun: StepBegun) -> None:
        """Launches the pass for likeliest tokens, if rows want some."""
        if begun.num_tops:
            wanted = {begun.place_of(row): count for row, count in begun.num_tops.items()}
            begun.tops = start_tops(begun.logits_TV, wanted)

    def run(self, count: int) -> torch.Tensor:
        """Runs the first ``count`` rows eagerly: the model, and a token for each, with the arrays for the next step."""
        tokens_T = self._rows.columns.tokens[:count]
        tables = self._rows.tables(self.pool, count, self._results.flags(count))
        logits_TV = self._model.decode(tokens_T, tables)[:, : self.num_vocab]
        self._sample(logits_TV, self._rows.sample_rows(count))
        return logits_TV

    def _sample(self, logits_TV: torch.Tensor, rows: SampleRows) -> None:
        """Draws tokens, and leaves the rows as the next step finds them and the results where the host does."""
        out = self._results.sampled(len(logits_TV))
        self._sampler.run(logits_TV.float(), rows, self._sampler_operand, out=out, following=self._following)


AnyDecoder = TypeVar("AnyDecoder", bound=StepGraphs)


def make_decoder(model: DecodingModel, engine: EngineConfig, num_vocab: int) -> Decoder | None:
    """Makes the decoder of a model on a GPU, ready for its first step.

    ``None`` on a CPU, and where no decode step is planned.
    """
    return prepared(model, engine, lambda: Decoder(model, engine.max_num_seqs, num_vocab))


def prepared(model: DecodingModel, engine: EngineConfig, make: Callable[[], AnyDecoder]) -> AnyDecoder | None:
    """Makes a decoder as ``make`` does, and captures its graphs if the engine wants them; else runs every bucket.

    ``None`` as ``make_decoder``. Says why there are no graphs where a kernel rules them out.
    """
    if torch.device(engine.device).type != "cuda" or not model.decodes:
        return None
    decoder = make()
    without = no_graph_of(model.ledger)
    if engine.graphs and without is not None:
        tell("decode steps run without graphs", f": {without}")
    captures = engine.graphs and without is None
    with Progress("capturing graphs" if captures else "warming up decode steps") as progress, torch.inference_mode():
        (decoder.capture if captures else decoder.warm_up)(progress)
    return decoder
