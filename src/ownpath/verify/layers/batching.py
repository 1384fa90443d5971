"""Runs the same tokens through one layer in other batches: in chunks, again, beside others. The result must not change.

The reference's streams enter the layer, as in the comparison with the reference; every other run is compared with the
one shot of that comparison. Other batches sum in another order. A row that therefore chose other experts or entries, at
a near tie, is left out: its output differs rightly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import SequenceCache
from ownpath.finding import Finding
from ownpath.model.block import Residual
from ownpath.verify.layers.activations import Activations
from ownpath.verify.layers.choices import RunChoices
from ownpath.verify.layers.measure import ROW_FACTOR, row_distances
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.layers.single_layer import SequenceRows, SingleLayer
from ownpath.verify.layers.teacher_forcing import LayerComparison

_CHUNKS = (5, 1, 127, 3, 64)
"""Sizes of a prompt's first chunks; two halves of the rest follow."""
_NUM_FIRST, _NUM_LAST = 9, 12
"""Tokens read one by one, at the start and after a prompt: across windows of 4, and across one of 128."""
_NUM_SHORT = 139
"""Tokens of a sequence that shares its step with others."""
_NUM_SAME = 4
"""Number of identical sequences in one step."""
_REMEDY_CACHE = "the layer's caches: what is written at which place, and what a step reads back"
_REMEDY_FRESH = "a cache or a workspace that keeps what an earlier run left there"
_REMEDY_BATCH = "a kernel that mixes rows of one step, or a workspace that two sequences share"


@dataclass(frozen=True)
class SequenceRun:
    """A sequence's first rows: streams after the layer, and their choices."""

    out_TSD: torch.Tensor
    choices: RunChoices


