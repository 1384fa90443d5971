"""Takes a checkpoint's tensors from vLLM's iterator into our runners, and hands back the others.

The plan is made from the folder's headers, before vLLM builds its layers. A layer of ours then enters its slot with the
share of it that this rank has; when vLLM reads the checkpoint, each tensor of such a slot is taken by its name in the
file, checked and cut as our loader does, and every other one goes on to vLLM under DeepSeek's name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.schema import Encoding
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import EngineConfig
from ownpath.formats import BF16, FP32
from ownpath.integrations.vllm.mapped import mapped_configs
from ownpath.integrations.vllm.names import VllmPart, part_of
from ownpath.integrations.vllm.ops import SharedExperts
from ownpath.loading import device_caps, planned
from ownpath.numerics import dequantize
from ownpath.ops import OpKind
from ownpath.plan.ops import PlannedOp
from ownpath.plan.opspec import model_ops
from ownpath.plan.part import RankShare, plan_part
from ownpath.plan.plan import Plan
from ownpath.qtensor import QuantTensor
from ownpath.runners import Runner
from ownpath.runners.make import make_runners
from ownpath.runners.moe import MoeRunner
from ownpath.startup import compile_kernels
from ownpath.trace import Ledger
from ownpath.weights.feed import Feed, check_given, file_key
from ownpath.weights.operands import OperandBuffers
from ownpath.weights.stored import stored_linear

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Entered:
    """A layer of vLLM's that is ours. shape: [out, in] on this rank of its weight, or of one expert's gate above up."""

    share: RankShare
    shape: tuple[int, int]


@dataclass(frozen=True)
class TakenPart:
    """The products that this rank took, ready to run. counts: tensors taken, decoded for vLLM, left and unread."""

    plan: Plan
    runners: Mapping[str, Runner]
    ledger: Ledger
    counts: Counter[str]


class Intake:
    """One model's weights on their way from vLLM's iterator to our runners.

    folder: of the checkpoint. device, dtype: of the activations. parts: what we take. is_batch_invariant: as in
        ``EngineConfig``.
    Errors: ConfigError, CheckpointError, PlanError, as for a model that we load ourselves.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype,
        parts: frozenset[VllmPart],
        is_batch_invariant: bool = False,
    ) -> None:
        engine = EngineConfig(device=device, dtype=dtype, is_batch_invariant=is_batch_invariant)
        self.folder, self.parts = folder, parts
        self.whole, self.index = planned(folder, engine, device_caps(device))
        self.entered: dict[str, Entered] = {}
        self._taken: TakenPart | None = None

    @cached_property
    def stored(self) -> dict[str, tuple[Encoding, ...]]:
        """slot -> the encodings of its weights, each slot by itself."""
        slots = {spec.slot: RankShare() for spec in model_ops(self.whole.config)}
        found: dict[str, tuple[Encoding, ...]] = {}
        for op in plan_part(self.whole, self.index, slots).ops:
            found[op.spec.slot] = (*found.get(op.spec.slot, ()), op.stored)
        return found

    @cached_property
    def decoded(self) -> tuple[str, ...]:
        """Slots that vLLM multiplies without asking how they are stored, and that are quantised: it gets BF16."""
        plain = (BF16, FP32)
        alone = {slot: found for slot, found in self.stored.items() if part_of(slot) is None}
        return tuple(slot for slot, found in alone.items() if any(one.format not in plain for one in found))

    def enter(self, slot: str, share: RankShare, shape: tuple[int, int]) -> None:
        """Enters a layer. Errors: ValueError for a slot that another layer has."""
        if slot in self.entered:
            raise ValueError(f"{slot}: two layers of vLLM's model have this slot")
        self.entered[slot] = Entered(share, shape)

    @property
    def taken(self) -> TakenPart:
        """The products that were taken. Errors: CheckpointError where vLLM has loaded nothing."""
        if self._taken is None:
            raise CheckpointError(f"{self.folder}: vLLM gave no weights: with ownpath's runners a model must be loaded "
                                  "from its files (not load_format 'dummy')")  # fmt: skip
        return self._taken

    def take(self, weights: NamedTensors, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors that are vLLM's; takes the others. Once all are through, the runners are ready.

        Errors: CheckpointError naming a tensor that is missing, given twice or wrong; ValueError naming a slot whose
            layer has another shape in vLLM.
        """
        shares = {slot: entered.share for slot, entered in self.entered.items()}
        plan = plan_part(self.whole, self.index, shares)
        self._require_shapes(plan)
        feed, counts = Feed(plan, self.index, device), Counter[str]()
        decoded = plan_part(self.whole, self.index, dict.fromkeys(self.decoded, RankShare()))
        spare = Feed(decoded, self.index, torch.device("cpu"))
        for key, tensor in weights:
            if feed.wants(key):
                feed.take(key, tensor)
                counts["taken"] += 1
            elif spare.wants(key):
                spare.take(key, tensor)
                counts["decoded"] += 1
            else:
                rest = tuple(self._rest(key, tensor))
                counts["left" if rest else "unread"] += 1
                yield from rest
        for op, operand in zip(decoded.ops, spare.finish().operands, strict=True):
            yield from decode_modules(op, operand)
        runners = make_runners(plan, feed.finish().operands)
        compile_kernels(runners.values(), mapped_configs(runners, shares, plan.config))
        shared = {slot: SharedExperts(one) if isinstance(one, MoeRunner) else one for slot, one in runners.items()}
        self._taken = TakenPart(plan, shared, Ledger(plan.slots), counts)

    def _require_shapes(self, plan: Plan) -> None:
        found: dict[str, tuple[int, int]] = {}
        for op in plan.ops:
            local = replace(op.spec, modules=op.local_modules)
            rows = found.get(op.spec.slot, (0, 0))[0] if op.spec.kind is OpKind.LINEAR else 0
            found[op.spec.slot] = (rows + local.shape[0], local.shape[1])
        for slot, entered in self.entered.items():
            if found[slot] != entered.shape:
                message = f"{slot}: vLLM's layer is {list(entered.shape)} here, the checkpoint's {list(found[slot])}"
                raise ValueError(message)

    @cached_property
    def _named(self) -> dict[str, list[TensorInfo]]:
        """name in the file -> the tensors, by DeepSeek's names, that it holds."""
        named: dict[str, list[TensorInfo]] = {}
        for info in self.index.tensors.values():
            named.setdefault(file_key(info), []).append(info)
        return named

    @cached_property
    def _own_modules(self) -> frozenset[str]:
        """The modules of the parts that we take, whatever rank has them."""
        specs = (spec for spec in model_ops(self.whole.config) if part_of(spec.slot) in self.parts)
        return frozenset(module.name for spec in specs for module in spec.modules)

    def _rest(self, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what of a stored tensor is vLLM's, checked: nothing of another rank's, or that nobody reads."""
        if key not in self._named:
            raise CheckpointError(f"tensor {key!r} was given and is in no shard of {self.folder}")
        infos = self._named[key]
        start = min(info.start for info in infos)
        for info in infos:
            if info.name in self.whole.ignored or info.name.rpartition(".")[0] in self._own_modules:
                continue
            if info.name == key and info.shape == tuple(tensor.shape):
                part = tensor
            else:
                data = tensor.contiguous().reshape(-1).view(torch.uint8)
                part = data[info.start - start :][: info.num_bytes]
                part = part.clone().view(TORCH_DTYPES[info.dtype]).view(info.shape)
            check_given(info, part, self.whole.config.n_routed_experts)
            yield info.name, part


def decode_modules(op: PlannedOp, operand: OperandBuffers) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weight of each module of a dense product in BF16, rounded once where it is not exact."""
    rows = torch.cat([_values(shard) for shard in stored_linear(op, operand).shards])
    heights = [module.shape[0] for module in op.spec.modules]
    for module, weight in zip(op.spec.modules, rows.split(heights), strict=True):
        yield f"{module.name}.weight", weight.to(torch.bfloat16)


def _values(shard: QuantTensor) -> torch.Tensor:
    """Returns a shard's values in float32; NVFP4's global scales are one a row."""
    if shard.global_scale is None:
        return dequantize(shard, torch.float32)
    scaled = dequantize(replace(shard, global_scale=shard.global_scale.new_ones(())), torch.float32)
    return scaled * shard.global_scale.reshape(-1, 1)
