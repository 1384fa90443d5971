"""``ownpath bench step``: a captured decode step of a whole V4-shaped model of random weights, sampler included.

All layers are planned, built and captured as a served model's are. A GPU that cannot hold every layer's experts gets
fewer sets of them, shared between layers far apart ("aliased"): each layer still reads its bytes from memory, because
the layers between two uses of a set replace it in the L2 cache. Every row is a request of its own with random caches;
token ids are drawn anew before every timed step.

Experts are looked up by token id in tables drawn uniformly, in every layer: the gate of random weights gives the rows
of a step the same experts more often than a trained one would, and a step then reads less. The gate's product is
computed all the same, for the weights; only the router's top-k is spared. The row has how many experts were chosen.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ownpath.bench.floor import NVFP4_BYTES_PER_PARAM, Work
from ownpath.bench.published import model_shape
from ownpath.bench.request import BenchRequest, StepOptions
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.synthetic import Values, headers
from ownpath.cache.layout import CacheTensor, EntryKind
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import CSA_RATIO, EngineConfig, ModelConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.loading import device_caps
from ownpath.model.build import Builder
from ownpath.model.model import Model
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands
from ownpath.runners.make import make_runners
from ownpath.startup import compile_kernels
from ownpath.trace import Ledger
from ownpath.trace.launches import record_launches, slot_times
from ownpath.trace.observers import CallArguments, Observer, Watched

ROWS = (1, 8, 32, 128)
NUM_STEPS = 30
NUM_COUNTED = 4
"""Steps whose experts are counted."""
SPARE_TOKENS = 512
"""Positions that steps may add to the context."""
WARM_UP_S = 0.5


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures one shape after the other. Errors: ValueError for an unknown shape, or named contenders."""
    if asked.contenders not in (None, "ownpath"):
        raise ValueError("--contenders: bench step has none but ownpath")
    for shape in asked.shapes or ("flash",):
        rows = asked.tokens or ROWS
        yield from StepBench.of(asked, shape, max(rows)).measured(rows)


@dataclass(frozen=True)
class StepModel:
    """A model of random weights, and the headers of its checkpoint."""

    model: Model
    index: CheckpointIndex

    @property
    def dense_bytes(self) -> int:
        """Bytes that every step reads: all weights but routed experts, the embedding and the routers' tables."""
        infos = self.index.tensors.values()
        return sum(info.num_bytes for info in infos if not any(part in info.name for part in _NOT_DENSE))


_NOT_DENSE = (".ffn.experts.", "embed.weight", "tid2eid")


def step_config(shape: str, options: StepOptions) -> ModelConfig:
    """Returns a published shape's config without drafts, cut to the asked layers."""
    fields = {**model_shape(shape), "num_nextn_predict_layers": 0}
    if options.layers is not None:
        ratios = fields["compress_ratios"][: options.layers]
        fields |= {"num_hidden_layers": options.layers, "compress_ratios": ratios}
    num_hash_layers = min(fields["num_hash_layers"], fields["num_hidden_layers"])
    return ModelConfig.from_dict(
        fields | {"num_hash_layers": num_hash_layers if options.by_gate else fields["num_hidden_layers"]}
    )


def make_model(config: ModelConfig, engine: EngineConfig, export: str, num_sets: int) -> StepModel:
    """Makes a model of random weights. Layer i uses the experts of layer i % num_sets."""
    index, device = headers(config, export), torch.device(engine.device)
    dtype = str(engine.dtype).removeprefix("torch.")
    demands = Demands(dtype, engine.is_batch_invariant, cache_format=engine.cache_format)
    plan = make_plan(config, index, device_caps(engine.device), demands)
    own = replace(plan, ops=tuple(op for op in plan.ops if not _is_alias(op, num_sets)))
    values = Values.of_seed(device, 1)
    runners = make_runners(own, tuple(values.operands(own, index)))
    compile_kernels(runners.values())
    for op in plan.ops:
        if _is_alias(op, num_sets):
            runners[op.spec.slot] = runners[f"layers.{_layer_of(op.spec.slot) % num_sets}.ffn.experts"]
    specs = {companion.spec.slot: companion.choice.kernel for companion in plan.companions}
    params = Values.of_seed(device, 0).params(config)
    return StepModel(Builder(config, engine, runners, specs, params, Ledger(plan.slots)).model(), index)