@dataclass(frozen=True)
class Batching:
    """One layer, its input, and its one shot."""

    single: SingleLayer
    oracle: Oracle
    entering_TSD: torch.Tensor
    one_shot: LayerComparison

    def findings(self) -> Iterator[Finding]:
        """Checks V05, V08 and V09 of this layer."""
        chunks = self.in_steps(self._chunk_sizes(), self.single.new_cache())
        yield self._check_chunks(chunks)
        yield self._check_repeat(chunks)
        yield from self._check_neighbours()

    def in_steps(self, sizes: list[int], cache: SequenceCache) -> SequenceRun:
        """Reads the text's first tokens in steps of these sizes."""
        seen, parts, start = Activations(self.single.specs), [], 0
        for size in sizes:
            residual = self.single.step([self._chunk(start, start + size, cache)], seen)
            parts.append(self.single.streams(residual))
            start += size
        return SequenceRun(torch.cat(parts), self.one_shot.scores.judge(seen, self.single.index_keys(cache)))

    def _chunk(self, start: int, stop: int, cache: SequenceCache) -> SequenceRows:
        return SequenceRows(self.oracle.token_ids[start:stop], Residual(self.entering_TSD[start:stop]), cache)

    def _chunk_sizes(self) -> list[int]:
        sizes, left = [], len(self.entering_TSD)
        for size in _CHUNKS:
            if left > size:
                sizes.append(size)
                left -= size
        return [*sizes, *(size for size in (left // 2, left - left // 2) if size)]

    def _check_chunks(self, chunks: SequenceRun) -> Finding:
        """V05: chunks, and token by token at both ends."""
        num_tokens = len(self.entering_TSD)
        first = self.in_steps([1] * min(_NUM_FIRST, num_tokens), self.single.new_cache())
        num_last = min(_NUM_LAST, num_tokens - 1)
        last = self.in_steps([num_tokens - num_last, *[1] * num_last], self.single.new_cache())
        runs = {"in chunks": chunks, "token by token from the start": first, "token by token behind a prompt": last}
        seen = [self._compare(name, run) for name, run in runs.items()]
        return self._verdict("V05", seen, _REMEDY_CACHE)

    def _check_repeat(self, chunks: SequenceRun) -> Finding:
        """V08: the chunks once more, in a reused process and in caches full of NaN, bit by bit."""
        cache = self.single.new_cache()
        for memory in cache.views():
            memory.view(torch.uint8).fill_(NAN_BYTE)
        again = self.in_steps(self._chunk_sizes(), cache).out_TSD
        differs_T = ((again != chunks.out_TSD) & ~(again.isnan() & chunks.out_TSD.isnan())).flatten(1).any(1)
        num_differing = int(differs_T.sum())
        message = "a second run, in caches that held NaN, has the same bits"
        if num_differing:
            first = int(differs_T.nonzero()[0])
            message = f"run again, in caches that held NaN, {num_differing} rows differ, the first at position {first}"
        number, words = float(num_differing), "no row differs"
        return Finding.judged("V08", self._where, not num_differing, message, number, words, _REMEDY_FRESH)

    def _check_neighbours(self) -> Iterator[Finding]:
        """V09: the text's beginning alone, in a step with others, and several times in one step."""
        num_rows = min(_NUM_SHORT, len(self.entering_TSD))
        alone = self._in_one_step([(0, num_rows)])[0]
        others = [(0, num_rows), (num_rows, min(num_rows + 33, len(self.entering_TSD))), (0, 1), (0, num_rows // 2)]
        mixed = self._in_one_step([part for part in others if part[0] < part[1]])[0]
        same = self._in_one_step([(0, num_rows)] * _NUM_SAME)
        seen = [self._compare("beside others", mixed, alone)]
        seen += [
            self._compare(f"number {n} of {_NUM_SAME} that are the same", run, alone) for n, run in enumerate(same)
        ]
        distinct = 1 + sum(not torch.equal(run.out_TSD, same[0].out_TSD) for run in same[1:])
        yield self._verdict("V09", seen, _REMEDY_BATCH, f"; {_NUM_SAME} equal sequences in a step: {distinct} outcomes")

    def _in_one_step(self, parts: list[tuple[int, int]]) -> list[SequenceRun]:
        """Runs stretches of the text as sequences of one step; returns those from its start, which alone can be
        judged."""
        seen = Activations(self.single.specs)
        chunks = [self._chunk(start, stop, self.single.new_cache()) for start, stop in parts]
        out_TSD = self.single.streams(self.single.step(chunks, seen))
        runs, first = [], 0
        for idx, ((start, stop), chunk) in enumerate(zip(parts, chunks, strict=True)):
            rows = slice(first, first + stop - start)
            if start == 0:
                keys_CH = self.single.index_keys(chunk.cache)
                runs.append(
                    SequenceRun(out_TSD[rows], self.one_shot.scores.judge(seen.of_sequence(idx, rows), keys_CH))
                )
            first = rows.stop
        return runs

    @property
    def _where(self) -> str:
        return self.single.layer.name

    def _compare(self, name: str, run: SequenceRun, baseline: SequenceRun | None = None) -> "RunComparison":
        """Compares rows that chose the same with the baseline: the one shot, if none is given."""
        baseline = baseline or SequenceRun(self.one_shot.out_TSD, self.one_shot.choices)
        num_rows = len(run.out_TSD)
        agree_T = run.choices.agrees(baseline.choices)
        wrong_T = ~agree_T & run.choices.wrong_T
        far_T = row_distances(run.out_TSD, baseline.out_TSD[:num_rows]).masked_fill(~agree_T, 0.0)
        worst = int(far_T.argmax())
        return RunComparison(name, float(far_T[worst]), worst, int(agree_T.sum()), num_rows, int(wrong_T.sum()))

    def _verdict(self, check: str, seen: list["RunComparison"], remedy: str, more: str = "") -> Finding:
        """Judges runs. Both may be off the reference by the budget, so they may differ by two; where few rows are
        computed otherwise, by that too. Batch-invariant kernels must give the same bits, whatever else is in the
        step."""
        allowed = 2 * ROW_FACTOR * self.oracle.budget("out") + 2 * self.one_shot.few_rows
        if check == "V09" and self.oracle.subject.engine.is_batch_invariant:
            allowed = 0.0
        worst = max(seen, key=lambda found: (found.num_wrong > 0, found.worst_row))
        is_good = worst.num_wrong == 0 and worst.worst_row <= allowed
        words = f"each row within {allowed:.1e} of the one shot's, and no other choice but at near ties"
        return Finding.judged(check, self._where, is_good, f"{worst.text}{more}", worst.worst_row, words, remedy)


@dataclass(frozen=True)
class RunComparison:
    """One run beside its baseline. num_agreeing: rows with the same choices. num_wrong: rows with wrong choices."""

    name: str
    worst_row: float
    position: int
    num_agreeing: int
    num_rows: int
    num_wrong: int

    @property
    def text(self) -> str:
        left = self.num_rows - self.num_agreeing
        excused = f", {left} that picked otherwise left out" if left else ""
        wrong = f", {self.num_wrong} of them wrongly" if self.num_wrong else ""
        return f"{self.name}: row {self.position} is {self.worst_row:.1e} off ({self.num_rows} rows{excused}{wrong})"
