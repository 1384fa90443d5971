"""Experts over ranks as one call: rows travel to the experts, are computed there, and their sums travel back.

Legend: N ranks, T tokens of this rank, B of all ranks, S rows that came to this one, D hidden, K experts per token, E
experts of all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from ownpath.config import Parallel
from ownpath.kernels.checks import require_activations, require_routing
from ownpath.kernels.contract import StoredExperts
from ownpath.ops import OpKind
from ownpath.ranks.peers import Peers
from ownpath.ranks.start import phase, require_same
from ownpath.runners.cut import ROUTED, SHARED, cut_experts
from ownpath.runners.exchange import CombineRows, DispatchRows, Exchange, GatherRows, Reduce, Scatter
from ownpath.runners.linear import Nvfp4Linear
from ownpath.runners.mlp import SwigluMlp
from ownpath.runners.moe import HeldExperts, MoeRunner, Nvfp4MoE, stored_nvfp4
from ownpath.runners.runner import KernelOrName, KernelRunner, Runner
from ownpath.runners.window import WindowedPeers
from ownpath.splits import AttentionSplit, ExpertSplit, RowTravel

PUSHED_KERNELS = {OpKind.REDUCE: "triton.reduce", OpKind.GATHER: "triton.gather", OpKind.SCATTER: "triton.scatter"}
"""The kernels of exchanges between windows."""
AnyExchange = TypeVar("AnyExchange", bound=Exchange)
ExpertSum = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, D], expert ids [T, K], weights [T, K]) -> y [T, D]."""
DenseExpert = Callable[[Tensor], Tensor]
"""x [T, D] -> y [T, D]."""


@dataclass(frozen=True)
class GatheredExperts:
    """Every rank computes its part of the sum for all ranks' tokens, and gets its own tokens' sums.

    experts: this rank's part of the sum, for any tokens. other: added to a rank's own sums, rounded.
    """

    experts: ExpertSum
    gather: Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]
    scatter: Callable[[Tensor, tuple[int, ...], Tensor | None], Tensor]

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, other_TD: Tensor | None = None) -> Tensor:
        (x_BD, ids_BK, weights_BK), counts = self.gather(x_TD, ids_TK, weights_TK)
        return self.scatter(self.experts(x_BD, ids_BK, weights_BK), counts, other_TD)


@dataclass(frozen=True)
class DispatchedExperts:
    """Every rank computes its part of the sum for the rows that chose one of its experts.

    experts: as ``GatheredExperts``. num_experts: E, of which each rank has as many, in the order of ranks.
    """

    experts: ExpertSum
    dispatch: DispatchRows
    combine: CombineRows
    num_experts: int
    size: int

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, other_TD: Tensor | None = None) -> Tensor:
        goes_NT = rows_by_rank(ids_TK, self.num_experts, self.size)
        (x_SD, ids_SK, weights_SK), counts = self.dispatch(goes_NT, x_TD, ids_TK, weights_TK)
        return self.combine(self.experts(x_SD, ids_SK, weights_SK), counts, goes_NT, other_TD)


