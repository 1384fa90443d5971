"""Taps copy what a call gets and gives, also where a captured graph is replayed and no Python runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ownpath.integrations.vllm.proof.taps import Point, Taps

POINTS = (Point("layers.*.scale", takes=("in",)), Point("layers.*", "mix", takes=("x", "y"), changes=("out",)))


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x * self.factor, None


class Layer(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scale = Scale(factor)

    def mix(self, x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(x if y is None else x + y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.scale(x)
        out = torch.empty_like(x)
        self.mix(x, y, out)
        return out


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(2.0), Layer(3.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Graph(TorchDispatchMode):
    """A double of a CUDA graph: it holds the operations of one run with their tensors, and repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.is_capturing = False

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.is_capturing = True
        with self:
            yield
        self.is_capturing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Writes each operation's new result where the captured one lies."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and not result._is_view() and again.shape == result.shape:
                result.copy_(again)


def test_a_tap_holds_what_went_in_and_came_out() -> None:
    net, taps = Net(), Taps(max_rows=8)
    taps.add(net, (*POINTS, Point("layers.*.other")))
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(net(x), x * 3 * 4)
    found = taps.take(3)
    assert torch.equal(found["layers.0.scale.forward:in"], x)
    assert torch.equal(found["layers.1.scale.forward:out"], x * 9)
    assert torch.equal(found["layers.1.mix:out"], x * 12)
    assert set(found) == {
        f"layers.{idx}.{name}"
        for idx in (0, 1)
        for name in ("scale.forward:in", "scale.forward:out", "mix:x", "mix:y", "mix:out")
    } - {"layers.0.mix:none"}
    assert taps.absent == ["layers.*.other.forward"]


def test_a_second_call_in_one_step_has_a_name_of_its_own_and_a_new_step_begins_anew() -> None:
    net, taps = Net(), Taps(max_rows=8)
    taps.add(net, POINTS)
    net(torch.ones(2, 2))
    net.layers[0].scale(2 * torch.ones(1, 2))
    assert torch.equal(taps.take(2)["layers.0.scale.forward:in#1"], 2 * torch.ones(1, 2))
    taps.start_step()
    assert taps.take(2) == {}
    net(5 * torch.ones(1, 2))
    assert {len(value) for value in taps.take(2).values()} == {1}
    assert not any("#" in key for key in taps.take(2))


def test_a_call_with_more_rows_than_a_buffer_keeps_the_first() -> None:
    net, taps = Net(), Taps(max_rows=2)
    taps.add(net, POINTS)
    x = torch.arange(10.0).view(5, 2)
    net(x)
    assert torch.equal(taps.take(5)["layers.0.scale.forward:in"], x[:2])


def test_a_captured_graph_copies_on_every_replay() -> None:
    graph, net = Graph(), Net()
    taps = Taps(max_rows=4, is_capturing=lambda: graph.is_capturing)
    taps.add(net, POINTS)
    x = torch.ones(4, 2)
    net(x)  # engines warm up before they capture: this makes the buffers
    places = {key: buffer.data_ptr() for key, buffer in taps.buffers.items()}
    with graph.capture():
        net(x)
    taps.start_step()
    assert taps.take(3) == {}
    x.copy_(torch.arange(8.0).view(4, 2))
    graph.replay()
    found = taps.take(3)  # the step has 3 rows; the fourth is padded
    assert not taps.calls  # no Python of the model ran
    assert torch.equal(found["layers.1.scale.forward:in"], 3 * x[:3])
    assert torch.equal(found["layers.1.mix:out"], 12 * x[:3])
    assert {key: buffer.data_ptr() for key, buffer in taps.buffers.items()} == places
    assert not taps.missed


def test_a_tap_without_a_buffer_is_named_not_captured() -> None:
    graph, net = Graph(), Net()
    taps = Taps(max_rows=4, is_capturing=lambda: graph.is_capturing)
    taps.add(net, POINTS)
    with graph.capture():
        net(torch.ones(4, 2))
    assert set(taps.missed) == {key for key in taps.missed if key.startswith("layers.")}
    assert "no buffer for [4, 2] float32" in taps.missed["layers.0.scale.forward:in"]
    assert not taps.buffers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_what_a_step_did_not_write_is_left_out(dtype: torch.dtype) -> None:
    """Minus one is an id that engines write; NaN is what a broken kernel writes, and it is kept where Python ran."""
    value = torch.tensor([[-1.0]]).to(dtype)
    taps = Taps(max_rows=2)
    taps._keep("x", value)
    assert torch.equal(taps.take(1)["x"].float(), value.float())
    taps.start_step()
    assert taps.take(1) == {}


