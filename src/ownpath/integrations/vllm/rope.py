"""The rotation of sliding layers, where vLLM 0.26 turns them by YaRN's frequencies as it does compressing layers.

DeepSeek's code scales positions in layers that compress alone, as we do, and vLLM from 0.32 on. 0.26 makes the table of
every layer by one function, from the same settings. V4's attention file calls it by name; there it is replaced by one
that gives layers without compression settings of their own: a scaling factor of 1, by which YaRN's frequencies are the
plain ones, and as many positions as the table would have had. Drafts are made of the same layers.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from ownpath.integrations.vllm.versions import VllmRefusal, installed_version, minor_of

BUILD, AFFECTED = "build_deepseek_v4_rope", "0.26"
"""The function, and the minor version that is mended."""


@dataclass(frozen=True)
class SlidingRope:
    """vLLM's ``build`` with plain frequencies for layers that do not compress."""

    build: Callable[..., Any]

    def __call__(self, config: Any, *, compress_ratio: int, **sizes: int) -> Any:
        """Returns a layer's rotation, as ``build`` does. config: vLLM's of the model; its settings stay as they are."""
        if compress_ratio <= 1 and config.rope_parameters["rope_type"] != "default":
            config = SimpleNamespace(
                rope_parameters=plain_parameters(config.rope_parameters),
                rope_theta=config.rope_theta,
                compress_rope_theta=config.compress_rope_theta,
            )
        return self.build(config, compress_ratio=compress_ratio, **sizes)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns YaRN's parameters with a factor of 1 and a table of the same length, which is context times factor."""
    length = round(parameters["original_max_position_embeddings"] * parameters["factor"])
    return dict(parameters) | {"factor": 1.0, "original_max_position_embeddings": length}


def take_rope() -> str:
    """Mends the rotation in this process's vLLM, before a model is built; returns what to say of it, if anything.

    Errors: VllmRefusal where another plugin has replaced the function.
    """
    if minor_of(installed_version()) != AFFECTED:
        return ""
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention

    return mend_rope(sys.modules[DeepseekV4Attention.__module__])


def mend_rope(file: ModuleType) -> str:
    """Replaces the function in the file of V4's attention, once. Errors: VllmRefusal, as ``take_rope``."""
    found = getattr(file, BUILD, None)
    if not isinstance(found, SlidingRope):
        if not callable(found) or not str(getattr(found, "__module__", "")).startswith("vllm."):
            words = "is not vLLM's own any more: leave rope out of OWNPATH_VLLM, or the other plugin"
            raise VllmRefusal(f"sliding layers cannot be mended, {file.__name__}.{BUILD} {words}")
        setattr(file, BUILD, SlidingRope(found))
    return f"sliding layers rotate by plain frequencies, and not by YaRN's as in vLLM {AFFECTED}"
