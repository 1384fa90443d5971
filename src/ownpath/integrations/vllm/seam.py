"""The hyper-connections' seam in vLLM: names of one file of its V4 model, replaced once for each model that is built.

V4's file for NVIDIA imports five functions and calls them by name; that for CPUs makes modules of four classes. Nothing
else reaches them through that file, so the patch changes V4 (and drafts made of V4's layers) and no other model.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ownpath.integrations.vllm.hyper import HYPERS, Hyper, choose_kernel
from ownpath.integrations.vllm.versions import VllmRefusal

NVIDIA, CPU = "vllm.models.deepseek_v4.nvidia.model", "vllm.models.deepseek_v4.cpu.model"


class HyperModule(torch.nn.Module):
    """A module of vLLM's that calls one of our operations. It has no parameters: vLLM passes them."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call

    def forward(self, *given: Any, **named: Any) -> Any:
        """Computes the operation."""
        return self._call(*given, **named)


def replacements(module: str, hyper: Hyper) -> Mapping[str, Callable[..., Any]]:
    """Returns what each name of a model's file becomes. Errors: VllmRefusal for a file without a known seam."""
    if module == NVIDIA:
        return {
            "mhc_pre_tilelang": hyper.pre,
            "mhc_pre_broadcast_tilelang": hyper.pre_broadcast,
            "mhc_fused_post_pre_tilelang": hyper.fused,
            "mhc_post_tilelang": hyper.post,
            "hc_head_fused_kernel_tilelang": hyper.head,
        }
    if module == CPU:
        calls: Mapping[str, Callable[..., Any]] = {
            "MHCPreOp": hyper.pre,
            "MHCPostOp": hyper.post,
            "MHCFusedPostPreOp": hyper.fused,
            "HCHeadOp": hyper.head,
        }
        return {name: partial(HyperModule, call) for name, call in calls.items()}
    raise VllmRefusal(f"ownpath knows no seam for hyper-connections in {module}: leave hyper out of OWNPATH_VLLM")


def install_hyper(model_file: ModuleType, kernel: str) -> str:
    """Replaces vLLM's hyper-connections in the file of its V4 model, and returns what to say of it.

    It may be called again: each model gets operations of its own. Errors: VllmRefusal naming what is not vLLM's any
    more, because somebody else has replaced it; nothing is replaced then.
    """
    name = model_file.__name__
    new = replacements(name, HYPERS.new(kernel))
    foreign = [f"{name}.{key}" for key in new if not _is_replaceable(getattr(model_file, key, None))]
    if foreign:
        words = "are not vLLM's own any more: leave hyper out of OWNPATH_VLLM, or the other plugin"
        raise VllmRefusal(f"hyper-connections cannot be replaced, {', '.join(foreign)} {words}")
    for key, value in new.items():
        setattr(model_file, key, value)
    others = "" if kernel.startswith("ref.") else "; after the last layer, twice a step, the torch reference"
    return f"hyper-connections: {kernel} in place of vLLM's ({', '.join(new)}){others}"


def installed_kernel(model_file: ModuleType) -> str | None:
    """Returns the kernel of our hyper-connections in the file of vLLM's V4 model; ``None`` where they are vLLM's."""
    for name in ("mhc_fused_post_pre_tilelang", "MHCFusedPostPreOp"):
        value = getattr(model_file, name, None)
        calls = (value, *getattr(value, "args", ()))
        for owner in (getattr(call, "__self__", None) for call in calls):
            if isinstance(owner, Hyper):
                return owner.kernel
    return None


def _is_replaceable(value: object) -> bool:
    """True for vLLM's own function or class, and for ours."""
    is_ours = isinstance(getattr(value, "__self__", None), Hyper) or getattr(value, "func", None) is HyperModule
    return is_ours or str(getattr(value, "__module__", "")).startswith("vllm.")


def take_hyper(environment: Mapping[str, str]) -> str:
    """Installs our hyper-connections in this process's vLLM, before a model is built; returns what to say of it.

    Errors: VllmRefusal, as ``choose_kernel`` and ``install_hyper``.
    """
    from vllm import envs
    from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    sm = None if capability is None else 10 * capability.major + capability.minor
    kernel = choose_kernel(environment, sm, bool(envs.VLLM_BATCH_INVARIANT))
    return install_hyper(sys.modules[DeepseekV4ForCausalLM.__module__], kernel)
