"""A load format of vLLM's that demands us: ``--load-format ownpath`` ends the start where products are not ours.

vLLM knows no way to demand a plugin, and may overrule ``--quantization`` by what config.json says. An unknown load
format it refuses. With the plugin, files are read by vLLM's default loader.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ownpath.integrations.vllm.methods import intake_of
from ownpath.integrations.vllm.names import LOAD_FORMAT, VARIABLE


class DemandingLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's default loader, for a model of ours only."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Loads as vLLM does. Errors: ValueError where no layer of the model is ours."""
        if intake_of(model) is None:
            reason = f"it is no DeepSeek-V4, or {VARIABLE} takes nothing"
            raise ValueError(f"{model_config.model}: load format {LOAD_FORMAT!r}: no layer is ownpath's: {reason}")
        super().load_weights(model, model_config)
