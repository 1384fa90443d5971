"""``ownpath bench step``: a captured decode step of a whole V4-shaped model of random weights, sampler included.

All layers are planned, built and captured as a served model's are. A GPU that cannot hold every layer's experts gets
fewer sets of them, shared between layers far apart ("aliased"): each layer still reads its bytes from memory, because
the layers between two uses of a set replace it in the L2 cache. Every row is a request of its own with random caches;
token ids are drawn anew before every timed step.

Several ranks hold their parts of every layer's weights and run the same graphs; a row's time is the slowest rank's of
each step. By heads all ranks compute all rows; by data each has its own, and a row's number is of all ranks together.

Experts are looked up by token id in tables drawn uniformly, in every layer: the gate of random weights gives the rows
of a step the same experts more often than a trained one would, and a step then reads less. The gate's product is
computed all the same, for the weights; only the router's top-k is spared. The row has how many experts were chosen.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ownpath.assembly import load_part
from ownpath.bench.floor import NVFP4_BYTES_PER_PARAM, Work
from ownpath.bench.published import model_shape
from ownpath.bench.request import BenchRequest, StepOptions
from ownpath.bench.row import Case, Row, Timing
from ownpath.bench.step_ranks import agree, division_of, group_of, rank_facts, share_of, slowest, with_slots
from ownpath.cache.layout import CacheTensor, EntryKind
from ownpath.cache.pools import CachePool, SequenceCache
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import CSA_RATIO, ONE_RANK, EngineConfig, ModelConfig, Parallel
from ownpath.engine.decoder import Decoder
from ownpath.engine.graphs import no_graph_of
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.loading import WindowOpener, device_caps, planned_window
from ownpath.model.build import ALONE
from ownpath.model.model import Model
from ownpath.ops import OpKind
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import make_plan
from ownpath.plan.select import Demands
from ownpath.plan.sharding import Region
from ownpath.plan.tiling import held_regions
from ownpath.ranks.peers import Peers
from ownpath.splits import AttentionSplit, ExpertSplit
from ownpath.trace import Ledger
from ownpath.trace.launches import DeviceLaunch, DeviceRecord, record_launches, slot_times
from ownpath.trace.observers import CallArguments, Observer, Watched

ROWS = (1, 8, 32, 128)
ONE_RANK_SETS = 24
"""Sets of experts that one H200 holds."""
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
    """A model of random weights. dense_bytes: what every step reads on this rank whatever its rows are."""

    model: Model
    dense_bytes: int
    parallel: Parallel = ONE_RANK


_NOT_DENSE = (".ffn.experts.", "embed.weight", "tid2eid")


def dense_bytes(index: CheckpointIndex, regions: Mapping[str, Region | None]) -> int:
    """Counts all weights but routed experts, the embedding and the routers' tables. regions: by key, of what a rank
    has in part."""
    infos = (info for info in index.tensors.values() if not any(part in info.name for part in _NOT_DENSE))
    return sum(_local_bytes(info, regions.get(info.name)) for info in infos)


def _local_bytes(info: TensorInfo, region: Region | None) -> int:
    if region is None:
        return info.num_bytes
    return info.num_bytes // math.prod(info.shape) * math.prod(region.shape(info.shape))


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


def make_model(
    config: ModelConfig,
    engine: EngineConfig,
    export: str,
    num_sets: int | None,
    peers: Peers = ALONE,
    open_window: WindowOpener | None = None,
) -> StepModel:
    """Makes a rank's part of a model of random weights. Layer i uses the experts of layer i % num_sets; ``None``: its
    own. open_window: as of ``load_model``."""
    index = drawn_checkpoint(config, export, with_drafts=engine.loads_draft)
    num_sets = num_sets or config.num_hidden_layers
    dtype = str(engine.dtype).removeprefix("torch.")
    demands = Demands(dtype, engine.is_batch_invariant, engine.official, cache_format=engine.cache_format)
    caps, drafts = device_caps(engine.device), engine.loads_draft
    plan = make_plan(config, index, caps, demands, loads_draft=drafts, parallel=engine.parallel)
    own = replace(plan, ops=tuple(op for op in plan.ops if not _is_alias(op, num_sets)))
    window = planned_window(plan, engine, open_window)
    builder = load_part(own, index, engine, peers=peers, window=window).builder
    aliases = {
        op.spec.slot: builder.runners[f"layers.{_layer_of(op.spec.slot) % num_sets}.ffn.experts"]
        for op in plan.ops
        if _is_alias(op, num_sets)
    }
    whole = replace(builder, runners=builder.runners | aliases, ledger=Ledger(plan.slots))
    return StepModel(whole.model(), dense_bytes(index, held_regions(plan)), engine.parallel)


def _layer_of(slot: str) -> int:
    return int(slot.split(".")[1])


def _is_alias(op: PlannedOp, num_sets: int) -> bool:
    is_backbone = op.spec.slot.startswith("layers.")
    return op.spec.kind is OpKind.MOE and is_backbone and _layer_of(op.spec.slot) >= num_sets


@dataclass
class ExpertCounter(Observer):
    """Counts the distinct experts of this rank's that each layer's step reads. held: their ids; ``None``: any.

    found: layer -> a count for each step.
    """

    held: range | None = None
    found: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def after(self, call: Watched, args: CallArguments, result: object) -> None:
        if not call.slot.endswith(self.slots):
            return
        assert isinstance(result, tuple)
        ids = (result[0][1] if isinstance(result[0], tuple) else result[0]).unique()
        is_read = ids >= 0 if self.held is None else (ids >= self.held.start) & (ids < self.held.stop)
        self.found[_layer_of(call.slot)].append(int(is_read.sum()))

    slots: tuple[str, ...] = (".ffn.router", ".ffn.decode.route")
    """Whose results are ids, or of a gather of rows the rows' ids."""

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
        """Makes a shape's model, fills its caches with random values, and captures nothing yet. most_rows: of all
        ranks."""
        options, device, parallel = asked.step, asked.settings.device, asked.parallel
        most_rows = share_of(most_rows, parallel)
        start = time.perf_counter()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        engine = EngineConfig(device, dtype, max_model_len=options.context + SPARE_TOKENS, max_num_seqs=most_rows)
        engine = replace(engine, parallel=parallel)
        num_sets = options.expert_sets or (ONE_RANK_SETS if parallel.size == 1 else None)
        config, window = step_config(shape, options), asked.open_window
        made = make_model(config, engine, options.export, num_sets, asked.peers, window)
        fill_caches(made.model.caches, asked.settings.generator(3))
        caches = [made.model.new_cache() for _ in range(most_rows)]
        decoder = Decoder(made.model, most_rows, made.model.config.vocab_size)
        setup = {"setup_s": round(time.perf_counter() - start, 1)}
        own = parallel.rank if parallel.attention is AttentionSplit.DATA else 0
        generator = torch.Generator().manual_seed(asked.settings.seed + 4 + 1000 * own)
        return cls(asked, shape, made, decoder, caches, setup, generator)

    def measured(self, counts: tuple[int, ...]) -> Iterator[Row]:
        """Captures a graph for each number of rows on a GPU, then times them. counts: of all ranks."""
        shares = [share_of(count, self.asked.parallel) for count in counts]
        self.decoder.buckets = tuple(sorted(set(shares)))
        self.setup["captured"] = self.is_on_gpu and no_graph_of(self.made.model.ledger) is None
        if self.setup["captured"]:
            start = time.perf_counter()
            with torch.inference_mode():
                self.decoder.capture(lambda *_: None)
            self.setup["capture_s"] = round(time.perf_counter() - start, 1)
        for count, share in zip(counts, shares, strict=True):
            yield self._row(count, share)

    @property
    def is_on_gpu(self) -> bool:
        return torch.device(self.asked.settings.device).type == "cuda"

    @torch.inference_mode()
    def _row(self, num_rows: int, count: int) -> Row:
        """Measures a step. num_rows: of all ranks. count: of this one."""
        options, experts = self.asked.step, self._count_experts(count)
        until = time.perf_counter() + (WARM_UP_S if self.is_on_gpu else 0)
        while agree(self.asked.peers, time.perf_counter() < until):
            self.decoder.step(self._rows(count))
        own = [self._time(count) for _ in range(NUM_STEPS if self.is_on_gpu else 3)]
        self._check(self.decoder.launch(count))
        steps = slowest(self.asked.peers, own)
        of_gpu, of_host = zip(*steps, strict=True)
        facts: dict[str, object] = {
            "layers": self.made.model.config.num_hidden_layers,
            "routing": "by the gate" if options.by_gate else "uniform, by token id",
            "distinct_experts_by_layer": experts,
            "host_us": round(statistics.median(of_host), 1),
            "export": options.export,
            "expert_sets": options.expert_sets or (ONE_RANK_SETS if self.asked.parallel.size == 1 else "each its own"),
        }
        facts |= rank_facts(self.asked, self.shape, num_rows) | self._launch_facts(count) | self.setup
        tenths = statistics.quantiles(of_gpu, n=10, method="inclusive")
        timing = Timing(statistics.median(of_gpu), tenths[0], tenths[-1], 1, len(steps))
        case = self._case(num_rows, count, statistics.mean(experts) if experts else None)
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
        self._begin_together(count)
        rows = self._rows(count)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        self.decoder.upload(rows)
        events[0].record()
        self.decoder.launch(count)
        events[1].record()
        host_us = 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        return 1e3 * events[0].elapsed_time(events[1]), host_us

    def _begin_together(self, count: int) -> None:
        """Waits until the device is idle. Of several ranks, has all begin a step, behind which the next one begins on
        all at the same time."""
        torch.cuda.synchronize()
        if self.asked.parallel.size > 1:
            agree(self.asked.peers, True)
            self.decoder.upload(self._rows(count))
            self.decoder.launch(count)

    def _eager(self, count: int) -> Callable[[], torch.Tensor]:
        """Uploads rows and returns the eager step of them."""
        self.decoder.upload(self._rows(count))
        return lambda: self.decoder.run(count)

    def _count_experts(self, count: int) -> list[float]:
        parallel, num_experts = self.asked.parallel, self.made.model.config.n_routed_experts
        counter = ExpertCounter(parallel.share(num_experts) if parallel.experts is ExpertSplit.IDS else None)
        if parallel.size > 1 and parallel.attention is AttentionSplit.DATA:
            counter.slots = (".ffn.gather",)
        with self.made.model.ledger.observe(counter):
            for _ in range(NUM_COUNTED):
                logits_TV = self._eager(count)()
        self._check(logits_TV)
        return counter.means()

    def _check(self, logits_TV: torch.Tensor) -> None:
        """Checks a step's logits, and that no rank has missed another. Errors: ValueError; PeerLost."""
        if self.made.model.window is not None:
            torch.cuda.synchronize()
            self.made.model.window.check()
        if not logits_TV.isfinite().all():
            raise ValueError("the logits of a step are not finite")

    def _launch_facts(self, count: int) -> dict[str, object]:
        """Counts the kernels of a step by the device's own record, and times its slots where that is asked for."""
        if not self.is_on_gpu:
            return {}
        eager = record_launches(self.made.model.ledger, self._eager(count))
        if not self.asked.step.slots:
            return {"kernels": len(eager)}
        launches, of_graph = with_slots(self._replayed(count), eager)
        kinds, groups = defaultdict[str, float](float), defaultdict[str, float](float)
        for slot, us in slot_times(launches).items():
            kinds[kind_of(slot)] += us
            groups[group_of(kind_of(slot))] += us
        timed = {"slot_us": largest_first(kinds), "group_us": largest_first(groups)}
        return {"kernels": len(eager), **timed, "slots_of": "a graph" if of_graph else "an eager step"}

    def _replayed(self, count: int) -> list[DeviceLaunch]:
        """Records the kernels of one replay; nothing where there is no graph."""
        if not self.setup["captured"]:
            return []
        self._begin_together(count)
        torch.cuda.synchronize()
        self.decoder.upload(self._rows(count))
        agree(self.asked.peers, True)
        record = DeviceRecord()
        record.start()
        self.decoder.launch(count)
        return record.stop()

    def _case(self, num_rows: int, count: int, distinct: float | None) -> Case:
        """Describes a rank's step."""
        work = step_work(self.made, count, self.asked.step.context, distinct or 0.0)
        ceilings = self.asked.settings.ceilings
        floor_us = None if ceilings is None else work.floor_us(ceilings)
        label = f"{self.shape}, {self.asked.step.context} tokens{division_of(self.asked.parallel)}"
        dims = {"context": self.asked.step.context}
        return Case("step", label, dims, num_rows, work.num_bytes, work.num_flop, floor_us, distinct)


def largest_first(times: Mapping[str, float]) -> dict[str, float]:
    """Returns rounded times, the largest first."""
    return {kind: round(us, 1) for kind, us in sorted(times.items(), key=lambda pair: -pair[1])}


def kind_of(slot: str | None) -> str:
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
    """Counts the bytes that a rank must read in a step: dense weights once, each chosen expert once a layer, and each
    row's window, entries that it attends to, and index keys.

    num_rows: of this rank. distinct: experts of its own that a layer's rows choose, in the mean.
    """
    config, pool = made.model.config, made.model.caches
    parallel = made.parallel
    expert_bytes = 3 * config.hidden_size * config.moe_intermediate_size * NVFP4_BYTES_PER_PARAM
    expert_bytes /= parallel.size if parallel.experts is ExpertSplit.WIDTH else 1
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
