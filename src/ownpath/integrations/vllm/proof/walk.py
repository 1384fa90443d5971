"""A walk over the modules of a worker: which class holds each weight, and which method or kernel multiplies it.

Nothing is imported of vLLM: a linear layer or the routed experts say ``quant_method``, a custom operation the function
that it dispatches to, and our own methods which slot, runner and kernel they hold.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

ModuleFacts = dict[str, Any]
_KERNEL_FIELDS = ("kernel", "fp8_linear", "scheme", "moe_kernel", "nvfp4_backend", "mxfp4_backend", "fp8_backend")
"""Names under which vLLM's methods keep the kernel that they chose."""


def describe_modules(root: torch.nn.Module) -> dict[str, ModuleFacts]:
    """Returns what runs in every module that multiplies or is dispatched, by its path."""
    return {path: found for path, module in root.named_modules() if (found := _describe(module))}


def _describe(module: torch.nn.Module) -> ModuleFacts | None:
    method = getattr(module, "quant_method", None)
    if method is not None:
        found = {"class": type(module).__name__, "method": type(method).__name__, "chose": list(_chosen(method))}
        found["parameters"] = sorted(
            name for name, tensor in module.named_parameters(recurse=False) if tensor.numel() and tensor.ndim > 1
        )
        return found | _held_experts(module) | _own(method)
    backend = getattr(module, "backend_cls", None)
    if backend is not None:
        return {"class": type(module).__name__, "method": backend.__name__, "chose": []}
    dispatched = getattr(module, "_forward_method", None)
    if dispatched is not None:
        return {"class": type(module).__name__, "method": getattr(dispatched, "__name__", ""), "chose": []}
    return None


def _chosen(method: object) -> Iterator[str]:
    """Yields the kernels and backends that a method of vLLM's has settled on."""
    for field in _KERNEL_FIELDS:
        value = getattr(method, field, None)
        if value is not None:
            yield str(getattr(value, "value", "")) if hasattr(value, "value") else _named(value)


def _named(value: object) -> str:
    inner = getattr(value, "fused_experts", None)
    return type(value if inner is None else inner).__name__


def _held_experts(module: Any) -> ModuleFacts:
    """Returns which experts a module has, by their ids in the checkpoint, and its place among those that cut their
    width; nothing for a module without experts."""
    config = getattr(module, "moe_config", None)
    if config is None:
        return {}
    find, ranks = module._map_global_expert_id_to_local_expert_id, config.moe_parallel_config
    held = [expert for expert in range(config.num_experts) if find(expert) >= 0]
    return {"experts": held, "width": [ranks.tp_rank, ranks.tp_size]}


def _own(method: Any) -> ModuleFacts:
    """Returns slot, kernel and plan of a method of ours; nothing for others."""
    weights = getattr(method, "weights", None)
    taken = getattr(getattr(weights, "intake", None), "taken", None)
    if weights is None or taken is None:
        return {}
    slot = weights.slot
    runner, kernel = taken.ledger.kernels[slot][:2]
    planned = taken.plan.slots.get(slot)
    return {"slot": slot, "runner": runner, "kernel": kernel, "planned": None if planned is None else list(planned)}


def kernels_of(modules: Mapping[str, ModuleFacts], paths: Mapping[str, str]) -> dict[str, str]:
    """Names what runs behind each value. paths: value -> the module's path."""
    return {value: _kernel(modules[path]) for value, path in paths.items() if path in modules}


def _kernel(found: ModuleFacts) -> str:
    """Our kernel by its name; of vLLM's the method, with what it chose."""
    if "kernel" in found:
        return str(found["kernel"])
    own = found["class"] if found["method"].startswith("forward") else found["method"]
    parts = [*found["chose"], *([found["method"]] if own == found["class"] else [])]
    return f"{own} ({', '.join(parts)})" if parts else str(own)
