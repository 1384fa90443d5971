"""``ownpath bench prompt``: prompts of a whole V4-shaped model of random weights, read in chunks.

The model is made as in ``ownpath bench step``: all layers, sets of experts that layers share, experts drawn uniformly.
A prompt is random ids, read from its first token on by ``Model.forward``, a chunk at a time, as the engine does. The
time is the device's, from before the first chunk to behind the last; the host prepares each chunk while the device
computes the one before. On a GPU twice: in graphs, as an engine reads prompts (``engine/prompt_graphs``), and eagerly;
then the prompt's last chunk has its slots and kernels timed by the profiler, too.

The host's time of a layer is of the first layers of a chunk, behind an idle device: later launches wait for the device
once its queue is full.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias

import torch

from ownpath.attention.interface import PreparedStep
from ownpath.attention.rope import Rotation
from ownpath.bench.request import BenchRequest
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.step import ONE_RANK_SETS, StepModel, kind_of, largest_first, make_model, step_config
from ownpath.bench.step_ranks import group_of
from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.engine.prompt_graphs import PromptGraphs
from ownpath.model.batch import ForwardBatch
from ownpath.model.block import Block, Residual
from ownpath.model.model import Model
from ownpath.trace.launches import DeviceLaunch, busy_times, record_launches, slot_times

LENGTHS = (8192, 65536)
NUM_PROMPTS = 3
"""Prompts of a length that are timed, behind one that is not."""
HOST_LAYERS = 8
"""Layers whose launches fit the device's queue."""
NAME_LENGTH = 72
PromptReader: TypeAlias = Model | PromptGraphs


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures one shape after the other. Errors: ValueError for an unknown shape, or named contenders."""
    if asked.contenders not in (None, "ownpath"):
        raise ValueError("--contenders: bench prompt has none but ownpath")
    for shape in asked.shapes or ("flash",):
        lengths = asked.tokens or LENGTHS
        bench = PromptBench.of(asked, shape, max(lengths))
        for num_tokens in lengths:
            for chunk in dict.fromkeys(min(chunk, num_tokens) for chunk in asked.step.chunks):
                for reader in bench.readers:
                    yield bench.row(num_tokens, chunk, reader)


@dataclass(frozen=True)
class ClockedBlock(Block):
    """A block that notes the host's microseconds of every call. Of no meaning where the device's queue is full."""

    times_us: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, block: Block) -> "ClockedBlock":
        """Makes one of the same parts."""
        return cls(*(getattr(block, one.name) for one in fields(block)))

    def __call__(
        self, residual: Residual, rotation: Rotation, token_ids_T: torch.Tensor, step: PreparedStep
    ) -> Residual:
        """Runs the layer."""
        start = time.perf_counter()
        after = super().__call__(residual, rotation, token_ids_T, step)
        self.times_us.append(1e6 * (time.perf_counter() - start))
        return after


@dataclass(frozen=True)
class PromptBench:
    """A model, and the cache of its one request. graphs: of its steps; ``None`` on a CPU."""

    asked: BenchRequest
    shape: str
    made: StepModel
    clocked: Model
    cache: SequenceCache
    graphs: PromptGraphs | None
    setup: dict[str, float]
    generator: torch.Generator

    @classmethod
    def of(cls, asked: BenchRequest, shape: str, most_tokens: int) -> "PromptBench":
        """Makes a shape's model."""
        options, device = asked.step, asked.settings.device
        start = time.perf_counter()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        engine = EngineConfig(device, dtype, most_tokens, max_num_seqs=1, cache_format=options.cache_format)
        engine = replace(engine, official=options.numerics)
        config, num_sets = step_config(shape, options), options.expert_sets or ONE_RANK_SETS
        made = make_model(config, engine, options.export, num_sets)
        blocks = tuple(ClockedBlock.of(block) for block in made.model.blocks)
        clocked = Model(**{one.name: getattr(made.model, one.name) for one in fields(Model)} | {"blocks": blocks})
        setup = {"setup_s": round(time.perf_counter() - start, 1)}
        graphs = None
        if torch.device(device).type == "cuda":
            graphs = PromptGraphs(made.model, min(max(options.chunks), most_tokens))
            setup |= captured(graphs)
        generator = torch.Generator().manual_seed(asked.settings.seed + 5)
        return cls(asked, shape, made, clocked, made.model.new_cache(), graphs, setup, generator)

    @property
    def readers(self) -> tuple[PromptReader, ...]:
        """The readers of prompts: graphs, and the model."""
        return (self.made.model,) if self.graphs is None else (self.graphs, self.made.model)

    @torch.inference_mode()
    def row(self, num_tokens: int, chunk: int, reader: PromptReader) -> Row:
        """Measures prompts of one length, in chunks of one size."""
        config, options, is_eager = self.made.model.config, self.asked.step, reader is self.made.model
        logits_RV = self._read(reader, self._drawn(num_tokens), chunk)
        if not logits_RV.isfinite().all():
            raise ValueError("the logits of a prompt are not finite")
        times, host = zip(*(self._time(num_tokens, chunk, reader) for _ in range(NUM_PROMPTS)), strict=True)
        us = statistics.median(times)
        facts: dict[str, object] = {
            "tokens_per_s": round(1e6 * num_tokens / us),
            "layers": config.num_hidden_layers,
            "host_us": round(statistics.median(host), 1),
            "export": options.export,
            "expert_sets": options.expert_sets or ONE_RANK_SETS,
            "cache_format": str(options.cache_format),
            "numerics": ",".join(sorted(options.numerics)) or "plain",
        }
        if is_eager:
            facts |= self._host_facts(chunk) | self._launch_facts(num_tokens, chunk)
        facts |= self.setup
        case = Case("prompt", f"{self.shape}, chunks of {chunk}", {"chunk": chunk}, num_tokens, 0, 0, None)
        timing = Timing(us, min(times), max(times), 1, len(times))
        return Row(case, "ownpath, eager" if is_eager else "ownpath", False, "ok", "", timing, None, facts)

    @property
    def is_on_gpu(self) -> bool:
        return torch.device(self.asked.settings.device).type == "cuda"

    def _drawn(self, num_tokens: int) -> list[int]:
        ids: list[int] = torch.randint(
            0, self.made.model.config.vocab_size, (num_tokens,), generator=self.generator
        ).tolist()
        return ids

    def _read(self, reader: PromptReader, ids: list[int], chunk: int) -> torch.Tensor:
        """Reads a prompt; returns the last row's logits."""
        self.cache.num_tokens = 0
        for start in range(0, len(ids), chunk):
            logits_RV = self._step(reader, ids[start : start + chunk])
        return logits_RV

    def _step(self, reader: PromptReader, ids: list[int]) -> torch.Tensor:
        return reader.forward(ForwardBatch.of([(ids, self.cache)], self.asked.settings.device))

    def _time(self, num_tokens: int, chunk: int, reader: PromptReader) -> tuple[float, float]:
        """Returns microseconds of a prompt on the device, and those until the host has launched it."""
        ids = self._drawn(num_tokens)
        if not self.is_on_gpu:
            start = time.perf_counter()
            self._read(reader, ids, chunk)
            return (1e6 * (time.perf_counter() - start),) * 2
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        events[0].record()
        self._read(reader, ids, chunk)
        events[1].record()
        host_us = 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e3 * events[0].elapsed_time(events[1]), host_us

    def _host_facts(self, chunk: int) -> dict[str, object]:
        """Measures the host beside an idle device, in a prompt's second chunk: before the layers, and in each kind."""
        ids, before, ratios = self._drawn(chunk), [], self.made.model.config.compress_ratios[:HOST_LAYERS]
        times = defaultdict[int, list[float]](list)
        for _ in range(NUM_PROMPTS):
            self.cache.num_tokens = min(chunk, self.cache.max_tokens - chunk)
            self._wait()
            start = time.perf_counter()
            batch = ForwardBatch.of([(ids, self.cache)], self.asked.settings.device)
            before.append(1e6 * (time.perf_counter() - start))
            self.clocked.forward(batch)
            for block, ratio in zip(self.clocked.blocks, ratios, strict=False):
                assert isinstance(block, ClockedBlock)
                times[ratio].append(block.times_us[-1])
        layers = {f"ratio {ratio}": round(statistics.median(found), 1) for ratio, found in sorted(times.items())}
        return {"host_batch_us": round(statistics.median(before), 1), "host_layer_us": layers}

    def _wait(self) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def _launch_facts(self, num_tokens: int, chunk: int) -> dict[str, object]:
        """Times slots and kernels of the prompt's last chunk."""
        if not self.is_on_gpu or not self.asked.step.slots:
            return {}
        ids = self._drawn(chunk)
        self.cache.num_tokens = num_tokens - chunk
        launches = record_launches(self.made.model.ledger, lambda: self._step(self.made.model, ids))
        kinds, groups = defaultdict[str, float](float), defaultdict[str, float](float)
        for slot, us in slot_times(launches).items():
            kinds[kind_of(slot)] += us
            groups[group_of(kind_of(slot))] += us
        busy_us, span_us = _busy_and_span(launches)
        return {
            "kernels": len(launches),
            "busy_us": busy_us,
            "span_us": span_us,
            "slot_us": largest_first(kinds),
            "group_us": largest_first(groups),
            "glue_us": _kernel_times([one for one in launches if one.slot is None]),
        }


def captured(graphs: PromptGraphs) -> dict[str, float]:
    """Captures graphs; returns how many, seconds and bytes that it took."""
    torch.cuda.empty_cache()
    start, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
    with torch.inference_mode():
        graphs.capture(lambda *_: None)
    torch.cuda.empty_cache()
    taken = {"graph_bytes": before - torch.cuda.mem_get_info()[0], "capture_s": round(time.perf_counter() - start, 1)}
    return {"graphs": len(graphs.shapes)} | taken


def _busy_and_span(launches: list[DeviceLaunch]) -> tuple[float, float]:
    """Returns for how long the device ran, and how long it took; the profiler slows the host, not kernels."""
    busy_us = sum(us for _, us in busy_times(launches))
    span_us = max(one.start_us + one.duration_us for one in launches) - min(one.start_us for one in launches)
    return round(busy_us, 1), round(span_us, 1)


def _kernel_times(launches: list[DeviceLaunch]) -> dict[str, float]:
    times = defaultdict[str, float](float)
    for one in launches:
        times[one.kernel[:NAME_LENGTH]] += one.duration_us
    return largest_first(times)
