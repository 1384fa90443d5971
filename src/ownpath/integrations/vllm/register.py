"""The entry point of the plugin: two registrations, and nothing else of vLLM is touched."""

ARCHITECTURE = "DeepseekV4ForCausalLM"


def register() -> None:
    """Registers the quantisation config and the model class; vLLM calls it in every process, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ownpath.integrations.vllm.config import NAME, OwnpathConfig

    register_quantization_config(NAME)(OwnpathConfig)
    ModelRegistry.register_model(ARCHITECTURE, "ownpath.integrations.vllm.model:OwnpathDeepseekV4")