def test_modules_get_their_own_methods_back() -> None:
    net, taps = Net(), Taps(max_rows=4)
    taps.add(net, POINTS)
    taps.remove()
    net(torch.ones(1, 2))
    assert not taps.buffers
    assert "forward" not in vars(net.layers[0].scale)


def test_rows_that_only_fill_a_captured_size_are_no_rows() -> None:
    """Between the parts of a captured graph Python runs on rows up to that size; a step's own are the first ones."""
    net, taps = Net(), Taps(max_rows=8)
    taps.add(net, POINTS)
    net(torch.ones(4, 2))
    taps.start_step()
    assert not taps.has_run
    net.layers[0](torch.ones(4, 2))  # a part that is not captured; the whole model's forward does not run
    held = taps.take(3)
    assert held
    assert {len(value) for value in held.values()} == {3}
    assert not taps.has_run
    net(torch.ones(3, 2))
    assert taps.has_run


class BreakableGraph:
    """A double of vLLM's breakable graph: captured parts, and between them functions that every replay calls again."""

    active: ClassVar["BreakableGraph | None"] = None

    def __init__(self) -> None:
        self.parts: list[Callable[[], object]] = []
        self.is_capturing = False
        self._open = ExitStack()

    @contextmanager
    def capture(self) -> Iterator[None]:
        BreakableGraph.active = self
        self._begin()
        yield
        self._end()
        BreakableGraph.active = None

    def call(self, function: Callable[[], object]) -> None:
        self._end()
        function()
        self.parts.append(function)
        self._begin()

    def replay(self) -> None:
        for part in self.parts:
            part()

    def _begin(self) -> None:
        part = Graph()
        self._open.enter_context(part.capture())
        self.parts.append(part.replay)
        self.is_capturing = True

    def _end(self) -> None:
        self.is_capturing = False
        self._open.close()


class Attention(torch.nn.Module):
    """Attention as vLLM's: what needs the step's requests is one method, which writes into memory that it is given.

    num_rows: of the step; ``None`` in a run without requests, which writes zeros, as vLLM's does while it captures.
    """

    num_rows: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self.attend(2 * x, out)
        return out + 1

    def attend(self, q: torch.Tensor, out: torch.Tensor) -> None:
        self.forward_mqa(q if self.num_rows is None else q - q.mean(-1, keepdim=True), out)

    def forward_mqa(self, q: torch.Tensor, out: torch.Tensor) -> None:
        if self.num_rows is None:
            out.zero_()
        else:
            out[: self.num_rows] = q[: self.num_rows].cumsum(0)


class BrokenAttention(Attention):
    def attend(self, q: torch.Tensor, out: torch.Tensor) -> None:
        graph = BreakableGraph.active
        run = partial(super().attend, q, out)
        run() if graph is None else graph.call(run)


class OneLayer(torch.nn.Module):
    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([attn])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.layers[0](x + 1)


@pytest.mark.parametrize("has_break", [True, False])
def test_taps_of_a_replay_hold_what_its_attention_got_and_gave(has_break: bool) -> None:
    """A step of five rows in a graph of eight, captured without requests, with a break at the attention and without.

    Without it the replay computes zeros, from a query that is not normed. The taps say so: nothing else does.
    """
    graph, attn = BreakableGraph(), BrokenAttention() if has_break else Attention()
    net, taps = OneLayer(attn), Taps(max_rows=16, is_capturing=lambda: graph.is_capturing)
    taps.add(net, (Point("layers.*"), Point("layers.*", "forward_mqa", takes=("q",), changes=("out",))))
    padded = torch.ones(8, 4)
    net(padded)
    with graph.capture():
        net(padded)
    padded[:5] = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    attn.num_rows = 5
    taps.start_step()
    graph.replay()
    found = taps.take(5)
    assert not taps.missed
    assert not taps.has_run
    q = 2 * (padded[:5] + 1)
    normed = q - q.mean(-1, keepdim=True)
    right = normed.cumsum(0)
    assert torch.allclose(found["layers.0.forward_mqa:q"], normed if has_break else q)
    assert torch.allclose(found["layers.0.forward_mqa:out"], right if has_break else torch.zeros_like(q))
    assert torch.allclose(found["layers.0.forward:out"], 1 + (right if has_break else torch.zeros_like(q)))
