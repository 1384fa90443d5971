"""Makes the plan: the encoding, runner, kernel and layout of every product, decided from headers alone.

Companions (boundaries, norms, router, SwiGLU, attention) are planned the same way. The plan is made before any weight
byte is read, decides the layout that weights are loaded into, and nothing overrides it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.drafts import NO_DRAFT, Draft, carried_draft, requested_draft
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.schema import ENCODINGS, ParamSpec, check_census, check_param
from ownpath.config import ONE_RANK, ModelConfig, Parallel
from ownpath.plan.caches import PlannedCache
from ownpath.plan.claims import config_section, find_contradictions
from ownpath.plan.ops import PlannedCompanion, PlannedOp
from ownpath.plan.opspec import (
    draft_ops,
    model_ops,
)
from ownpath.plan.planner import Planner
from ownpath.plan.sections import QuantSection
from ownpath.plan.select import Caps, Choice, Demands
from ownpath.plan.sharding import Region, ShardingError, param_region


@dataclass(frozen=True)
class Plan:
    """Every op in forward order, the parameters, and the keys left unread with the reason for each.

    draft: the checkpoint's drafter, and how many of its modules are among the ops, behind the backbone's.
    contradictions: a line for each claim of config.json about formats that the tensors contradict.
    absent: drafts' and needless tensors that the index lists and no shard holds, with the shard.
    stored_dtypes: parameter -> its dtype on disk.
    unread_inputs: scales of inputs that no planned kernel reads.
    caches: the formats of keys. no_decode: why decode steps run on ``attn.core`` too; empty where they have kernels.
    no_chunks: why prompts do; empty where they have kernels.
    parallel: the plan's rank. param_regions: the regions of parameters that this rank has in part, by key.
    """

    config: ModelConfig
    caps: Caps
    demands: Demands
    ops: tuple[PlannedOp, ...]
    companions: tuple[PlannedCompanion, ...]
    params: tuple[ParamSpec, ...]
    ignored: MappingProxyType[str, str]
    contradictions: tuple[str, ...] = ()
    draft: Draft = NO_DRAFT
    parallel: Parallel = ONE_RANK
    param_regions: Mapping[str, Region] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)
    unread_inputs: tuple[str, ...] = ()
    caches: tuple[PlannedCache, ...] = ()
    no_decode: str = ""
    no_chunks: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions about values that the plan has not read, and tensors that it does without."""
        converted = [op.spec.slot for op in self.ops if op.choice.kernel.converts_scales]
        notes = []
        if converted:
            assumed = "the block scales of each matrix span at most the 18 powers of two that E4M3 has"
            notes.append(f"assumed of {len(converted)} MXFP4 operands: {assumed}; loading ends where they do not, "
                         "`ownpath inspect` looks, and `--reference MODULE` does without")  # fmt: skip
        for shard in dict.fromkeys(self.absent.values()):
            keys = [key for key, file in self.absent.items() if file == shard]
            notes.append(f"not there: {len(keys)} tensors that the index lists in {shard!r}, such as {keys[0]!r}; no "
                         "planned operation reads them")  # fmt: skip
        return tuple(notes)

    @property
    def decided(self) -> tuple["PlannedOp | PlannedCompanion", ...]:
        """Products, then companions."""
        return (*self.ops, *self.companions)

    @property
    def slots(self) -> dict[str, tuple[str, str]]:
        """slot -> (runner, kernel), for products and companions; a slot of several ops joins their names by "+"."""
        decided: dict[str, list[Choice]] = {}
        for planned in self.decided:
            decided.setdefault(planned.spec.slot, []).append(planned.choice)
        return {
            slot: (
                "+".join(dict.fromkeys(choice.kernel.runner for choice in choices)),
                "+".join(dict.fromkeys(choice.kernel.name for choice in choices)),
            )
            for slot, choices in decided.items()
        }

    @property
    def idle_slots(self) -> frozenset[str]:
        """Companions that no step runs: where chunks have a line of kernels, those that it takes the place of."""
        replaced = (".attn.core", ".attn.q_head_norm", ".attn.indexer.quantizer")
        slots = [op.spec.slot for op in self.companions]
        lines = {slot.partition(".attn.")[0] for slot in slots if slot.endswith(".attn.chunk.attend")}
        return frozenset(slot for slot in slots if slot.endswith(replaced) and slot.partition(".attn.")[0] in lines)

    def ops_of(self, slot: str) -> tuple[PlannedOp, ...]:
        return tuple(op for op in self.ops if op.spec.slot == slot)


