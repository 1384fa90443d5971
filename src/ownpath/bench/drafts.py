"""``ownpath bench drafts``: decode steps with drafts of a whole V4-shaped model of random weights, beside plain ones.

The model is that of ``bench step``, with an MTP module behind it. Random weights guess nothing right, so that guesses
are accepted by chance, at a rate that is asked for: **forced**, for measuring alone; the tokens are no answer of the
model's. Steps follow each other as in the engine, each launched before the one before is read. A row has the time of a
token of each request: of a plain step, and of a step with drafts by the tokens that its requests have got.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.step import ONE_RANK_SETS, SPARE_TOKENS, WARM_UP_S, StepModel, fill_caches, make_model, step_config
from ownpath.bench.step import ROWS as COUNTS
from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, AcceptGuesses, DraftDecoder
from ownpath.engine.graphs import BUCKETS, StepGraphs, no_graph_of
from ownpath.engine.rows import DecodeRow, StepRows

ACCEPTED = 0.8
"""The share of guesses that are accepted, if nothing else is asked for."""
NUM_JUDGED = 1 << 22
"""Judgements that are drawn ahead: an hour of steps."""
NUM_CHAINED, NUM_CHAINS = 60, 5
"""Steps in a row, and how often they are measured."""


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures one shape after the other. Errors: ValueError for an unknown shape, or named contenders."""
    if asked.contenders not in (None, "ownpath"):
        raise ValueError("--contenders: bench drafts has none but ownpath")
    for shape in asked.shapes or ("flash",):
        counts = asked.tokens or COUNTS
        yield from DraftBench.of(asked, shape, max(counts)).measured(counts)


