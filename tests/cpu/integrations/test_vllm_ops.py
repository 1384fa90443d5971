"""A call by a slot's key: straight to its runner, and one opaque operation while torch compiles."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ownpath.integrations.vllm.ops import CALLS, LINEAR, angles
from ownpath.runners.linear import PlainLinear
from ownpath.trace import Ledger

SLOT = "layers.0.attn.wq_b"


class Dispatched(TorchDispatchMode):
    """Collects the names of operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_an_eager_call_is_no_torch_operation_and_a_compiled_one_is_one() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    ledger = Ledger((SLOT,))
    call = ledger.watch(SLOT, PlainLinear(weight))
    key, x = CALLS.new(call), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    with Dispatched() as seen:
        eager = LINEAR(x, key)
    assert not [name for name in seen.names if "ownpath" in name]
    graphs = list[torch.fx.GraphModule]()

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda rows: LINEAR(rows, key) + 1, backend=keep, fullgraph=True)(x)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert any("ownpath_vllm" in name for name in called)
    assert torch.equal(compiled, eager + 1)
    assert torch.allclose(eager, x @ weight.T)
    assert ledger.calls[SLOT] == 2


def test_a_call_by_the_key_of_a_model_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="its model is gone"):
        LINEAR(torch.empty(1, 4), "layers.7.attn.wq_b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_of_positions_are_rows_of_both_halves(dtype: torch.dtype) -> None:
    table = torch.randn(50, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    positions = torch.tensor([7, 0, 49, 7])
    cos, sin = angles(table, positions)
    assert torch.equal(cos, table[positions, :6].float())
    assert torch.equal(sin, table[positions, 6:].float())
    assert (cos.dtype, cos.is_contiguous(), sin.is_contiguous()) == (torch.float32, True, True)