def make_plan(
    config: ModelConfig,
    index: CheckpointIndex,
    caps: Caps,
    demands: Demands | None = None,
    *,
    loads_draft: bool = False,
    parallel: Parallel = ONE_RANK,
) -> Plan:
    """Plans every op of ``config`` for the checkpoint behind ``index`` on a device.

    loads_draft: plan the draft too.
    Errors: CheckpointError naming the tensor that is missing, unexpected, or of a wrong dtype or shape; PlanError
        naming the op that no kernel runs; ShardingError naming the module that does not divide into ranks.
    """
    demands = demands or Demands()
    planner = Planner(config, index, caps, demands, parallel)
    planner.require_cache_format()
    backbone = tuple(planner.ops(model_ops(config)))
    ops, params = backbone, tuple(model_params(config))
    draft = requested_draft(config, index) if loads_draft else carried_draft(index)
    planner.require_references(chain(model_ops(config), draft_ops(config)))
    if loads_draft:
        if config.dspark and parallel.size > 1:
            raise ShardingError(f"--draft with {parallel.size} ranks: DSpark runs on one rank")
        ops += tuple(planner.ops(draft_ops(config)))
        params += tuple(draft_params(config))
    # After the products: a module that config.json counts and the checkpoint lacks has raised by now.
    companions = planner.companions(ops, loads_draft)
    for param in params:
        check_param(index, param)
    consumed = {param.key for param in params}
    for op in ops:
        for module in (*op.spec.modules, *op.elsewhere):
            consumed.update(op.encoding.keys(module.name))
    unread_inputs = tuple(key for op in ops for key in _input_scales(op) if key in index and key not in consumed)
    consumed.update(unread_inputs)
    ignored = MappingProxyType(check_census(index, consumed, draft.unread_reason))
    # config.json's claims about experts concern the backbone's: exports leave the draft's as they were.
    contradictions = _contradictions(config, backbone, index)
    regions = {param.key: param_region(param, parallel) for param in params}
    param_regions = {key: region for key, region in regions.items() if region is not None}
    stored_dtypes = {param.key: index[param.key].dtype for param in params}
    return Plan(
        config,
        caps,
        demands,
        ops,
        companions,
        params,
        ignored,
        contradictions,
        draft,
        parallel,
        param_regions,
        index.absent,
        stored_dtypes,
        unread_inputs,
        planner.caches,
        planner.no_decode,
        planner.no_chunks,
    )


def _input_scales(op: PlannedOp) -> Iterator[str]:
    """Yields the names that the scales of an op's inputs have in its encoding, whether they are there or not."""
    named = next(encoding for encoding in ENCODINGS if encoding.name == op.stored.name)
    if named.has_input_scale:
        modules = (*op.spec.modules, *op.elsewhere)
        yield from (named.key(module.name, "input_scale") for module in modules)


def claimed_formats(config: ModelConfig) -> QuantSection:
    """Returns what config.json says about the format of each module."""
    return config_section(config.claims)


def _contradictions(config: ModelConfig, ops: tuple[PlannedOp, ...], index: CheckpointIndex) -> tuple[str, ...]:
    modules = ((module, op.encoding) for op in ops for module in (*op.spec.modules, *op.elsewhere))
    return find_contradictions(config.claims, modules, index)


def replan(plan: Plan, caps: Caps, demands: Demands) -> Plan:
    """Plans the same checkpoint for another device without reading its index again. Errors: PlanError."""
    no_index = CheckpointIndex(Path(), MappingProxyType({}))
    planner = Planner(plan.config, no_index, caps, demands, plan.parallel)
    planner.require_cache_format()
    decided_ops = (planner.decided(op.spec, op.stored, op.no_input_scale) for op in plan.ops)
    ops = tuple(replace(new, elsewhere=old.elsewhere) for new, old in zip(decided_ops, plan.ops, strict=True))
    companions = planner.companions(ops, loads_draft=plan.draft.num_modules > 0)
    decided = replace(plan, caps=caps, demands=demands, ops=ops, companions=companions)
    return replace(decided, caches=planner.caches, no_decode=planner.no_decode, no_chunks=planner.no_chunks)
