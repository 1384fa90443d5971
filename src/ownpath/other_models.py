"""Models that are not DeepSeek-V4, each told apart in a sentence for those who load it by mistake."""

_OTHER_MODELS = {
    "deepseek_v41": "DeepSeek-V4.1 shares KV across layers, compresses it otherwise, and adds n-gram tables and a "
    "vision tower: a different model",
    "deepseek_v32": "DeepSeek-V3.2 is V3 with a sparse indexer: latent attention, no compressed layers, no "
    "hyper-connections",
    "deepseek_v3": "DeepSeek-V3 and R1 have latent attention (MLA), no compressed layers, no hyper-connections",
    "deepseek_v2": "DeepSeek-V2 has latent attention (MLA), no compressed layers, no hyper-connections",
    "kimi_k2": "Kimi K2 has DeepSeek-V3's architecture, not V4's",
    "gpt_oss": "gpt-oss is a mixture of MXFP4 experts with grouped-query attention",
    "qwen3_moe": "Qwen3-MoE is a mixture of experts with grouped-query attention",
    "mixtral": "Mixtral is a mixture of experts with grouped-query attention",
    "llama": "Llama is a dense model with grouped-query attention",
}
"""Description of other models by model_type. Their class names in ``architectures`` are the same words without "_"."""


def describe_model(model_type: object, architectures: object) -> str:
    """Says in a sentence, without its full stop, which model config.json describes, by the two fields that name one."""
    named = model_type if isinstance(model_type, str) else ""
    classes = (
        [name.lower() for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    )
    for known, sentence in _OTHER_MODELS.items():
        if named == known or any(name.startswith(f"{known.replace('_', '')}for") for name in classes):
            return sentence
    return "This one is no DeepSeek model that ownpath knows"
