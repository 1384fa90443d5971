"""The quantisation config: claims V4's checkpoints, whatever they say of themselves; hands each layer its method."""

import os
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from ownpath.formats import BF16, FP32
from ownpath.integrations.vllm.breaks import take_breaks
from ownpath.integrations.vllm.intake import Intake
from ownpath.integrations.vllm.methods import OwnpathExpertsMethod, OwnpathGroupMethod, OwnpathLinearMethod
from ownpath.integrations.vllm.names import QUANTIZATION, VARIABLE, VllmPart, chosen_parts, slot_of
from ownpath.integrations.vllm.rope import take_rope
from ownpath.integrations.vllm.seam import take_hyper
from ownpath.integrations.vllm.versions import check_device

logger = init_logger("vllm.ownpath")
_STOCK = "deepseek_v4_fp8"
_STOCK_FIELDS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""The fields that vLLM's own V4 config reads: linears are FP8 in blocks, experts what config.json says of them."""
_STOCK_LINEARS = frozenset({"native-fp8-block"})
_STOCK_EXPERTS = frozenset({"native-fp8-block", "native-mxfp4", "modelopt-nvfp4"})
"""The encodings that vLLM's own methods load from V4's names."""


class OwnpathConfig(QuantizationConfig):  # type: ignore[misc]
    """Gives layers of ours our methods, and all others vLLM's own.

    weight_block_size: ``None``, so that vLLM pads no sizes.
    """

    weight_block_size = None

    def __init__(self, fields: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.parts = chosen_parts(os.environ)
        self._fields = fields or {}
        self._intake: Intake | None = None
        self._stock: Any = None

    @classmethod
    def get_name(cls) -> str:
        """The name in vLLM."""
        return QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activations that our kernels take; float32 by the references alone."""
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that our kernels are made for."""
        return 90

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Names no files: the tensors decide formats, whether anything claims them or not."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OwnpathConfig":
        """Makes the config of a checkpoint. Errors: ValueError for a word in ``OWNPATH_VLLM`` that names no part."""
        return cls(dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims every V4 checkpoint, unless the user asks for another quantisation or for nothing of ours."""
        is_v4 = getattr(hf_config, "model_type", None) == "deepseek_v4"
        is_asked = user_quant in (None, QUANTIZATION) and bool(chosen_parts(os.environ))
        return QUANTIZATION if is_v4 and is_asked else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Returns a layer's method. Errors: as ``Intake``; ValueError for a layer that nobody can run."""
        is_experts = isinstance(layer, RoutedExperts)
        if not is_experts and not isinstance(layer, LinearBase):
            return None
        intake = self.intake
        found = slot_of(prefix, intake.whole.config.num_hidden_layers)
        if found is None:
            return self._vllm_method(layer, prefix)
        slot, part = found
        if part not in self.parts:
            return self._left_method(layer, prefix, slot)
        if is_experts:
            return OwnpathExpertsMethod(slot, intake, layer.moe_config)
        return (OwnpathGroupMethod if part is VllmPart.WO_A else OwnpathLinearMethod)(slot, intake)

    @property
    def intake(self) -> Intake:
        """The weights' intake of this model, made when the first layer asks, before vLLM makes a hyper-connection.

        Errors: as ``Intake``; VllmRefusal for a device on which our kernels have not run.
        """
        if self._intake is None:
            for warning in check_device(current_platform.get_device_capability(), os.environ):
                logger.warning(warning)
            said = take_hyper(os.environ) if VllmPart.HYPER in self.parts else ""
            rotated = take_rope() if VllmPart.ROPE in self.parts else ""
            for line in filter(None, (take_breaks(), said, rotated)):
                logger.info(line)
            vllm_config = get_current_vllm_config()
            model, device = vllm_config.model_config, vllm_config.device_config.device
            folder, invariant = model_folder(vllm_config), bool(envs.VLLM_BATCH_INVARIANT)
            self._intake = Intake(folder, torch.device(device).type, model.dtype, self.parts, invariant)
        return self._intake

    def _left_method(self, layer: torch.nn.Module, prefix: str, slot: str) -> Any:
        """Returns vLLM's method for a slot that the user left to it. Errors: ValueError where it has none."""
        encodings = self.intake.stored[slot]
        known = _STOCK_EXPERTS if isinstance(layer, RoutedExperts) else _STOCK_LINEARS
        if all(encoding.name in known for encoding in encodings):
            return self._vllm_method(layer, prefix)
        if all(encoding.format in (BF16, FP32) for encoding in encodings):
            is_experts = isinstance(layer, RoutedExperts)
            return UnquantizedFusedMoEMethod(layer.moe_config) if is_experts else UnquantizedLinearMethod()
        names = " and ".join(dict.fromkeys(encoding.name for encoding in encodings))
        raise ValueError(f"{VARIABLE} leaves {slot} to vLLM, which cannot load its {names} weights")

    def _vllm_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Returns the method of vLLM's own V4 config."""
        if self._stock is None:
            kept = {key: self._fields[key] for key in ("ignore",) if key in self._fields}
            self._stock = get_quantization_config(_STOCK).from_config(_STOCK_FIELDS | kept)
        self._stock.packed_modules_mapping = self.packed_modules_mapping
        return self._stock.get_quant_method(layer, prefix)


def model_folder(vllm_config: Any) -> Path:
    """Returns the folder of the checkpoint, which vLLM downloads if it is a name on the hub."""
    model = vllm_config.model_config
    if Path(model.model).is_dir():
        return Path(model.model)
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    patterns = ["*.safetensors", "*.json"]
    load = vllm_config.load_config
    return Path(download_weights_from_hf(model.model, load.download_dir, patterns, model.revision))
