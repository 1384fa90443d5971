"""Operand checks shared by the runners: a wrong tensor is an error that names it, before anything is computed."""

import torch


def require(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Errors: ValueError naming the operand when its dtype or shape is not the expected one."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, found {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, found {list(tensor.shape)}")


def require_input(x: torch.Tensor, in_features: int, operand: torch.Tensor) -> None:
    """Errors: ValueError when activations do not fit the operand: last dimension, float dtype, same device."""
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, found {x.dtype}")
    if x.device != operand.device:
        raise ValueError(f"x is on {x.device}, the weight on {operand.device}")


def require_routing(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Errors: ValueError naming what does not give each row of x its experts and their weights."""
    routed = (x.shape[0], topk_ids.shape[-1])
    require("topk_ids", topk_ids, (torch.int32, torch.int64), routed)
    require("topk_weights", topk_weights, (torch.float32, torch.float64), routed)
