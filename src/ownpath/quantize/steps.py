"""Plans the steps and shards of a quantised checkpoint from headers, before any weight is read.

A *step* is written as a unit: one tensor carried over as it is, or one or two weights that become NVFP4 (two where they
share a global scale: a runner multiplies gate and up as one matrix).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ownpath.checkpoint.detect import detect
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import expert_modules
from ownpath.checkpoint.schema import Encoding, ModuleSpec
from ownpath.config import ModelConfig
from ownpath.formats import NVFP4

NVFP4_COLUMNS = 16


class QuantizeScope(StrEnum):
    """The weights that become NVFP4."""

    EXPERTS = "experts"
    """The backbone's routed experts, as NVIDIA publishes DeepSeek-V4."""
    FULL = "full"
    """These, the attention's large projections except ``wo_a``, and the shared experts."""


@dataclass(frozen=True)
class Carry:
    """One tensor that is written as it was read."""

    key: str
    num_bytes: int


@dataclass(frozen=True)
class Convert:
    """Weights that become NVFP4 with one global scale, and their present encoding."""

    modules: tuple[ModuleSpec, ...]
    source: Encoding

    @property
    def num_bytes(self) -> int:
        return sum(n * k // 2 + n * k // 16 + 8 for n, k in (module.shape for module in self.modules))

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that are converted instead of carried over."""
        return tuple(key for module in self.modules for key in self.source.keys(module.name))


WriteStep = Carry | Convert


def plan_steps(index: CheckpointIndex, config: ModelConfig, scope: QuantizeScope) -> list[WriteStep]:
    """Returns the steps in the order of the source's shards, so that each shard is read once.

    Errors: CheckpointError naming a weight that is missing, has another shape, or cannot become NVFP4.
    """
    converts = [Convert(group, _encoding(index, group)) for group in _groups(config, scope)]
    read = {key: convert for convert in converts for key in convert.keys}
    converted = {module.name for convert in converts for module in convert.modules}
    steps: dict[WriteStep, None] = {}
    for key, info in sorted(index.tensors.items(), key=lambda item: (item[1].file, item[0])):
        if key not in read and key.rpartition(".")[0] in converted:
            continue  # a scale of the input: the weight's new parts replace it
        steps[read.get(key) or Carry(key, info.num_bytes)] = None
    return list(steps)


def plan_shards(steps: Sequence[WriteStep], max_shard_bytes: int) -> list[list[WriteStep]]:
    """Groups steps into shards of at most ``max_shard_bytes``; a larger step gets its own shard."""
    shards: list[list[WriteStep]] = []
    room = 0
    for step in steps:
        if not shards or step.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(step)
        room -= step.num_bytes
    return shards


def _groups(config: ModelConfig, scope: QuantizeScope) -> Iterator[tuple[ModuleSpec, ...]]:
    """Yields groups that share a global scale: gate and up of an expert; every other weight has its own."""
    dim, inter = config.hidden_size, config.moe_intermediate_size
    for layer_idx in range(config.num_hidden_layers):
        layer = f"layers.{layer_idx}"
        gates, ups, downs = (expert_modules(config, layer, projection) for projection in ("w1", "w3", "w2"))
        yield from zip(gates, ups, strict=True)
        yield from ((down,) for down in downs)
        if scope is QuantizeScope.FULL:
            shared = f"{layer}.ffn.shared_experts"
            yield ModuleSpec(f"{shared}.w1", (inter, dim)), ModuleSpec(f"{shared}.w3", (inter, dim))
            yield (ModuleSpec(f"{shared}.w2", (dim, inter)),)
            yield from ((module,) for module in _projections(config, f"{layer}.attn"))


def _projections(config: ModelConfig, attn: str) -> Iterator[ModuleSpec]:
    dim, rank = config.hidden_size, config.q_lora_rank
    yield ModuleSpec(f"{attn}.wq_a", (rank, dim))
    yield ModuleSpec(f"{attn}.wkv", (config.head_dim, dim))
    yield ModuleSpec(f"{attn}.wq_b", (config.num_attention_heads * config.head_dim, rank))
    yield ModuleSpec(f"{attn}.wo_b", (dim, config.o_groups * config.o_lora_rank))


def _encoding(index: CheckpointIndex, group: tuple[ModuleSpec, ...]) -> Encoding:
    """Returns the encoding of a group's weights. Errors: CheckpointError naming the weight."""
    found = [detect(index, module) for module in group]
    for module, encoding in zip(group, found, strict=True):
        if encoding.format is NVFP4:
            raise CheckpointError(f"{index.folder}: {module.name} is {NVFP4} already ({encoding.name})")
        if module.shape[1] % NVFP4_COLUMNS:
            columns = f"a multiple of {NVFP4_COLUMNS} columns, it has {module.shape[1]}"
            raise CheckpointError(f"{index.folder}: {module.name} cannot become {NVFP4}, which needs {columns}")
    if len(set(found)) > 1:
        named = ", ".join(f"{module.name} is {one.name}" for module, one in zip(group, found, strict=True))
        raise CheckpointError(f"{index.folder}: {named}: weights that share a global scale must be stored alike")
    return found[0]
