"""Checks of a call of routed experts that kernels with packed experts share, and the key of its launches."""

from typing import Protocol

import torch

from ownpath.kernels.checks import readable_rows, require_input, require_routing
from ownpath.kernels.contract import Routing
from ownpath.kernels.nvfp4.launch import MoeCallKey
from ownpath.kernels.nvfp4.linear import require_rows


class PackedMatrix(Protocol):
    """A matrix of every expert, packed."""

    @property
    def codes(self) -> torch.Tensor: ...

    @property
    def num_cols(self) -> int: ...

    @property
    def device_index(self) -> int: ...


class CalledExperts(Protocol):
    """Packed experts, of which calls are checked against the first matrix."""

    @property
    def w13(self) -> PackedMatrix: ...


def call_key(x: torch.Tensor, routing: Routing, operand: CalledExperts) -> MoeCallKey:
    """Checks a call's inputs and returns the key of its launches; ``num_shared`` is checked when these are made.

    Errors: ValueError naming the tensor that does not fit.
    """
    (ids, weights, num_shared, expert_map), device_index = routing, operand.w13.device_index
    readable, shape, dtype = readable_rows(x, operand.w13.num_cols, device_index), ids.shape, ids.dtype
    fits = (
        readable is not None
        and len(shape) == 2
        and shape[0] == readable[0]
        and weights.shape == shape
        and (dtype is torch.int64 or dtype is torch.int32)
        and weights.dtype is torch.float32
        and ids.is_contiguous()
        and weights.is_contiguous()
        and ids.get_device() == device_index
        and weights.get_device() == device_index
    )
    if not fits or readable is None:
        _refuse(x, routing, operand)
    assert readable is not None
    map_length = -1
    if expert_map is not None:
        if expert_map.dtype is not torch.int32 or expert_map.device != x.device:
            found = f"{expert_map.dtype} on {expert_map.device}"
            raise ValueError(f"expert_map must be torch.int32 on {x.device}, found {found}")
        map_length = expert_map.shape[0]
    return readable[0], shape[1], num_shared, map_length, dtype is torch.int64, readable[1]


def _refuse(x: torch.Tensor, routing: Routing, operand: CalledExperts) -> None:
    """Raises ValueError naming the first tensor that the kernels cannot take."""
    require_input(x, operand.w13.num_cols, operand.w13.codes)
    require_routing(x, routing.ids, routing.weights)
    require_rows("x", x, operand.w13.num_cols)
    for name, tensor, dtypes in (
        ("topk_ids", routing.ids, (torch.int32, torch.int64)),
        ("topk_weights", routing.weights, (torch.float32,)),
    ):
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            wanted = " or ".join(map(str, dtypes))
            routed = [len(x), routing.ids.shape[1]]
            raise ValueError(f"{name} must be contiguous {wanted} {routed}, found {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


def check_out(out: torch.Tensor, num_tokens: int, operand: CalledExperts) -> None:
    """Checks a call's output. Errors: ValueError naming what is wrong with it."""
    require_rows("out", out, operand.w13.num_cols)
    if len(out) != num_tokens or not out.is_contiguous() or out.device != operand.w13.codes.device:
        raise ValueError(f"out must be contiguous [{num_tokens}, {operand.w13.num_cols}] on {operand.w13.codes.device}")
