"""The entry point of the plugin: three registrations, and nothing else of vLLM is touched."""

import logging
import os

from ownpath.integrations.vllm.names import LOAD_FORMAT, QUANTIZATION
from ownpath.integrations.vllm.refusal import refuse_v4
from ownpath.integrations.vllm.versions import VllmRefusal, check_version, installed_package, installed_version

ARCHITECTURE = "DeepseekV4ForCausalLM"
logger = logging.getLogger("vllm.ownpath")


def register() -> None:
    """Registers the quantisation config, the model class and the load format.

    Errors: VllmRefusal for a vLLM that this plugin was not made for, naming what differs.
    """
    for warning in check_version(installed_version(), installed_package(), os.environ):
        logger.warning(warning)
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from ownpath.integrations.vllm.config import OwnpathConfig
    from ownpath.integrations.vllm.loader import DemandingLoader

    register_quantization_config(QUANTIZATION)(OwnpathConfig)
    register_model_loader(LOAD_FORMAT)(DemandingLoader)
    ModelRegistry.register_model(ARCHITECTURE, "ownpath.integrations.vllm.model:OwnpathDeepseekV4")


def register_or_refuse() -> None:
    """Registers in vLLM, which calls this in every process, maybe more than once.

    A vLLM that is refused still serves every other model; the refusal is logged, and raised for V4.
    """
    try:
        register()
    except VllmRefusal as refusal:
        logger.error(str(refusal))
        refuse_v4(refusal)
