"""``ownpath bench parallel``: exchanges between GPUs, and a layer of experts over them, a rank for each GPU.

``torchrun --nproc-per-node 2 -m ownpath bench parallel``, or it starts its ranks itself. A time is the slowest rank's:
graphs are replayed one behind the other on every rank, which only the exchanges hold together. A layer's calls differ
in tokens and routing, drawn alike on all ranks, so that L2 is cold without copies of the weights.

"local" rows are this package's experts of each rank on the same pairs, without an exchange: what a layer over ranks is
compared with. ``of_local``: their time over the layer's. A layer waits in each call for the rank that has the most to
do there; in "busiest" rows every rank computes that one's part of each call, with its own experts. ``of_busiest``: as
``of_local``.

Legend: N ranks, T tokens of a rank, B of all, D hidden, K experts per token, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from ownpath.bench.check import moe_reference, rel_l2
from ownpath.bench.contender import SWIGLU_LIMIT, W4A16_MAX_REL_L2
from ownpath.bench.exchanges import collectives_of, exchange_rows
from ownpath.bench.floor import NVFP4_BYTES_PER_PARAM, Work
from ownpath.bench.operands import MoeOperands, random_activations, random_moe
from ownpath.bench.peers.deepgemm_experts import DeepGemmMegaMoe
from ownpath.bench.request import BenchRequest
from ownpath.bench.rotation import num_calls
from ownpath.bench.routing import TopkRouting, uniform_routing
from ownpath.bench.row import Case, Row
from ownpath.bench.shapes import MoeShape, parallel_shape
from ownpath.bench.together import LINK_GBPS, Together, TogetherContender, TogetherRound, together
from ownpath.kernels.dsl.cache import compile_missing
from ownpath.kernels.exchange.collectives import Collectives
from ownpath.kernels.nvfp4.moe import nvfp4_moe
from ownpath.runners import HeldExperts, MegaMoE

LAYER_TOKENS, EXCHANGE_TOKENS = (1, 8, 64, 512, 8192), (1, 8, 64, 512)
PACKED_TOKENS = 512
"""Up to so many tokens a peer's x, ids and weights travel as one tensor: fewer launches, one copy more."""
Parts = tuple[Tensor, Tensor, Tensor]
"""x, ids and weights."""
LayerCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def measured(asked: BenchRequest) -> Iterator[Row]:
    """Measures shape by shape, on every rank alike. Errors: ValueError for contenders that nobody has."""
    shapes = [parallel_shape(name) for name in asked.shapes or ("v4-flash",)]
    layer_tokens, exchange_tokens = asked.tokens or LAYER_TOKENS, asked.tokens or EXCHANGE_TOKENS
    most = max(layer_tokens), max(shape.top_k for shape in shapes)
    with together(asked, max(shape.hidden for shape in shapes), *most) as ranks:
        wanted = None if asked.contenders is None else asked.contenders.split(",")
        for shape in shapes:
            rows = (exchange_rows(ranks, shape.name, count, shape.hidden) for count in exchange_tokens)
            yield from (row for of_size in rows for row in of_size)
            layer = ExpertLayer(ranks, asked, shape)
            layer.compile(layer_tokens)
            for num_tokens in layer_tokens:
                yield from layer.rows(num_tokens, wanted)


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a call: of all ranks, and this rank's own. distinct: experts of the rank that reads the most.

    busiest: as ``every``, with that rank's experts and this one's exchanged.
    """

    every: Parts
    own: Parts
    busiest: Parts
    distinct: int


@dataclass(frozen=True)
class LayerContender:
    """A contender's name, what makes its layer, and its largest error."""

    name: str
    make: Callable[[], LayerCall]
    most: float = W4A16_MAX_REL_L2


