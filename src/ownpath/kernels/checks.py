"""Operand checks before a launch: a wrong tensor raises a ValueError that names it. A check takes about 1 us."""

import torch

VECTOR_BYTES = 16
"""Alignment that the kernels' widest loads assume."""
SPARE_MULTIPLE = 8
"""Of the spare rows of rings: FP8 pages of such a length are aligned."""


def check(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Checks a tensor. Errors: ValueError naming the operand for a wrong dtype, shape, device, stride or alignment."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, found {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, found {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the first operand on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, found strides {list(tensor.stride())}")
    check_alignment(name, tensor)


def check_spare(spare: int) -> None:
    """Checks by how many rows rings are longer than one row of a request needs. Errors: ValueError."""
    if spare < 0 or spare % SPARE_MULTIPLE:
        raise ValueError(f"spare must be a multiple of {SPARE_MULTIPLE}, found {spare}")


def is_dense(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns True for a contiguous, aligned tensor of this dtype. Quicker than ``check``, which checks more."""
    return tensor.dtype is dtype and tensor.is_contiguous() and not tensor.data_ptr() % VECTOR_BYTES


def readable_rows(x: torch.Tensor, width: int, device_index: int) -> tuple[int, int, int] | None:
    """Returns rows, pitch in elements and address of x [rows, width]; ``None`` if the copy engine cannot read it.

    It reads a bfloat16 matrix of its device, with contiguous rows at multiples of 16 bytes.
    """
    if x.ndim != 2 or x.dtype is not torch.bfloat16:
        return None
    (num_rows, found), (pitch, step), address = x.shape, x.stride(), x.data_ptr()
    is_aligned = not (2 * pitch | address) & 15
    fits = is_aligned and step == 1 and found == width and x.get_device() == device_index
    return (num_rows, pitch, address) if fits else None


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    """Checks the address. Errors: ValueError when the first element is not at a multiple of 16 bytes."""
    if tensor.data_ptr() % VECTOR_BYTES:
        raise ValueError(f"{name} must start at a multiple of {VECTOR_BYTES} bytes")


def check_rank(name: str, tensor: torch.Tensor, rank: int, runs_on_cpu: bool) -> None:
    """Checks the first operand's rank and that the kernel can access its device. Errors: ValueError naming it."""
    if tensor.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, found shape {list(tensor.shape)}")
    if not tensor.is_cuda and not runs_on_cpu:
        raise ValueError(f"{name} is on {tensor.device}; this kernel runs on CUDA")


def require(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Checks dtype and shape. Errors: ValueError naming an operand whose dtype or shape is not the expected one."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, found {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, found {list(tensor.shape)}")


def require_input(x: torch.Tensor, in_features: int, operand: torch.Tensor) -> None:
    """Checks that activations fit the operand: last dimension, float dtype, same device. Errors: ValueError."""
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    require_activations(x, operand.device)


def require_activations(x: torch.Tensor, device: torch.device) -> None:
    """Checks that activations are floating point, on the operand's device. Errors: ValueError."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, found {x.dtype}")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, the weight on {device}")


def require_routing(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Checks that each row of x has expert ids and weights. Errors: ValueError naming the tensor that does not fit."""
    routed = (x.shape[0], topk_ids.shape[-1])
    require("topk_ids", topk_ids, (torch.int32, torch.int64), routed)
    require("topk_weights", topk_weights, (torch.float32, torch.float64), routed)