def _layer_of(slot: str) -> int:
    return int(slot.split(".")[1])


def _is_alias(op: PlannedOp, num_sets: int) -> bool:
    return op.spec.kind is OpKind.MOE and _layer_of(op.spec.slot) >= num_sets


@dataclass
class ExpertCounter(Observer):
    """Counts the distinct experts that each layer's router chooses in a step. found: layer -> a count for each step."""

    found: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def after(self, call: Watched, args: CallArguments, result: object) -> None:
        if call.slot.endswith((".ffn.router", ".ffn.decode.route")):
            assert isinstance(result, tuple)
            ids = result[0].unique()
            self.found[_layer_of(call.slot)].append(int((ids >= 0).sum()))

    def means(self) -> list[float]:
        """Returns the mean of each layer, in their order."""
        return [round(statistics.mean(counts), 1) for _, counts in sorted(self.found.items())]


@dataclass(frozen=True)
class StepBench:
    """A model with a decoder and the caches of its rows."""

    asked: BenchRequest
    shape: str
    made: StepModel
    decoder: Decoder
    caches: list[SequenceCache]
    setup: dict[str, float]
    generator: torch.Generator

    @classmethod
    def of(cls, asked: BenchRequest, shape: str, most_rows: int) -> "StepBench":
        """Makes a shape's model, fills its caches with random values, and captures nothing yet."""
        options, device = asked.step, asked.settings.device
        start = time.perf_counter()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        engine = EngineConfig(device, dtype, max_model_len=options.context + SPARE_TOKENS, max_num_seqs=most_rows)
        made = make_model(step_config(shape, options), engine, options.export, options.expert_sets)
        fill_caches(made.model.caches, asked.settings.generator(3))
        caches = [made.model.new_cache() for _ in range(most_rows)]
        decoder = Decoder(made.model, most_rows, made.model.config.vocab_size)
        setup = {"setup_s": round(time.perf_counter() - start, 1)}
        generator = torch.Generator().manual_seed(asked.settings.seed + 4)
        return cls(asked, shape, made, decoder, caches, setup, generator)

    def measured(self, counts: tuple[int, ...]) -> Iterator[Row]:
        """Captures a graph for each number of rows on a GPU, then times them."""
        self.decoder.buckets = tuple(sorted(counts))
        if self.is_on_gpu:
            start = time.perf_counter()
            with torch.inference_mode():
                self.decoder.capture(lambda *_: None)
            self.setup["capture_s"] = round(time.perf_counter() - start, 1)
        for count in counts:
            yield self._row(count)

    @property
    def is_on_gpu(self) -> bool:
        return torch.device(self.asked.settings.device).type == "cuda"

    @torch.inference_mode()
    def _row(self, count: int) -> Row:
        options, experts = self.asked.step, self._count_experts(count)
        until = time.perf_counter() + (WARM_UP_S if self.is_on_gpu else 0)
        while time.perf_counter() < until:
            self.decoder.step(self._rows(count))
        steps = [self._time(count) for _ in range(NUM_STEPS if self.is_on_gpu else 3)]
        of_gpu, of_host = zip(*steps, strict=True)
        facts: dict[str, object] = {
            "layers": self.made.model.config.num_hidden_layers,
            "routing": "by the gate" if options.by_gate else "uniform, by token id",
            "distinct_experts_by_layer": experts,
            "host_us": round(statistics.median(of_host), 1),
            "export": options.export,
            "expert_sets": options.expert_sets,
        }
        facts |= self._launch_facts(count) | self.setup
        tenths = statistics.quantiles(of_gpu, n=10, method="inclusive")
        timing = Timing(statistics.median(of_gpu), tenths[0], tenths[-1], 1, len(steps))
        case = self._case(count, statistics.mean(experts) if experts else None)
        return Row(case, "ownpath", False, "ok", "", timing, None, facts)

    def _rows(self, count: int) -> StepRows:
        """Draws tokens for rows at the end of the context."""
        ids = torch.randint(0, self.made.model.config.vocab_size, (count,), generator=self.generator).tolist()
        for cache in self.caches[:count]:
            cache.num_tokens = self.asked.step.context
        return StepRows.of([DecodeRow(cache, token_id) for cache, token_id in zip(self.caches, ids, strict=False)])

    def _time(self, count: int) -> tuple[float, float]:
        """Returns microseconds of a step on the device, and of the host beside it, uploads and launch included."""
        if not self.is_on_gpu:
            start = time.perf_counter()
            self.decoder.step(self._rows(count))
            return (1e6 * (time.perf_counter() - start),) * 2
        rows = self._rows(count)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.decoder.upload(rows)
        events[0].record()
        self.decoder.launch(count)
        events[1].record()
        host_us = 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e3 * events[0].elapsed_time(events[1]), host_us

    def _eager(self, count: int) -> Callable[[], object]:
        """Uploads rows and returns the eager step of them."""
        self.decoder.upload(self._rows(count))
        return lambda: self.decoder.run(count)

    def _count_experts(self, count: int) -> list[float]:
        counter = ExpertCounter()
        with self.made.model.ledger.observe(counter):
            for _ in range(NUM_COUNTED):
                self._eager(count)()
        return counter.means()

    def _launch_facts(self, count: int) -> dict[str, object]:
        """Counts the kernels of a step by the device's own record, and times its slots where that is asked for."""
        if not self.is_on_gpu:
            return {}
        launches = record_launches(self.made.model.ledger, self._eager(count))
        if not self.asked.step.slots:
            return {"kernels": len(launches)}
        kinds: dict[str, float] = defaultdict(float)
        for slot, us in slot_times(launches).items():
            kinds[_kind(slot)] += us
        slots = {kind: round(us, 1) for kind, us in sorted(kinds.items(), key=lambda pair: -pair[1])}
        return {"kernels": len(launches), "slot_us": slots}

    def _case(self, count: int, distinct: float | None) -> Case:
        work = step_work(self.made, count, self.asked.step.context, distinct or 0.0)
        ceilings = self.asked.settings.ceilings
        floor_us = None if ceilings is None else work.floor_us(ceilings)
        label = f"{self.shape}, {self.asked.step.context} tokens"
        dims = {"context": self.asked.step.context}
        return Case("step", label, dims, count, work.num_bytes, work.num_flop, floor_us, distinct)


