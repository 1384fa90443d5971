"""Exchanges alone, for ``ownpath bench parallel``: a sum over ranks, alone and in front of a boundary, columns, and
rows there and back.

Values are whole numbers whose sums are exact in any order, so that every system must give the twin's bits.

Legend: N ranks, T tokens of a rank, D hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ownpath.bench.row import Case, Row
from ownpath.bench.together import LINK_GBPS, Together, TogetherContender, TogetherRound
from ownpath.conformance.operations import make_inputs
from ownpath.kernels.cases import KernelCase
from ownpath.kernels.exchange.collectives import Collectives, GroupCollectives, SymmetricCollectives
from ownpath.kernels.exchange.ref import all_reduce
from ownpath.kernels.registry import KERNELS
from ownpath.ops import OpKind
from ownpath.runners import GatherColumns, GatherRows, Reduce, Scatter
from ownpath.runners.exchange import Exchange
from ownpath.runners.mega_moe import PUSHED_KERNELS
from ownpath.runners.window import WindowedPeers

NUM_CALLS = 20


def exchange_rows(ranks: Together, shape: str, num_tokens: int, width: int) -> Iterator[Row]:
    """Yields the rows of one size."""
    for what, kind in (("sum", OpKind.REDUCE), ("columns", OpKind.GATHER), ("rows and back", OpKind.SCATTER)):
        trips = 2 if kind is OpKind.SCATTER else 1
        case = _case(ranks, f"{what} {shape}", num_tokens, width, trips)
        for contender in _contenders(ranks, kind, num_tokens, width):
            yield ranks.row(case, contender)
    yield from _boundary_rows(ranks, shape, num_tokens, width)


def own_exchange(ranks: Together, make: type[Exchange], kind: OpKind) -> Exchange:
    """Makes this package's exchange: pushed between GPUs, else the torch reference."""
    window = ranks.peers.window if isinstance(ranks.peers, WindowedPeers) else None
    kernel = f"ref.{kind}" if window is None else PUSHED_KERNELS[kind]
    return make(ranks.peers, f"bench.{kind}", window, kernel=kernel)


def collectives_of(ranks: Together, max_elements: int) -> Iterator[tuple[str, Callable[[], Collectives]]]:
    """Yields the exchanges of others, by name."""
    yield ("nccl" if ranks.on_gpus else "gloo"), lambda: GroupCollectives(ranks.group)
    if ranks.on_gpus:
        yield "symmetric memory", lambda: SymmetricCollectives(ranks.group, max_elements)


def _case(ranks: Together, shape: str, num_tokens: int, width: int, trips: int = 1) -> Case:
    """trips: how often a rank sends its rows to every other rank."""
    num_bytes = trips * (ranks.size - 1) * num_tokens * width * 2
    floor_us = num_bytes / LINK_GBPS / 1e3 if ranks.on_gpus else None
    return Case("parallel", shape, {"ranks": ranks.size, "width": width}, num_tokens, num_bytes, 0, floor_us)


def _parts(ranks: Together, num_tokens: int, width: int) -> list[Tensor]:
    """Returns all ranks' parts: whole numbers up to 68."""
    whole = torch.arange(num_tokens * width, device=ranks.device).view(num_tokens, width) % 61
    return [(whole + one).to(torch.bfloat16) for one in range(ranks.size)]


def _contenders(ranks: Together, kind: OpKind, num_tokens: int, width: int) -> Iterator[TogetherContender]:
    parts = _parts(ranks, num_tokens, width)
    mine, total = parts[ranks.rank], all_reduce(parts)
    wanted = {
        OpKind.REDUCE: total,
        OpKind.GATHER: torch.cat(parts, dim=1),
        OpKind.SCATTER: (ranks.size * mine.float()).to(mine.dtype),
    }[kind]

    def judge(found: Tensor) -> float:
        return 0.0 if torch.equal(found, wanted) else float("nan")

    def same_call(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[], TogetherRound]:
        def round_of() -> TogetherRound:
            call = make()
            return _round(call, mine, judge)

        return round_of

    yield TogetherContender("ownpath", same_call(lambda: _own_call(ranks, kind)), is_peer=False)
    for name, make in collectives_of(ranks, ranks.size * num_tokens * width):
        yield TogetherContender(name, same_call(lambda make=make: _peer_call(ranks, kind, make())))  # type: ignore[misc]


