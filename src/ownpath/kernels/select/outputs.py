"""The outputs of a selection: allocated for a prepared call, or checked if they are given."""

import torch

from ownpath.kernels.checks import check
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.select.types import Selected


class SelectOutputs:
    """The outputs that a prepared call of ``num_rows`` rows allocates if it is given none."""

    def __init__(self, num_rows: int, topk: int, device_index: int) -> None:
        shapes = (num_rows, topk), (num_rows,), (num_rows,)
        self._parts = tuple(EmptyOutput(shape, torch.int32, device_index) for shape in shapes)

    def new(self) -> Selected:
        """Allocates them, without values."""
        return Selected(*(part.new() for part in self._parts))


def check_selected(out: Selected, num_rows: int, topk: int, device: torch.device) -> None:
    """Checks outputs. Errors: ValueError naming the field."""
    check("out.rows_TK", out.rows_TK, (torch.int32,), (num_rows, topk), device)
    check("out.num_T", out.num_T, (torch.int32,), (num_rows,), device)
    check("out.non_finite_T", out.non_finite_T, (torch.int32,), (num_rows,), device)


def new_selected(num_rows: int, topk: int, device: torch.device) -> Selected:
    """Allocates outputs, without values, on any device."""
    shapes = (num_rows, topk), (num_rows,), (num_rows,)
    return Selected(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))
