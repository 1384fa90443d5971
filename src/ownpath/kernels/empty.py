"""Allocates the outputs of prepared calls: shape, strides and dtype are resolved once.

On an H200's host ``new_empty`` takes 2.1 us, the allocation that torch's compiled code uses 1.2.
"""

import torch

_empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]  # not in its stubs


class EmptyOutput:
    """A contiguous tensor of a call, allocated anew by every ``new``."""

    __slots__ = ("_device_index", "_dtype", "_shape", "_strides")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device_index: int) -> None:
        self._shape, self._dtype, self._device_index = tuple(shape), dtype, device_index
        self._strides = torch.empty(self._shape, device="meta").stride()

    def new(self) -> torch.Tensor:
        """Allocates it on the current stream, without values."""
        if torch._C._cuda_getDevice() == self._device_index:
            tensor: torch.Tensor = _empty_strided_cuda(self._shape, self._strides, self._dtype)
            return tensor
        return torch.empty(self._shape, dtype=self._dtype, device=torch.device("cuda", self._device_index))
