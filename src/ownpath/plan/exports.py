"""The headers of a checkpoint that a published export of a model has, from its config alone. Pure."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.drawn import DrawnValues
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.schema import MODELOPT_NVFP4, NATIVE_FP8, NATIVE_MXFP4, PLAIN_BF16, Encoding
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.config import ModelConfig
from ownpath.plan.opspec import draft_ops, model_ops

EXPORTS = ("nvidia", "full", "native")
"""Experts in NVFP4 and dense weights in FP8, as NVIDIA exports them; dense weights in NVFP4 too, but for the indexer's
and ``wo_a``; experts in MXFP4 and dense weights in FP8, as DeepSeek stores them."""
_PROJECTIONS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj")
DRAWN = "drawn"
"""The name of the folder and, with the suffix, of the file of tensors that are stored nowhere."""


def encoding_of(module: str, export: str) -> Encoding:
    """Returns an export's encoding of a module: "nvidia" has FP8 outside the experts, "full" NVFP4 there too; "native"
    has FP8 there, and MXFP4 experts."""
    leaf = module.rsplit(".", 1)[-1]
    if ".ffn.experts." in module:
        return NATIVE_MXFP4 if export == "native" else MODELOPT_NVFP4
    is_projection = leaf in _PROJECTIONS and "compressor" not in module
    if not is_projection and ".shared_experts." not in module:
        return PLAIN_BF16
    if export in ("nvidia", "native") or ".indexer." in module:
        return NATIVE_FP8
    return PLAIN_BF16 if leaf == "wo_a" else MODELOPT_NVFP4


def headers(config: ModelConfig, export: str) -> CheckpointIndex:
    """Returns the index that an export of this model would have, without drafts."""
    infos, _ = _described(config, export)
    return CheckpointIndex(Path(DRAWN), MappingProxyType(infos))


def drawn_checkpoint(
    config: ModelConfig, export: str = "nvidia", seed: int = 0, *, with_drafts: bool = False
) -> CheckpointIndex:
    """Returns the index of a checkpoint of this model that is drawn at random: whoever reads it makes the values.
    with_drafts: has the MTP modules of its config too."""
    infos, widths = _described(config, export, with_drafts)
    drawn = DrawnValues(widths, config.n_routed_experts, seed)
    return CheckpointIndex(Path(DRAWN), MappingProxyType(infos), drawn=drawn)


def _described(
    config: ModelConfig, export: str, with_drafts: bool = False
) -> tuple[dict[str, TensorInfo], Mapping[str, int]]:
    """Returns every tensor by its key, and the columns of each module's weight."""
    file, widths = Path(f"{DRAWN}.safetensors"), {"embed": config.hidden_size}
    params, ops = [*model_params(config)], [*model_ops(config)]
    if with_drafts:
        params, ops = [*params, *draft_params(config)], [*ops, *draft_ops(config)]
    infos = {spec.key: TensorInfo(spec.key, spec.dtypes[0], spec.shape, file) for spec in params}
    for op in ops:
        for module in op.modules:
            encoding, widths[module.name] = encoding_of(module.name, export), module.shape[1]
            for part in encoding.parts:
                key = encoding.key(module.name, part.role)
                dtype = "F8_E8M0" if encoding is NATIVE_FP8 and part.role == "scale" else part.dtypes[0]
                infos[key] = TensorInfo(key, dtype, part.shape(*module.shape), file)
    return infos, widths