def accept_by_chance(share: float, device: torch.device | str) -> AcceptGuesses:
    """Returns a judge that accepts a guess with this probability, whatever was guessed: forced, for measuring.

    What is accepted was drawn before: numbers drawn in a graph would cost each replay two kernels and their launches.
    Of each request's next ones two kernels of about 1 us are the cost of the switch.
    """
    g = torch.Generator().manual_seed(1)
    accepted = (torch.rand(NUM_JUDGED, generator=g) < share).to(device, torch.int32)
    at_R = torch.randint(0, NUM_JUDGED // 2, (BUCKETS[-1],), generator=g, dtype=torch.int32).to(device)

    def judge(drawn_R: torch.Tensor, guesses_R: torch.Tensor, out_R: torch.Tensor) -> None:
        now_R = at_R[: len(out_R)]
        torch.index_select(accepted, 0, now_R, out=out_R)
        now_R.add_(1)

    return judge


@dataclass(frozen=True)
class DraftBench:
    """A model with a module of drafts, both decoders, and the caches of its requests."""

    asked: BenchRequest
    shape: str
    made: StepModel
    plain: Decoder
    drafting: DraftDecoder
    caches: list[SequenceCache]
    generator: torch.Generator

    @classmethod
    def of(cls, asked: BenchRequest, shape: str, most: int) -> "DraftBench":
        """Makes a shape's model and fills its caches with random values."""
        options, device = asked.step, asked.settings.device
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        config = replace(step_config(shape, options), num_nextn_predict_layers=1)
        engine = EngineConfig(
            device, dtype, options.context + SPARE_TOKENS, most, loads_draft=True, rows_per_request=ROWS
        )
        made = make_model(config, engine, options.export, options.expert_sets or ONE_RANK_SETS)
        fill_caches(made.model.caches, asked.settings.generator(3))
        share = ACCEPTED if options.accepted is None else options.accepted
        return cls(
            asked,
            shape,
            made,
            Decoder(made.model, most, config.vocab_size),
            DraftDecoder(made.model, most, config.vocab_size, accept_by_chance(share, device)),
            [made.model.new_cache() for _ in range(most)],
            torch.Generator().manual_seed(asked.settings.seed + 4),
        )

    @torch.inference_mode()
    def measured(self, counts: tuple[int, ...]) -> Iterator[Row]:
        """Captures graphs for each number of requests on a GPU, then times chains of steps."""
        decoders: tuple[StepGraphs, ...] = self.plain, self.drafting
        for decoder in decoders:
            decoder.buckets = tuple(sorted(set(counts)))
            if self._is_on_gpu and no_graph_of(self.made.model.ledger) is None:
                decoder.capture(lambda *_: None)
        for count in counts:
            plain, facts = self._timed(partial(self._chain_plain, count)), self._facts()
            yield self._row(count, "ownpath", plain, facts)
            drafted = self._timed(partial(self._chain_drafted, count))
            gain = statistics.median(us for us, _ in plain) / statistics.median(us for us, _ in drafted)
            kept = statistics.mean(tokens for _, tokens in drafted)
            facts = {**facts, "tokens_of_a_step": round(kept, 3), "gain": round(gain, 3)}
            facts["step_us"] = round(statistics.median(us * tokens for us, tokens in drafted), 1)
            yield self._row(count, f"drafts, {self._share:g} accepted by force", drafted, facts)

    @property
    def _share(self) -> float:
        return ACCEPTED if self.asked.step.accepted is None else self.asked.step.accepted

    @property
    def _is_on_gpu(self) -> bool:
        return torch.device(self.asked.settings.device).type == "cuda"

    def _timed(self, chain: Callable[[], float]) -> list[tuple[float, float]]:
        """Returns of each chain microseconds for a token of a request, and tokens of a request and step."""
        until, found = time.perf_counter() + (WARM_UP_S if self._is_on_gpu else 0), []
        while time.perf_counter() < until:
            chain()
        for _ in range(NUM_CHAINS if self._is_on_gpu else 1):
            start = time.perf_counter()
            tokens = chain()
            found.append((1e6 * (time.perf_counter() - start) / NUM_CHAINED / tokens, tokens))
        return found

    def _chain_plain(self, count: int) -> float:
        """Runs plain steps in a row, as the engine does. Returns the tokens of a request and step."""
        begun, decoder = self.plain.begin(self._rows(count)), self.plain
        for _ in range(NUM_CHAINED - 1):
            following = decoder.repeat()
            decoder.finish(begun)
            begun = following
        decoder.finish(begun)
        decoder.forget()
        return 1.0

    def _chain_drafted(self, count: int) -> float:
        """Runs steps with drafts in a row, as the engine does. Returns the tokens of a request and step."""
        decoder, rows, num_tokens = self.drafting, self._rows(count), 0
        begun = decoder.begin(rows, rows.token_ids)
        for _ in range(NUM_CHAINED - 1):
            following = decoder.repeat(begun)
            num_tokens += sum(map(len, decoder.finish(begun).token_ids))
            begun = following
        num_tokens += sum(map(len, decoder.finish(begun).token_ids))
        decoder.forget()
        return num_tokens / count / NUM_CHAINED

    def _rows(self, count: int) -> StepRows:
        """Draws tokens for requests at the end of the context."""
        ids = torch.randint(0, self.made.model.config.vocab_size, (count,), generator=self.generator).tolist()
        for cache in self.caches[:count]:
            cache.num_tokens = self.asked.step.context
        return StepRows.of([DecodeRow(cache, token_id) for cache, token_id in zip(self.caches, ids, strict=False)])

    def _facts(self) -> dict[str, object]:
        options, config = self.asked.step, self.made.model.config
        facts: dict[str, object] = {"layers": config.num_hidden_layers, "export": options.export}
        facts["expert_sets"] = options.expert_sets or ONE_RANK_SETS
        facts["captured"] = self.plain.has_graph(1)
        return facts | {"routing": "uniform, by token id; the module's by its gate"}

    def _row(self, count: int, contender: str, found: list[tuple[float, float]], facts: dict[str, object]) -> Row:
        times = sorted(us for us, _ in found)
        timing = Timing(statistics.median(times), times[0], times[-1], NUM_CHAINED, len(times))
        label, dims = f"{self.shape}, {self.asked.step.context} tokens", {"context": self.asked.step.context}
        return Row(Case("drafts", label, dims, count, 0, 0, None), contender, False, "ok", "", timing, None, facts)
