"""Makes a checkpoint of one decoder layer in memory only: headers, then operands and parameters of random values.

The values are valid and of sensible size: weights have a standard deviation near 1/sqrt(in), fused shards and experts
differ in their global scales, norms are near one. The same seed gives the same values in any planned layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from ownpath.bench.published import ONE_LAYER, SHAPES, SMALL_VOCAB
from ownpath.checkpoint.dtypes import TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import model_params
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8, PLAIN_BF16, Encoding, ParamSpec
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import ModelConfig
from ownpath.plan.opspec import model_ops
from ownpath.plan.plan import Plan
from ownpath.weights.operands import Destination, OperandBuffers, make_operand

RATIOS = MappingProxyType({"sliding": 0, "csa": 4, "hca": 128})

E2M1_RMS = 2.926  # of the 16 codes, each as likely as the others


def layer_config(shape: str, layer: str, routing: str) -> ModelConfig:
    """Returns one layer's config at a published shape. layer: "sliding", "csa", "hca"; routing: "hash" or "score"."""
    own = {"compress_ratios": [RATIOS[layer]], "num_hash_layers": int(routing == "hash")}
    return ModelConfig.from_dict(SHAPES[shape] | ONE_LAYER | SMALL_VOCAB | own)


def encoding_of(module: str, export: str) -> Encoding:
    """Returns an export's encoding of a module: "nvidia" has FP8 outside the experts, "full" has NVFP4 there too."""
    leaf = module.rsplit(".", 1)[-1]
    if ".ffn.experts." in module:
        return MODELOPT_NVFP4
    is_projection = leaf in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b") and "compressor" not in module
    if not is_projection and ".shared_experts." not in module:
        return PLAIN_BF16
    if export == "nvidia" or ".indexer." in module:
        return NATIVE_FP8
    return PLAIN_BF16 if leaf == "wo_a" else MODELOPT_NVFP4


def headers(config: ModelConfig, export: str) -> CheckpointIndex:
    """Returns the index that a checkpoint of this layer would have."""
    file = Path("synthetic.safetensors")
    infos = {spec.key: TensorInfo(spec.key, spec.dtypes[0], spec.shape, file) for spec in model_params(config)}
    for op in model_ops(config):
        for module in op.modules:
            encoding = encoding_of(module.name, export)
            for part in encoding.parts:
                key = encoding.key(module.name, part.role)
                dtype = "F8_E8M0" if encoding is NATIVE_FP8 and part.role == "scale" else part.dtypes[0]
                infos[key] = TensorInfo(key, dtype, part.shape(*module.shape), file)
    return CheckpointIndex(Path("synthetic"), MappingProxyType(infos))


@dataclass(frozen=True)
class Values:
    """Random values on a device, reproducible: they depend on the seed and on the order of calls."""

    device: torch.device
    generator: torch.Generator

    @classmethod
    def of_seed(cls, device: torch.device, seed: int) -> "Values":
        return cls(device, torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, shape: torch.Size) -> torch.Tensor:
        """Returns uint8 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.uint8)

    def operands(self, plan: Plan, index: CheckpointIndex) -> Iterator[OperandBuffers]:
        """Yields filled operands in the order of ``plan.ops``."""
        stored = {name: info.dtype for name, info in index.tensors.items()}
        for op in plan.ops:
            operand = make_operand(op, stored, self.device)
            width = {key: m.shape[1] for m in op.spec.modules for key in op.encoding.keys(m.name)}
            for slot in operand.destinations:
                self._fill(slot, width[slot.key])
            yield operand

    def _fill(self, slot: Destination, width: int) -> None:
        target = slot.target
        gain = width**-0.5
        if slot.role == "global_scale":
            spread = torch.rand((), generator=self.generator, device=self.device) * 0.5 + 0.75
            target.fill_(gain / E2M1_RMS * spread)
        elif slot.role == "input_scale":
            target.fill_(0.01)
        elif target.dtype == torch.uint8:
            target.copy_(self.integers(0, 256, target.shape))
        elif target.dtype == torch.float8_e8m0fnu:  # about 2^-5 / sqrt(in), for codes of about 2^5
            low = 127 - 5 - (width.bit_length() - 1) // 2
            target.view(torch.uint8).copy_(self.integers(low - 1, low + 1, target.shape))
        elif slot.role == "scale":  # E4M3 from 0.5 to 1.875
            target.view(torch.uint8).copy_(self.integers(0x30, 0x40, target.shape))
        elif target.dtype == torch.float8_e4m3fn:
            target.copy_((self.normal(*target.shape) * 32).clamp(-448, 448))
        else:
            target.copy_(self.normal(*target.shape) * gain)

    def table(self, num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
        """Draws distinct experts for each token id, uniformly: int64 [num_tokens, top_k]."""
        order = torch.rand(num_tokens, num_experts, generator=self.generator, device=self.device)
        return order.argsort(dim=1)[:, :top_k].contiguous()

    def params(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Returns a layer's parameters."""
        return {spec.key: self._param(spec, config) for spec in model_params(config)}

    def _param(self, spec: ParamSpec, config: ModelConfig) -> torch.Tensor:
        if spec.key.endswith("tid2eid"):
            num_tokens, top_k = spec.shape
            return self.table(num_tokens, top_k, config.n_routed_experts)
        noise = self.normal(*spec.shape)
        if spec.key.endswith("norm.weight"):
            noise = 1 + 0.1 * noise
        elif spec.key.endswith("_fn"):
            noise *= spec.shape[-1] ** -0.5
        elif not spec.key.endswith("embed.weight"):
            noise = 0.3 * noise + float(spec.key.endswith("_scale"))
        return noise.to(TORCH_DTYPES[spec.dtypes[0]])
