"""The tensors of a decode attention call, and the key of its prepared launches."""

from typing import NamedTuple

import torch

from ownpath.kernels.attend.types import DecodeKeys, DecodeRows
from ownpath.kernels.checks import VECTOR_BYTES

AttendCallKey = tuple[torch.Size, tuple[int, ...], int, int, tuple[tuple[torch.Size, torch.dtype], ...]]
"""Shape, strides and device of q, the ratio, shapes and dtypes of the other tensors."""


class AttendArguments(NamedTuple):
    """The tensors of a call. An absent one is replaced by one that is not read."""

    q_TNH: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    window: torch.Tensor
    entries: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    blocks_TB: torch.Tensor
    selected_TK: torch.Tensor
    num_selected_T: torch.Tensor

    @classmethod
    def of(
        cls, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: DecodeKeys, rows: DecodeRows
    ) -> "AttendArguments":
        entries = keys.window if keys.entries is None else keys.entries
        selected = rows.positions_T if rows.selected_TK is None else rows.selected_TK
        counts = rows.positions_T if rows.num_selected_T is None else rows.num_selected_T
        places = rows.positions_T, rows.slots_T, rows.blocks_TB
        return cls(q_TNH, cos_TF, sin_TF, keys.window, entries, *places, selected, counts)

    def key(self, ratio: int) -> AttendCallKey:
        """Returns the key of the prepared call."""
        others = tuple((tensor.shape, tensor.dtype) for tensor in self[1:])
        return self.q_TNH.shape, self.q_TNH.stride(), self.q_TNH.get_device(), ratio, others

    def addresses(self) -> list[int] | None:
        """Returns their addresses; ``None`` if one is not aligned, or one but q not contiguous."""
        found, together = [tensor.data_ptr() for tensor in self], 0
        for address in found:
            together |= address
        return None if together % VECTOR_BYTES or not all(tensor.is_contiguous() for tensor in self[1:]) else found