def rows_by_rank(ids_TK: Tensor, num_experts: int, size: int) -> Tensor:
    """Returns bool [N, T], True where a row chose one of a rank's experts. An id outside the experts is no rank's."""
    owner_TK = ids_TK.div(num_experts // size, rounding_mode="floor")
    ranks_N = torch.arange(size, device=ids_TK.device)
    return (owner_TK == ranks_N[:, None, None]).any(dim=2)


@dataclass(frozen=True)
class SentRows:
    """The rows that one rank sends to others in a call, one counted for each rank that gets it, and their bytes.

    dispatched: rows of x with their ids and weights. combined: rows of sums.
    """

    dispatched: int
    combined: int
    dispatched_bytes: int
    combined_bytes: int


class MegaMoE(Runner):
    """Top-k mixture of SwiGLU experts over N ranks, and the shared expert: one call, which every rank makes.

    Called with this rank's tokens x [T, D], expert ids [T, K] (of all experts) and weights [T, K], it returns y [T, D]
    in the dtype of x. Ranks may have different T, and 0. Ids and weights have one dtype on all ranks, as x has.

    local: this rank's experts. By ids (the default) rank r of N has experts r E / N to (r + 1) E / N, whole; by width
        every rank has the same part of each, in the order of ranks. Any ``Nvfp4MoE``, or another runner of experts.
    peers: the ranks: ``ownpath.ranks.group.join(os.environ)`` in processes that torchrun has started, or
        ``VirtualPeers`` in threads of one (``run_virtual``). With those of ``ownpath.open_window``, on GPUs, exchanges
        are kernels that push rows into the other ranks' memory, but for a routed dispatch. They take bfloat16, and as
        many rows from every rank (in place of tokens that are not there, rows with ids -1), up to the window's. The
        first call with so many rows asks the other ranks, and RanksDiffer is raised where they have others.
    attention: ``data``: each rank gives its own tokens; x, ids and weights travel to the experts, and the ranks' sums
        travel back. ``heads``: every rank gives all tokens, the same; the ranks' sums are added up on every rank.
    dispatch: ``all`` sends every row to every rank, ``routed`` only to ranks with one of its experts.
    shared: the shared expert, for this rank's tokens: whole by data; by heads a part of its width, whose sum is a part
        of y. ``SwigluMlp`` of two linears, or ``None``.
    slot: the name under which exchanges and errors speak of it. All ranks use the same.
    kernels: of exchanges, by kind, in place of those.

    A rank's sum of a token (by heads with the shared expert's part in it) is rounded to the dtype of x; sums are added
    in the order of ranks, in at least float32, and rounded once. Nothing else depends on ranks or time: the same call
    returns the same bits, by heads on all ranks. Between exchanges nothing is read on the host but counts of rows. A
    CUDA graph can hold a call if its kernels' can (``reads_host``): with a window it can, the torch references of
    exchanges cannot. Graphs are replayed by all ranks in the same order, on one stream; a rank that is lost makes the
    result NaN, and ``check`` names it.

    Every rank makes the object, and each call, in the same order. Errors: RanksDiffer, on every rank, for ranks whose
    experts, division or rows do not fit each other; ShardingError for experts or a width that do not divide; ValueError
    for a routed dispatch where no rows travel, or naming an argument of a call that is wrong, before anything is sent;
    PeerLost.
    """

    def __init__(
        self,
        local: MoeRunner,
        peers: Peers,
        *,
        attention: AttentionSplit | str = AttentionSplit.DATA,
        experts: ExpertSplit | str = ExpertSplit.IDS,
        dispatch: RowTravel | str = RowTravel.ALL,
        shared: DenseExpert | None = None,
        slot: str = "moe",
        kernels: Mapping[OpKind, KernelOrName] = MappingProxyType({}),
    ) -> None:
        self.parallel = _parallel(peers, attention, experts)
        self.travel = _travel(slot, self.parallel, dispatch)
        self.local, self.shared, self._slot, self._kernels, self._peers = local, shared, slot, kernels, peers
        self._window = peers.window if isinstance(peers, WindowedPeers) else None
        self._known = set[tuple[int, int, torch.dtype, torch.dtype]]()
        by_ids = self.parallel.experts is ExpertSplit.IDS
        self.num_experts = local.num_experts * (peers.size if by_ids else 1)
        self._require_same()
        held = self.parallel.share(self.num_experts)
        self._part: ExpertSum = HeldExperts(local, held, self.num_experts) if by_ids else local
        self._exchanges: tuple[Exchange, ...] = ()
        self._run = self._by_heads() if self.parallel.attention is AttentionSplit.HEADS else self._by_data()

    @classmethod
    def cut(
        cls,
        stacks: Sequence[Tensor],
        swiglu_limit: float,
        peers: Peers,
        *,
        attention: AttentionSplit | str = AttentionSplit.DATA,
        experts: ExpertSplit | str = ExpertSplit.IDS,
        dispatch: RowTravel | str = RowTravel.ALL,
        shared: Sequence[Tensor] | None = None,
        slot: str = "moe",
    ) -> "MegaMoE":
        """Makes this rank's part from whole NVFP4 experts, which it copies its part of and leaves as they are.

        stacks: w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 of all experts, as ``Nvfp4MoE`` takes them.
        shared: the same six of the shared expert, as stacks of one expert.
        Errors: as ``MegaMoE``; ValueError naming a stack of a wrong dtype or shape, RankFailed on the other ranks.
        """
        with phase(peers, slot):
            parallel = _parallel(peers, attention, experts)
            w13, w2 = cut_experts(_stored("stacks", stacks, swiglu_limit), slot, ROUTED, parallel)
            local = Nvfp4MoE(*w13, *w2, swiglu_limit)
            mlp = None if shared is None else _cut_shared(shared, swiglu_limit, slot, parallel)
        return cls(local, peers, attention=attention, experts=experts, dispatch=dispatch, shared=mlp, slot=slot)

    @property
    def leaves(self) -> tuple[KernelRunner, ...]:
        """The runners of this rank's experts and of the exchanges, in the order of ``kernels``."""
        return (*self.local.leaves, *self._exchanges)

    @property
    def reads_host(self) -> bool:
        """True if a call waits for the host, so that no CUDA graph can hold it. The shared expert is not asked."""
        return any(leaf.spec.reads_host for leaf in self.leaves)

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if x.ndim != 2:
            raise ValueError(f"x must have 2 dimensions, found shape {list(x.shape)}")
        if x.shape[1] != self.local.hidden_size:
            raise ValueError(f"x has {x.shape[1]} features, the experts take {self.local.hidden_size}")
        require_activations(x, self.local.device)
        require_routing(x, topk_ids, topk_weights)
        if self._is_pushed:
            self._require_alike(x, topk_ids)
        return self._run(x, topk_ids, topk_weights)

    def check(self) -> None:
        """Checks that no exchange of the window was given up; asked when a call's result is there. Errors: PeerLost."""
        if self._window is not None:
            self._window.check(self._slot)

    def sent(self, ids_NTK: Sequence[Tensor], dtype: torch.dtype, rank: int | None = None) -> SentRows:
        """Counts what a rank sends in a call; this one if none is named.

        ids_NTK: the expert ids that each rank gives, of its own T. dtype: of x. Weights are counted as float32.
        """
        rank, size = self.parallel.rank if rank is None else rank, self.parallel.size
        row, ids_TK = self.local.hidden_size * dtype.itemsize, ids_NTK[rank]
        if self.parallel.attention is AttentionSplit.HEADS:
            back = (size - 1) * len(ids_TK)
            return SentRows(0, back, 0, back * row)
        goes = [self._goes(given_TK) for given_TK in ids_NTK]
        others = [other for other in range(size) if other != rank]
        gone = sum(int(goes[rank][other].sum()) for other in others)
        back = sum(int(goes[other][rank].sum()) for other in others)
        routing = ids_TK.shape[1] * (ids_TK.dtype.itemsize + torch.float32.itemsize)
        return SentRows(gone, back, gone * (row + routing), back * row)

    def _goes(self, ids_TK: Tensor) -> Tensor:
        if self.travel is RowTravel.ROUTED:
            return rows_by_rank(ids_TK, self.num_experts, self.parallel.size)
        return torch.ones(self.parallel.size, len(ids_TK), dtype=torch.bool)

    def _require_same(self) -> None:
        local, shared = self.local, "none" if self.shared is None else "one"
        require_same(
            self._peers,
            {
                f"{self._slot}: division": f"{self.parallel.attention}, {self.parallel.experts}, {self.travel}",
                f"{self._slot}: experts": f"{local.num_experts} of {local.hidden_size}",
                f"{self._slot}: SwiGLU limit": f"{local.swiglu_limit}",
                f"{self._slot}: shared expert": shared,
            },
        )

    def _by_heads(self) -> ExpertSum:
        reduce = self._exchange(Reduce, "reduce", OpKind.REDUCE)
        self._exchanges = (reduce,)
        return lambda x, ids, weights: reduce(self._part(x, ids, weights), self._shared_part(x))

    def _by_data(self) -> ExpertSum:
        routed = self._dispatched() if self.travel is RowTravel.ROUTED else self._gathered()
        return lambda x, ids, weights: routed(x, ids, weights, self._shared_part(x))

    def _gathered(self) -> GatheredExperts:
        gather = self._exchange(GatherRows, "gather", OpKind.GATHER)
        scatter = self._exchange(Scatter, "scatter", OpKind.SCATTER)
        self._exchanges = (gather, scatter)
        return GatheredExperts(self._part, gather, scatter)

    def _dispatched(self) -> DispatchedExperts:
        dispatch = self._exchange(DispatchRows, "dispatch", OpKind.DISPATCH)
        combine = self._exchange(CombineRows, "combine", OpKind.COMBINE)
        self._exchanges = (dispatch, combine)
        return DispatchedExperts(self._part, dispatch, combine, self.num_experts, self.parallel.size)

    def _shared_part(self, x: Tensor) -> Tensor | None:
        return None if self.shared is None else self.shared(x)

    def _exchange(self, make: type[AnyExchange], name: str, kind: OpKind) -> AnyExchange:
        pushed = None if self._window is None else PUSHED_KERNELS.get(kind)
        kernel = self._kernels.get(kind, pushed or f"ref.{kind}")
        return make(self._peers, f"{self._slot}.{name}", self._window, kernel=kernel)

    @property
    def _is_pushed(self) -> bool:
        return any(exchange.spec.is_pushed for exchange in self._exchanges)

    def _require_alike(self, x: Tensor, topk_ids: Tensor) -> None:
        """Checks, the first time that rows of such a shape are given, that all ranks give them. Errors: RanksDiffer."""
        key = len(x), topk_ids.shape[1], topk_ids.dtype, x.dtype
        if key not in self._known:
            told = f"{key[0]} of {key[1]} experts, {key[2]}, {key[3]}"
            require_same(self._peers, {f"{self._slot}: number of rows": told})
            self._known.add(key)


def _parallel(peers: Peers, attention: AttentionSplit | str, experts: ExpertSplit | str) -> Parallel:
    return Parallel(peers.rank, peers.size, attention, experts)  # type: ignore[arg-type]  # it takes their names


def _travel(slot: str, parallel: Parallel, dispatch: RowTravel | str) -> RowTravel:
    """Checks a dispatch. Errors: ValueError naming it."""
    if dispatch not in list(RowTravel):
        raise ValueError(f"{slot}: dispatch is {dispatch!r}, which is none of {', '.join(RowTravel)}")
    travel = RowTravel(dispatch)
    if travel is RowTravel.ROUTED:
        if parallel.attention is AttentionSplit.HEADS:
            raise ValueError(f"{slot}: dispatch is routed, but with attention by heads every rank has all rows")
        if parallel.experts is ExpertSplit.WIDTH:
            raise ValueError(f"{slot}: dispatch is routed, but with experts by width every rank needs all rows")
    return travel


def _cut_shared(shared: Sequence[Tensor], swiglu_limit: float, slot: str, parallel: Parallel) -> SwigluMlp:
    """Makes this rank's shared expert of whole stacks of one expert. Errors: ValueError; ShardingError."""
    whole = _stored("shared", shared, swiglu_limit)
    if whole.num_experts != 1:
        raise ValueError(f"{slot}: the shared expert must be a stack of 1, found {whole.num_experts}")
    w13, w2 = cut_experts(whole, slot, SHARED, parallel)
    codes, scale, global_scale = (part[0] for part in w13)
    gate_up = Nvfp4Linear(list(codes.chunk(2)), list(scale.chunk(2)), list(global_scale))
    return SwigluMlp(gate_up, Nvfp4Linear(*(part[0] for part in w2)), swiglu_limit)


def _stored(name: str, stacks: Sequence[Tensor], swiglu_limit: float) -> StoredExperts:
    """Checks six stacks. Errors: ValueError naming the one that is wrong."""
    if len(stacks) != 6:
        raise ValueError(f"{name} must be the six tensors of Nvfp4MoE, found {len(stacks)}")
    return stored_nvfp4(stacks[:3], stacks[3:], swiglu_limit)
