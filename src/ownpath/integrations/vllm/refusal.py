"""Refuses V4 in a vLLM that the plugin was not made for, and leaves every other model of it alone."""

import os
from typing import Any

from ownpath.integrations.vllm.names import QUANTIZATION, chosen_parts


def refuse_v4(refusal: ValueError) -> None:
    """Registers a quantisation config that claims V4 and raises ``refusal`` then, before vLLM opens a port.

    Errors: ``refusal`` at once where this vLLM registers no quantisation configs.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    except ImportError:
        raise refusal from None

    class RefusedConfig(QuantizationConfig):  # type: ignore[misc]
        """Raises where vLLM asks whether a V4 checkpoint is ours."""

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> None:
            """Raises the refusal for V4, unless nothing of ours is asked for."""
            is_v4 = getattr(hf_config, "model_type", None) == "deepseek_v4"
            if is_v4 and chosen_parts(os.environ):
                raise refusal

    register_quantization_config(QUANTIZATION)(RefusedConfig)
