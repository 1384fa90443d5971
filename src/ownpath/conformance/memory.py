"""Checks that earlier contents of memory do not matter to a call (K02).

Every call runs twice. Before the first, each buffer that it allocates and the rows behind its input are filled with
0xFF bytes, which are NaN in every float format here and -1 in the integers; before the second, with zeros. If the
results differ, an element was never written, or was computed from memory that was not. A third call gets the negated
input: if its result equals the first one's to the bit, an earlier input was reused. (Not with one row: a softmax over
one key may be 1 whatever the query is.)
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


class FilledMemory(TorchDispatchMode):
    """While active, fills memory that is allocated uninitialised with one byte value."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would guard every operation against its compiler, which nobody uses under this mode, and import it."""
        return False

    def __init__(self, byte: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.byte = byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in _ALLOCATES:
            fill(found, self.byte)
        return found


def fill(tensor: Tensor, byte: int) -> None:
    """Overwrites every byte behind ``tensor``, whatever its dtype and strides."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw.set_(tensor.untyped_storage()).fill_(byte)


def memory_problem(call: KernelCall) -> str:
    """Describes the effect of memory on a call; empty if there is none."""
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
    """Views a tensor as bytes: [..., bytes of an element]."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def _run(call: KernelCall, byte: int) -> list[Tensor]:
    """Runs the call and copies its results."""
    first, *rest = call.args
    args = (_with_guard_rows(first, byte), *rest)
    with FilledMemory(byte):
        result = call.run(*args)
    return [tensor.clone() for tensor in tensors_of(result)]


def _with_guard_rows(x: Tensor, byte: int) -> Tensor:
    """Returns x as the front of a larger buffer whose further rows are filled."""
    whole = x.new_empty(len(x) + GUARD_ROWS, *x.shape[1:])
    fill(whole, byte)
    whole[: len(x)] = x
    return whole[: len(x)]