def _kind(slot: str | None) -> str:
    """Returns a slot's name without its layer."""
    if slot is None:
        return "(glue)"
    return slot.split(".", 2)[-1] if slot.startswith("layers.") else slot


def fill_caches(pool: CachePool, generator: torch.Generator) -> None:
    """Fills the pool with random keys."""
    for tensor in pool.tensors.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        else:  # pages: codes between 0.25 and 1 in E4M3
            tensor.random_(0x28, 0x38, generator=generator)


def step_work(made: StepModel, num_rows: int, context: int, distinct: float) -> Work:
    """Counts the bytes that a step must read: dense weights once, each chosen expert once a layer, and each row's
    window, entries that it attends to, and index keys.

    distinct: experts that a layer's rows choose, in the mean.
    """
    config, pool = made.model.config, made.model.caches
    expert_bytes = 3 * config.hidden_size * config.moe_intermediate_size * NVFP4_BYTES_PER_PARAM
    experts = config.num_hidden_layers * distinct * expert_bytes
    caches = sum(_read_bytes(member, pool, context) for member in pool.layout.members)
    return Work(round(made.dense_bytes + experts + num_rows * caches), 0)


def _read_bytes(member: CacheTensor, pool: CachePool, context: int) -> float:
    """Returns how many bytes of a tensor one request reads."""
    places = 1 + (pool.slots.num_blocks if member.group.is_paged else pool.slots.num_slots)
    config, row_bytes = pool.spec.config, pool.tensors[member].nbytes / (places * member.num_rows)
    if not member.group.is_paged:
        return 0.0 if member.group.is_wide else min(context, config.sliding_window) * row_bytes
    num_entries = context // member.ratio
    is_selected = member.ratio == CSA_RATIO and member.part is EntryKind.MAIN
    return row_bytes * (min(num_entries, config.index_topk) if is_selected else num_entries)