class ExpertLayer:
    """A shape's experts over the ranks; every rank has drawn all of them."""

    def __init__(self, ranks: Together, asked: BenchRequest, shape: MoeShape) -> None:
        self._ranks, self._asked, self._shape = ranks, asked, shape
        self._settings = replace(asked.settings, device=str(ranks.device))

    @cached_property
    def _operands(self) -> MoeOperands:
        return random_moe(self._shape, self._settings.generator())

    @cached_property
    def _moe(self) -> MegaMoE:
        whole = self._operands
        stacks = whole.w13, whole.w13_scale, whole.w13_scale_2, whole.w2, whole.w2_scale, whole.w2_scale_2
        return MegaMoE.cut(stacks, SWIGLU_LIMIT, self._ranks.peers, slot="bench")

    @cached_property
    def _held(self) -> HeldExperts:
        """This rank's experts, of which it skips others' ids."""
        count = self._moe.local.num_experts
        first = self._ranks.rank * count
        return HeldExperts(self._moe.local, range(first, first + count), self._shape.num_experts)

    def compile(self, token_counts: Sequence[int]) -> None:
        """Compiles ahead what calls of these sizes launch: inside a call, the other ranks would wait for it."""
        if not self._ranks.on_gpus:
            return
        local, shape = self._moe.local, self._shape
        pairs = [self._ranks.size * num_tokens * shape.top_k for num_tokens in token_counts]
        configs = [nvfp4_moe.mapped_configs(count, local.operand, shape.num_experts) for count in pairs]
        compile_missing(chain.from_iterable(configs))

    def rows(self, num_tokens: int, wanted: Sequence[str] | None) -> Iterator[Row]:
        """Yields a row for each contender, the experts without an exchange first."""
        inputs = self._inputs(num_tokens)
        case, mine = self._case(num_tokens, inputs), slice(self._ranks.rank * num_tokens, None)
        x, ids, weights = inputs[0].own
        reference = moe_reference(x, TopkRouting(ids, weights), self._operands, SWIGLU_LIMIT)

        def judge(y: Tensor) -> float:
            return rel_l2(y, reference)

        def unjudged(y: Tensor) -> float:
            """A rank's part of the sum has no reference of its own; the layers' are judged."""
            return 0.0 if bool(y[mine].isfinite().all()) else float("nan")

        def alone(given: Sequence[Parts]) -> TogetherContender:
            calls: list[Callable[[], Tensor]] = [lambda one=one: self._held(*one) for one in given]  # type: ignore[misc]
            return TogetherContender("ownpath", lambda: TogetherRound(calls, unjudged), is_peer=False)

        compared = {"local": alone([one.every for one in inputs]), "busiest": alone([one.busiest for one in inputs])}
        found = {
            name: self._ranks.row(replace(case, shape=f"{name} {self._shape.name}"), contender)
            for name, contender in compared.items()
        }
        yield from found.values()
        for contender in self._layers(num_tokens):
            if wanted is not None and contender.name not in wanted:
                continue

            def round_of(make: Callable[[], LayerCall] = contender.make) -> TogetherRound:
                layer = make()
                return TogetherRound([lambda one=one: layer(*one.own) for one in inputs], judge)  # type: ignore[misc]

            row = self._ranks.row(
                case, TogetherContender(contender.name, round_of, contender.name != "ownpath", contender.most)
            )
            yield replace(row, facts=_compared(row, found))

    def _inputs(self, num_tokens: int) -> list[LayerInputs]:
        """Draws the calls of a round: as many as make L2 cold."""
        ranks, shape = self._ranks, self._shape
        pairs = ranks.size * num_tokens * shape.top_k // ranks.size
        read = min(shape.num_experts // ranks.size, pairs) * shape.params_per_expert * NVFP4_BYTES_PER_PARAM
        return [self._drawn(num_tokens, idx) for idx in range(num_calls(read, 8 if num_tokens <= 64 else 4))]

    def _drawn(self, num_tokens: int, idx: int) -> LayerInputs:
        ranks, shape, count = self._ranks, self._shape, self._ranks.size * num_tokens
        seed = 1000 * num_tokens + idx
        x = random_activations(count, shape.hidden, self._settings.generator(seed))
        routing = uniform_routing(shape, count, self._settings.seed + seed, str(ranks.device))
        each = shape.num_experts // ranks.size
        experts = routing.topk_ids.unique().div(each, rounding_mode="floor")
        distinct = experts.long().bincount(minlength=ranks.size)
        every = x, routing.topk_ids, routing.topk_weights
        mine = slice(ranks.rank * num_tokens, (ranks.rank + 1) * num_tokens)
        own = (x[mine].clone(), routing.topk_ids[mine].clone(), every[2][mine].clone())
        swapped = swap_owners(routing.topk_ids, each, ranks.rank, int(distinct.argmax()))
        return LayerInputs(every, own, (x, swapped, every[2]), int(distinct.max()))

    def _case(self, num_tokens: int, inputs: Sequence[LayerInputs]) -> Case:
        ranks, shape = self._ranks, self._shape
        distinct = sum(one.distinct for one in inputs) / len(inputs)
        weights = distinct * shape.params_per_expert * NVFP4_BYTES_PER_PARAM
        num_bytes = round(weights + 2 * 2 * ranks.size * num_tokens * shape.hidden)
        work = Work(num_bytes, 2 * shape.params_per_expert * num_tokens * shape.top_k)
        ceilings = self._settings.ceilings
        links = 2 * (ranks.size - 1) * num_tokens * shape.hidden * 2 / LINK_GBPS / 1e3
        floor_us = None if ceilings is None else max(work.floor_us(ceilings), links)
        dims = {"ranks": ranks.size, "experts": shape.num_experts, "hidden": shape.hidden, "inter": shape.inter}
        dims["top_k"] = shape.top_k
        return Case("parallel", shape.name, dims, num_tokens, work.num_bytes, work.num_flop, floor_us, distinct)

    def _layers(self, num_tokens: int) -> Iterator["LayerContender"]:
        yield LayerContender("ownpath", lambda: self._moe)
        elements = self._ranks.size * num_tokens * (self._shape.hidden + 4 * self._shape.top_k)
        for name, make in collectives_of(self._ranks, elements):
            yield LayerContender(f"{name} gather", lambda make=make: self._gathered(make()))  # type: ignore[misc]
        name = "nccl" if self._ranks.on_gpus else "gloo"
        yield LayerContender(f"{name} all-to-all", lambda: self._traded)
        if DeepGemmMegaMoe.missing(str(self._ranks.device)) is None:
            yield LayerContender(DeepGemmMegaMoe.name, lambda: self._deepgemm(num_tokens), DeepGemmMegaMoe.max_rel_l2)

    def _deepgemm(self, num_tokens: int) -> LayerCall:
        ranks, count = self._ranks, self._shape.num_experts // self._ranks.size
        held = range(ranks.rank * count, (ranks.rank + 1) * count)
        return DeepGemmMegaMoe(self._operands, held, ranks.group, num_tokens, self._shape.top_k)

    def _gathered(self, given: Collectives) -> LayerCall:
        """All rows to all ranks, this rank's experts, and a reduce-scatter."""

        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            small = [ids.view(torch.bfloat16), weights.view(torch.bfloat16)]
            if len(x) <= PACKED_TOKENS:
                packed = given.all_gather(torch.cat([x, *small], dim=1))
                x, routed = packed[:, : x.shape[1]], packed[:, x.shape[1] :]
            else:
                x, routed = given.all_gather(x), given.all_gather(torch.cat(small, dim=1))
            return given.reduce_scatter(self._held(x, *_unpacked(routed, ids.shape[1])))

        return layer

    def _traded(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """An all-to-all of fixed sizes, as a graph needs them: room for every row on every rank; and one back."""
        size = self._ranks.size
        packed = torch.cat([x, ids.view(torch.bfloat16), weights.view(torch.bfloat16)], dim=1).repeat(size, 1)
        taken = torch.empty_like(packed)
        dist.all_to_all_single(taken, packed, group=self._ranks.group)
        y = self._held(taken[:, : x.shape[1]], *_unpacked(taken[:, x.shape[1] :], ids.shape[1]))
        back = torch.empty_like(y)
        dist.all_to_all_single(back, y, group=self._ranks.group)
        return back.view(size, *x.shape).float().sum(0).to(x.dtype)


def swap_owners(ids: Tensor, num_held: int, one: int, other: int) -> Tensor:
    """Returns expert ids with two ranks' experts exchanged. num_held: experts of a rank."""
    owners, places = ids.div(num_held, rounding_mode="floor"), ids % num_held
    swapped = torch.where(owners == one, other, torch.where(owners == other, one, owners))
    return (swapped * num_held + places).to(ids.dtype)


def _compared(row: Row, alone: Mapping[str, Row]) -> dict[str, float]:
    """Returns the facts of a layer beside the experts alone."""
    facts = dict[str, float]()
    for name, other in alone.items():
        if row.timing is not None and other.timing is not None:
            facts |= {f"{name}_us": other.timing.us, f"of_{name}": round(other.timing.us / row.timing.us, 4)}
    return facts


def _unpacked(routed: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns ids and weights from words of 16 bits."""
    ids, weights = (part.contiguous() for part in routed.split(2 * top_k, dim=1))
    return ids.view(torch.int32), weights.view(torch.float32)
