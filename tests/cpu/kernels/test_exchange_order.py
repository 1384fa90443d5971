"""Epochs of exchanges by name; and columns of more rows than a window has room for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ownpath.kernels.exchange.order import ExchangeOrder
from ownpath.ranks.peers import Alone
from ownpath.runners.exchange import GatherColumns, Reduce


def test_an_epoch_is_named_after_its_exchange() -> None:
    """A graph of three exchanges is captured between others, and replayed twice."""
    order = ExchangeOrder()
    order.note("a", is_captured=False)
    for slot in ("b", "c", "d"):
        order.note(slot, is_captured=True)
    graph = order.take_captured()
    assert order.take_captured() == ()
    order.note("e", is_captured=False)
    order.replayed(graph)
    order.replayed(graph)
    assert [order.slot_of(epoch) for epoch in range(1, 9)] == ["a", "e", "b", "c", "d", "b", "c", "d"]
    assert order.slot_of(9) is None
    assert order.slot_of(0) is None


def test_epochs_wrap_as_the_device_counts_them() -> None:
    order = ExchangeOrder(count=2**31 - 2)
    order.replayed(("a", "b", "c"))
    assert [order.slot_of(epoch) for epoch in (2**31 - 1, -(2**31), -(2**31) + 1)] == ["a", "b", "c"]


class Gathered:
    """A kernel that stands for two ranks which have the same columns."""

    def __init__(self) -> None:
        self.num_rows = list[int]()

    def run(self, x_TC: torch.Tensor, operand: object, *, dim: int, out: torch.Tensor) -> torch.Tensor:
        self.num_rows.append(len(x_TC))
        assert dim == -1
        return out.copy_(torch.cat((x_TC, x_TC), dim=1))


def test_columns_of_many_rows_go_some_at_a_time() -> None:
    """Rows of 3 float32 are 6 words of 16 bits; a window of 128 has room for 21 of them."""
    noted, kernel = list[str](), Gathered()
    window: Any = SimpleNamespace(layout=SimpleNamespace(max_elements=128, size=2), note=noted.append)
    gather = GatherColumns(Alone(), "head.gather", kernel="ref.all_gather")
    gather.kernel, gather.window = kernel, window  # type: ignore[assignment]
    for num_rows, pieces in ((0, []), (21, [21]), (50, [21, 21, 8])):
        noted.clear()
        kernel.num_rows.clear()
        x_TC = torch.randn(num_rows, 3)
        assert torch.equal(gather(x_TC), torch.cat((x_TC, x_TC), dim=1))
        assert kernel.num_rows == pieces
        assert noted == ["head.gather"] * len(pieces)


def test_a_pushed_kernel_without_windows_is_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"layers.1.attn.reduce: triton.reduce needs windows of all ranks"):
        Reduce(Alone(), "layers.1.attn.reduce", kernel="triton.reduce")
