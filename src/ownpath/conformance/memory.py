"""What lies in memory before a call must not matter (K02).

Every call runs twice. Before the first, each buffer that it allocates and the rows behind its input are filled with
0xFF bytes, which are NaN in every float format here and -1 in the integers; before the second, with zeros. A result
that differs holds an element that nobody wrote, or was made from one. A third call has the input's negative: a result
that is the first one's to the bit was made from an input that was kept. (Not of one row: a softmax over one key may be
1 whatever the query is.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ownpath.conformance.call import KernelCall, tensors_of

GUARD_ROWS = 128
FILLS = (0xFF, 0x00)
_ALLOCATES = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}


class Filled(TorchDispatchMode):
    """While it is entered, memory that is allocated without contents has some: one byte, everywhere."""

    def __init__(self, byte: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.byte = byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in _ALLOCATES:
            fill(found, self.byte)
        return found


def fill(tensor: Tensor, byte: int) -> None:
    """Every byte behind ``tensor``, whatever its dtype and strides."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw.set_(tensor.untyped_storage()).fill_(byte)


def memory_problem(call: KernelCall) -> str:
    """What memory did to a call, or nothing."""
    first, second = (_run(call, byte) for byte in FILLS)
    for nan, zero in zip(first, second, strict=True):
        differing = int((_bits(nan) != _bits(zero)).any(-1).sum()) if nan.ndim else int(nan != zero)
        if differing:
            return f"{differing} elements depend on what was in memory"
        if nan.is_floating_point() and not bool(nan.isfinite().all()):
            return f"{int((~nan.isfinite()).sum())} of {nan.numel()} elements are not finite"
    floats = [tensor for tensor in first if tensor.is_floating_point()]
    if not any(bool(tensor.any()) for tensor in floats):
        return "every element is zero"
    x, *rest = call.args
    if len(x) == 1:
        return ""
    other = _run(call.with_args(-x, *rest), FILLS[0])
    is_same = all(torch.equal(_bits(one), _bits(two)) for one, two in zip(first, other, strict=True))
    return "another input gives the same result: it is made from an input that was kept" if is_same else ""


def _bits(tensor: Tensor) -> Tensor:
    """[..., bytes of an element]."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def _run(call: KernelCall, byte: int) -> list[Tensor]:
    """The results' copies."""
    first, *rest = call.args
    args = (_guarded(first, byte), *rest)
    with Filled(byte):
        result = call.run(*args)
    return [tensor.clone() for tensor in tensors_of(result)]


def _guarded(x: Tensor, byte: int) -> Tensor:
    """x with rows behind it that are not its own."""
    whole = x.new_empty(len(x) + GUARD_ROWS, *x.shape[1:])
    fill(whole, byte)
    whole[: len(x)] = x
    return whole[: len(x)]
