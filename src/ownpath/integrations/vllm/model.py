"""V4's model class in vLLM with one method of ours: ``load_weights``, which takes our tensors first."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM

from ownpath.integrations.vllm.intake import Intake
from ownpath.integrations.vllm.methods import OwnpathExpertsMethod, OwnpathGroupMethod, OwnpathLinearMethod
from ownpath.integrations.vllm.report import report_lines

logger = init_logger("vllm.ownpath")


class OwnpathDeepseekV4(DeepseekV4ForCausalLM):  # type: ignore[misc]
    """vLLM's V4 whose weights go by checkpoint name to our runners, before any mapper; what is left goes to vLLM."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Returns the parameters that vLLM loaded. Errors: as ``Intake.take``."""
        intake = intake_of(self)
        if intake is None:
            loaded: set[str] = super().load_weights(weights)
            return loaded
        adopt_groups(self)
        device = next(self.parameters()).device
        loaded = super().load_weights(intake.take(weights, device))
        for line in report_lines(intake, is_first=get_tensor_model_parallel_rank() == 0):
            logger.info(line)
        return loaded


def intake_of(model: torch.nn.Module) -> Intake | None:
    """Returns the intake of a model's layers; ``None`` where none of them is ours."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, OwnpathLinearMethod | OwnpathExpertsMethod):
            return method.weights.intake
    return None


def adopt_groups(model: torch.nn.Module) -> None:
    """Puts our product in the place of ``_o_proj`` where ``wo_a`` is ours.

    vLLM computes ``wo_a`` in its attention's ``_o_proj``, from the weight itself and not by calling the layer. The
    attribute is set on each attention layer, not on a class. The layer's method is made anew, because vLLM's CPU
    attention has wrapped that of the old one, to pack a weight that is not there.
    """
    for module in model.modules():
        wo_a: Any = getattr(module, "wo_a", None)
        method = getattr(wo_a, "quant_method", None)
        if isinstance(method, OwnpathGroupMethod):
            wo_a.quant_method = OwnpathGroupMethod(method.weights.slot, method.weights.intake)
            vars(module)["_o_proj"] = partial(wo_a.quant_method.o_proj, module)