def _round(call: Callable[[Tensor], Tensor], part: Tensor, judge: Callable[[Tensor], float]) -> TogetherRound:
    """Calls that may write to what they are given: the first one, which is judged, is given a copy."""
    again = part.clone()
    return TogetherRound([lambda: call(part.clone()), *[lambda: call(again)] * (NUM_CALLS - 1)], judge)


def _own_call(ranks: Together, kind: OpKind) -> Callable[[Tensor], Tensor]:
    if kind is OpKind.SCATTER:
        gather, scatter = own_exchange(ranks, GatherRows, OpKind.GATHER), own_exchange(ranks, Scatter, kind)

        def there_and_back(x: Tensor) -> Tensor:
            (rows,), counts = gather(x)
            return scatter(rows, counts)  # type: ignore[no-any-return]

        return there_and_back
    return own_exchange(ranks, Reduce if kind is OpKind.REDUCE else GatherColumns, kind)


def _peer_call(ranks: Together, kind: OpKind, given: Collectives) -> Callable[[Tensor], Tensor]:
    if kind is OpKind.REDUCE:
        return given.all_reduce
    if kind is OpKind.GATHER:
        return lambda x: given.all_gather(x).view(ranks.size, *x.shape).transpose(0, 1).reshape(len(x), -1)
    return lambda x: given.reduce_scatter(given.all_gather(x))


def _boundary_rows(ranks: Together, shape: str, num_tokens: int, width: int) -> Iterator[Row]:
    """Yields a boundary, and one behind a sum over ranks; facts: what the sum adds to the boundary's time."""
    inputs = KernelCase("hyper_boundary", shape, (width, 24, 1), (num_tokens,))
    x_TSD, _, mix, weights = make_inputs(inputs, num_tokens, ranks.device)[:4]
    parts = _parts(ranks, num_tokens, width)
    mine, total = parts[ranks.rank], all_reduce(parts)
    kernel = KERNELS["triton.hyper_boundary" if ranks.on_gpus else "ref.hyper_boundary"]
    operand = kernel.prepare(weights)

    def boundary(y: Tensor) -> Tensor:
        h_TD: Tensor = kernel.run(x_TSD, y, mix, operand).h_TD
        return h_TD

    wanted = boundary(total)

    def judge(found: Tensor) -> float:
        return 0.0 if torch.equal(found, wanted) else float("nan")

    def behind(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[], TogetherRound]:
        def round_of() -> TogetherRound:
            add_up = make()
            return _round(lambda y: boundary(add_up(y)), mine, judge)

        return round_of

    case = _case(ranks, f"boundary {shape}", num_tokens, width)
    lone = TogetherContender("ownpath", lambda: TogetherRound([lambda: boundary(total)] * NUM_CALLS, judge), False)
    alone = ranks.row(replace(case, shape=f"boundary alone {shape}", num_bytes=0, floor_us=None), lone)
    yield alone
    contenders = [TogetherContender("ownpath", behind(lambda: _own_call(ranks, OpKind.REDUCE)), is_peer=False)]
    for name, make in collectives_of(ranks, num_tokens * width):
        contenders.append(TogetherContender(name, behind(lambda make=make: make().all_reduce)))  # type: ignore[misc]
    for contender in contenders:
        row = ranks.row(case, contender)
        if row.timing is not None and alone.timing is not None:
            row = replace(row, facts={"added_us": round(row.timing.us - alone.timing.us, 2)})
        yield row
