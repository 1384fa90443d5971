"""Our calls inside vLLM; while torch compiles, one opaque torch operation a call: ``torch.ops.ownpath_vllm.*``.

Dynamo neither traces nor merges them, and CUDA graphs capture what they launch. A call names its slot by a string,
which is the same in every process, so that a compiled graph from vLLM's cache finds this process's runner. Where
nothing is compiled, as in V4 on CUDA, a call goes straight to its runner: torch's dispatch takes several times as long.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ownpath.runners import GroupedRunner, Linear, Runner
from ownpath.runners.moe import MoeRunner
from ownpath.runners.runner import KernelRunner
from ownpath.trace.observers import Watched


class SlotCalls:
    """Maps keys to the calls of living models. A call by the key of a model that is gone is an error."""

    def __init__(self) -> None:
        self._calls: WeakValueDictionary[str, Watched] = WeakValueDictionary()

    def new(self, call: Watched) -> str:
        """Registers a slot's call, and returns its key: the slot, or slot#2 while another model has the slot's."""
        keys = (call.slot if number == 1 else f"{call.slot}#{number}" for number in count(1))
        key = next(key for key in keys if key not in self._calls)
        self._calls[key] = call
        return key

    def find(self, key: str) -> Watched:
        """Returns the call of a key. Errors: ValueError for one that is gone."""
        found = self._calls.get(key)
        if found is None:
            raise ValueError(f"ownpath has no runner for {key!r}: its weights were not loaded, or its model is gone")
        return found


CALLS = SlotCalls()
LIBRARY = torch.library.Library("ownpath_vllm", "DEF")


class SharedExperts(Runner):
    """Routed experts of which this rank may have only some. It takes the engine's map from global ids to its own."""

    def __init__(self, experts: MoeRunner) -> None:
        self.experts = experts

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """The experts' runner."""
        return self.experts.leaves

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None) -> Tensor:
        return self.experts(x, topk_ids, topk_weights, expert_map=expert_map)


def linear(x: Tensor, slot: str) -> Tensor:
    """Computes y [..., N]."""
    y: Tensor = CALLS.find(slot)(x)
    return y.contiguous()


def experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, slot: str) -> Tensor:
    """Computes y [T, D]: the sum over the experts that this rank has."""
    y: Tensor = CALLS.find(slot)(x, topk_ids, topk_weights, expert_map)
    return y.contiguous()


def grouped(o: Tensor, cos: Tensor, sin: Tensor, slot: str) -> Tensor:
    """Undoes the rotation of heads [T, N, H] and computes y [T, G, R]."""
    y: Tensor = CALLS.find(slot)(o, (cos, sin))
    return y.contiguous()


def angles(cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of positions [T]: float32 [T, F] each, contiguous, by one gather.

    Shapes: cos_sin [positions, 2 * F], cosines first.
    """
    tables = cos_sin.unflatten(-1, (2, -1)).movedim(1, 0)
    cos, sin = torch.index_select(tables, 1, positions).float().unbind()
    return cos, sin


def _fake_linear(x: Tensor, slot: str) -> Tensor:
    runner: Linear = CALLS.find(slot).runner  # type: ignore[assignment]
    return x.new_empty((*x.shape[:-1], runner.out_features))


def _fake_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, slot: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_grouped(o: Tensor, cos: Tensor, sin: Tensor, slot: str) -> Tensor:
    runner: GroupedRunner = CALLS.find(slot).runner  # type: ignore[assignment]
    return runner.new_out(o)


@dataclass(frozen=True)
class OpaqueCall:
    """A call by a slot's key: of ``function``, or of the torch operation of that name while torch compiles."""

    name: str
    function: Callable[..., Tensor]

    def __call__(self, *args: object) -> Tensor:
        if torch.compiler.is_compiling():
            y: Tensor = getattr(torch.ops.ownpath_vllm, self.name)(*args)
            return y
        return self.function(*args)


def _define(schema: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> OpaqueCall:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    return OpaqueCall(name, function)


LINEAR = _define("linear(Tensor x, str slot) -> Tensor", linear, _fake_linear)
EXPERTS = _define(
    "experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, str slot) -> Tensor",
    experts,
    _fake_experts,
)
GROUPED = _define("grouped(Tensor o, Tensor cos, Tensor sin, str slot) -> Tensor", grouped, _fake_grouped)
