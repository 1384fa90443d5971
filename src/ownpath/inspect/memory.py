"""Measures the memory of the model on each kind of device: operands and tables as planned, caches as declared.

Everything is allocated on torch's ``meta`` device, which has shapes and no memory.
"""

from dataclasses import dataclass
from math import prod

import torch

from ownpath.cache.pools import CacheSpec
from ownpath.cache.snapshot import snapshot_bytes
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.plan.caches import cache_lack
from ownpath.plan.errors import PlanError
from ownpath.plan.ops import PlannedOp
from ownpath.plan.plan import Plan, replan
from ownpath.plan.select import Caps, Demands
from ownpath.plan.tiling import planned_tensors
from ownpath.weights.operands import make_operand

_PACKAGES = frozenset({"triton"})
KINDS = (Caps("cpu", "CPU"), Caps("cuda", "sm_90", 90, _PACKAGES), Caps("cuda", "sm_100", 100, _PACKAGES))
"""The kinds of device that the catalogue tells apart, with every package that a kernel can ask for."""


@dataclass(frozen=True)
class CacheMemory:
    """The caches in one format. token_bytes: of one more token. request_bytes: of windows and states, at any length.
    snapshot_bytes: of a snapshot for later requests, at any length.

    refusal: why the model's keys do not fit the format.
    """

    format: CacheFormat
    token_bytes: float = 0.0
    request_bytes: int = 0
    snapshot_bytes: int = 0
    refusal: str = ""


@dataclass(frozen=True)
class Memory:
    """weights_bytes: all operands and tables. cache_bytes: one sequence of ``num_tokens``, in BF16. refusal: why it
    cannot run. caches: by format.

    Step buffers and the allocator's own share come on top.
    """

    device: str
    activations: str
    weights_bytes: int
    cache_bytes: int
    num_tokens: int
    refusal: str | None = None
    caches: tuple[CacheMemory, ...] = ()


def memory_needed(plan: Plan, index: CheckpointIndex) -> tuple[Memory, ...]:
    """Returns one entry per kind of device, for the checkpoint behind ``plan``, whichever device that was made for."""
    num_tokens = min(EngineConfig.max_model_len, plan.config.max_position_embeddings)
    return tuple(_memory_on(caps, plan, index, num_tokens) for caps in KINDS)


def _memory_on(caps: Caps, first: Plan, index: CheckpointIndex, num_tokens: int) -> Memory:
    engine = EngineConfig.for_device(caps.device_type, num_tokens)
    dtype = str(engine.dtype).removeprefix("torch.")
    cache = cache_bytes(first, num_tokens, engine.dtype)
    caches = tuple(_cache_memory(first, engine.dtype, cache_format) for cache_format in CacheFormat)
    try:
        plan = replan(first, caps, Demands(dtype, reference=first.demands.reference))
    except PlanError as error:
        return Memory(caps.name, dtype, 0, cache, num_tokens, str(error), caches)
    return Memory(caps.name, dtype, weights_bytes(plan, index), cache, num_tokens, None, caches)


def cache_bytes(plan: Plan, num_tokens: int, dtype: torch.dtype, cache_format: CacheFormat = CacheFormat.BF16) -> int:
    """Returns the bytes of the caches of one sequence of ``num_tokens``; in BF16, keys have ``dtype``."""
    return _spec(plan, num_tokens, dtype, cache_format).sequence_bytes


def _cache_memory(plan: Plan, dtype: torch.dtype, cache_format: CacheFormat) -> CacheMemory:
    lack = cache_lack(plan.config, Demands(cache_format=cache_format))
    if lack:
        return CacheMemory(cache_format, refusal=lack)
    spec = _spec(plan, 0, dtype, cache_format)
    return CacheMemory(cache_format, spec.token_bytes, spec.slot_bytes, snapshot_bytes(spec))


def _spec(plan: Plan, num_tokens: int, dtype: torch.dtype, cache_format: CacheFormat) -> CacheSpec:
    meta, num_drafts = torch.device("meta"), plan.draft.num_modules
    return CacheSpec(plan.config, num_tokens, dtype, meta, num_drafts, cache_format=cache_format)


def weights_bytes(plan: Plan, index: CheckpointIndex) -> int:
    """Returns the bytes of all operands and tables of a plan, of its rank, or of a part of one.

    Operands of one shape and encoding are measured once: a model has dozens of layers and few kinds of them.
    """
    sizes: dict[object, int] = {}
    total = 0
    for op in plan.ops:
        dtypes = tuple(index[key].dtype for key in op.encoding.keys(op.spec.modules[0].name))
        kind = (
            op.spec.kind,
            op.choice.kernel,
            op.encoding.name,
            dtypes,
            tuple(module.shape for module in op.local_modules),
        )
        if kind not in sizes:
            sizes[kind] = _operand_bytes(op, index)
        total += sizes[kind]
    for param in plan.params:
        region = plan.param_regions.get(param.key)
        shape = param.shape if region is None else region.shape(param.shape)
        total += prod(shape) * TORCH_DTYPES[param.memory_dtype(index[param.key].dtype)].itemsize
    return total


def replicated_bytes(plan: Plan, index: CheckpointIndex) -> int:
    """Returns the bytes of tensors, as they are stored, that every rank has whole."""
    return sum(index[tensor.key].num_bytes for tensor in planned_tensors(plan) if tensor.is_replicated)


def _operand_bytes(op: PlannedOp, index: CheckpointIndex) -> int:
    keys = (key for module in op.spec.modules for key in op.encoding.keys(module.name))
    return make_operand(op, {key: index[key].dtype for key in keys}, torch.device("meta")).num_bytes
