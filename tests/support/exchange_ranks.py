"""One rank of exchanges between GPUs: python -m support.exchange_ranks TASK RANK SIZE FILE [ARGUMENT].

replays COUNT: graphs of several sizes, in a random order, with random delays on every rank; each replay checks its
sums. rows COUNT: the same of rows with ids and weights there and sums back, of columns, and of sums, in one window.
mega: ``MegaMoE`` in four forms, eagerly and as a graph. dies PHASE: the last rank ends itself by SIGKILL; the others
print how long it took them to raise PeerLost, and exit 75. baselines: torch's NCCL and symmetric memory give the sums
too.
"""

import os
import random
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ownpath import MegaMoE
from ownpath import open_window as open_for_experts
from ownpath.conformance.bounds import assert_allowed
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens, exact_mixture
from ownpath.kernels.exchange.collectives import Collectives, GroupCollectives, SymmetricCollectives
from ownpath.kernels.exchange.gather import PUSHED_GATHER
from ownpath.kernels.exchange.launch import PUSHED_REDUCE, PushedOperand, start_tagged
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_gather, all_reduce, reduce_scatter
from ownpath.kernels.exchange.scatter import PUSHED_SCATTER
from ownpath.kernels.exchange.symmetric import open_window
from ownpath.kernels.exchange.window import SERVING_LIMIT_US
from ownpath.ranks.group import Group
from ownpath.ranks.peers import PeerLost

WIDTH = 4096
TOKENS = (1, 3, 8, 64, 200)
SLOT = "layers.3.attn.reduce"
LOST_EXIT = 75
MAX_DELAY_CYCLES = 200_000


def part(count: torch.Tensor, rank: int, num_tokens: int) -> torch.Tensor:
    """A rank's part of a replay: numbers that differ by place, rank and replay, with sums that round."""
    at = torch.arange(num_tokens * WIDTH, device=count.device)
    value = ((at * 7 + count * 13 + rank * 101) % 251 - 125).float() / (1 + 3 * rank)
    return value.to(torch.bfloat16).view(num_tokens, WIDTH)


def wrong_bits(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Counts words of 16 bits that differ, on the device."""
    return (found.contiguous().view(torch.int16) != wanted.contiguous().view(torch.int16)).sum()


class Replayed:
    """A captured exchange of one size, which makes its parts, and counts wrong elements."""

    def __init__(self, operand: PushedOperand, num_tokens: int, size: int) -> None:
        device = operand.window.words.device
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.num_wrong = torch.zeros((), dtype=torch.int64, device=device)
        self._operand, self._num_tokens, self._size = operand, num_tokens, size
        self.step()  # compiles
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def step(self) -> None:
        """One exchange, in place."""
        self.count += 1
        parts = [part(self.count, rank, self._num_tokens) for rank in range(self._size)]
        found = parts[self._operand.window.rank].clone()
        PUSHED_REDUCE.run(found, self._operand, out=found)
        self.num_wrong += wrong_bits(found, all_reduce(parts))


class ReplayedColumns(Replayed):
    """Columns of all ranks, in float32."""

    def step(self) -> None:
        self.count += 1
        parts = [part(self.count, rank, self._num_tokens).float() * 1.1 for rank in range(self._size)]
        found = PUSHED_GATHER.run(parts[self._operand.window.rank] + 0, GATHERS[0])
        self.num_wrong += wrong_bits(found, all_gather(parts, -1))


class ReplayedRows(Replayed):
    """Rows with ids and weights to all ranks, and sums back, with something added."""

    def step(self) -> None:
        self.count += 1
        rank, at = self._operand.window.rank, torch.arange(6, device=self.count.device)
        x = [part(self.count, other, self._num_tokens) for other in range(self._size)]
        ids = [(one[:, :6].float() * 8 + at).int() for one in x]
        weights = [one[:, 6:12].float() / 7 for one in x]
        given = x[rank] + 0, ids[rank] + 0, weights[rank] + 0
        rows, counts = PUSHED_GATHER.rows(given, GATHERS[0])
        wanted = [all_gather(parts) for parts in (x, ids, weights)]
        for found, right in zip(rows, wanted, strict=True):
            self.num_wrong += wrong_bits(found, right)
        sums = [(wanted[0].float() / (3 + other)).to(torch.bfloat16) for other in range(self._size)]
        mine = (rows[0].float() / (3 + rank)).to(torch.bfloat16)
        found = PUSHED_SCATTER.run(mine, SCATTERS[0], counts, other_TD=x[rank])
        right = (reduce_scatter(sums, rank).float() + x[rank].float()).to(torch.bfloat16)
        self.num_wrong += wrong_bits(found, right)


GATHERS, SCATTERS = list[Any](), list[Any]()
"""The operands of this process."""


def replays(operand: PushedOperand, count: int, graphs: list[Replayed]) -> None:
    """Replays graphs in a random order, the same on all ranks, with delays of this rank's own."""
    shared, own = random.Random(1), random.Random(100 + operand.window.rank)
    for number in range(count):
        if own.random() < 0.1:
            torch.cuda._sleep(own.randrange(MAX_DELAY_CYCLES))
        shared.choice(graphs).graph.replay()
        if number % 1000 == 0:
            torch.cuda.synchronize()
            operand.window.check(SLOT)
    torch.cuda.synchronize()
    operand.window.check(SLOT)
    wrong = [f"{type(graph).__name__} {num}" for graph in graphs if (num := int(graph.num_wrong))]
    assert not wrong, wrong


def graphs_of_rows(operand: PushedOperand, size: int) -> list[Replayed]:
    """Graphs of every exchange, which share the window."""
    GATHERS.append(PUSHED_GATHER.prepare(operand.window))
    SCATTERS.append(PUSHED_SCATTER.prepare(operand.window))
    kinds: list[tuple[type[Replayed], tuple[int, ...]]] = [
        *((ReplayedRows, (1, 3, 64, 200)), (ReplayedColumns, (1, 8, 64)), (Replayed, (1, 64)))
    ]
    return [kind(operand, num_tokens, size) for kind, sizes in kinds for num_tokens in sizes]


def die(operand: PushedOperand, phase: str, x: torch.Tensor) -> None:
    """Ends this process in a phase of an exchange."""
    if phase == "in the wait":  # its own wait: the others are late
        PUSHED_REDUCE.run(x, operand)
    elif phase == "after the push":
        start_tagged(operand.window, x, None, x, pushes=True, sums=False)
        torch.cuda.synchronize()
    elif phase == "in the push":
        start_tagged(operand.window, x, None, x, pushes=True, sums=False)
    else:
        assert phase == "before the push", phase
    os.kill(os.getpid(), signal.SIGKILL)


def dies(operand: PushedOperand, size: int, phase: str) -> None:
    """Some exchanges by all; then the last rank dies, and the others go on until they know."""
    rank, window = operand.window.rank, operand.window
    x = torch.ones(64, WIDTH, dtype=torch.bfloat16, device=window.words.device)
    for _ in range(10):
        out = PUSHED_REDUCE.run(x, operand)
    torch.cuda.synchronize()
    window.check(SLOT)
    assert (out == size).all()
    window.set_limit(SERVING_LIMIT_US)
    dist.barrier()
    if rank == size - 1:
        die(operand, phase, x)
    if phase == "in the wait":
        time.sleep(0.5)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 20:
            out = PUSHED_REDUCE.run(x, operand)
            torch.cuda.synchronize()
            window.check(SLOT)
        raise AssertionError("nobody is missed")
    except PeerLost as error:
        took = time.monotonic() - start
        assert out.isnan().all()
        assert torch.ones(4, device=x.device).sum() == 4, "the device does not work any more"
        print(f"{took:.2f} s: {error}", flush=True)
    os._exit(LOST_EXIT)


def baselines(operand: PushedOperand, size: int, group: dist.ProcessGroup) -> None:
    """Torch's exchanges, of whole numbers, whose sums are exact in any order."""
    rank, device = operand.window.rank, operand.window.words.device
    kinds: list[Collectives] = [GroupCollectives(group), SymmetricCollectives(group, 64 * WIDTH)]
    for collectives in kinds:
        parts = [torch.arange(8 * WIDTH, device=device).view(8, WIDTH) % 61 + one for one in range(size)]
        parts = [one.to(torch.bfloat16) for one in parts]
        total, rows = all_reduce(parts), 8 // size
        assert torch.equal(collectives.all_gather(parts[rank]), torch.cat(parts))
        assert torch.equal(collectives.reduce_scatter(parts[rank]), total[rank * rows : (rank + 1) * rows])
        assert torch.equal(collectives.all_reduce(parts[rank].clone()), total)


HIDDEN, WIDTH_OF_RANK, NUM_EXPERTS, TOP_K, LIMIT = 512, 128, 16, 4, 10.0
FORMS = [{"attention": a, "experts": e} for a in ("data", "heads") for e in ("ids", "width")]


def mega(rank: int, size: int, meeting: str) -> None:
    """``MegaMoE`` by kernels beside the same through the host: the same bits; as a graph, on other tokens."""
    group = Group(dist.FileStore(meeting, size), rank, size)
    device = torch.device("cuda", rank)
    torch.manual_seed(3)  # all ranks draw the same
    stacks = ExpertStacks.draw(NUM_EXPERTS + 1, HIDDEN, WIDTH_OF_RANK * size, torch.device("cpu")).tensors()
    stacks = [part.to(device) for part in stacks]
    routed, shared = [part[:NUM_EXPERTS] for part in stacks], [part[NUM_EXPERTS:] for part in stacks]
    peers = open_for_experts(group, HIDDEN, 200, TOP_K)
    peers.window.words[peers.window.layout.inbox_at :] = -1
    torch.cuda.synchronize()
    dist.barrier()
    for form in FORMS:
        pushed = MegaMoE.cut(routed, LIMIT, peers, shared=shared, **form)
        hosted = MegaMoE.cut(routed, LIMIT, group, shared=shared, **form)
        assert not pushed.reads_host
        assert hosted.reads_host
        for num_tokens in (1, 8, 65, 200):
            every = [RoutedTokens.draw(num_tokens * size, HIDDEN, NUM_EXPERTS, TOP_K, device) for _ in range(2)]
            for drawn in every:
                drawn.ids[::5, 0] = -1  # no expert
            mine = (
                slice(rank * num_tokens, (rank + 1) * num_tokens) if form["attention"] == "data" else slice(num_tokens)
            )
            given = [(one.x[mine].bfloat16(), one.ids[mine].clone(), one.weights[mine].clone()) for one in every]
            compare(pushed, hosted, given, f"{form} {num_tokens}")
        by_heads(group, pushed(*given[0]), form)
    whole = MegaMoE.cut(routed, LIMIT, peers)
    drawn = RoutedTokens.draw(8, HIDDEN, NUM_EXPERTS, TOP_K, device)
    tokens = RoutedTokens(drawn.x.bfloat16(), drawn.ids, drawn.weights)
    assert_allowed(whole(tokens.x, tokens.ids, tokens.weights), exact_mixture(ExpertStacks(*routed), tokens, LIMIT))
    whole.check()
    dist.barrier()


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compare(pushed: MegaMoE, hosted: MegaMoE, given: list[Given], told: str) -> None:
    """Eagerly, then 200 replays of a graph whose tokens change: the bits of exchanges through the host."""
    wanted = [hosted(*one) for one in given]
    assert all(torch.isfinite(y).all() for y in wanted), told
    for one, right in zip(given, wanted, strict=True):
        assert torch.equal(pushed(*one), right), told
    held = [part.clone() for part in given[0]]
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(wanted[0])
    with torch.cuda.graph(graph):
        out.fill_(float("nan"))
        out.copy_(pushed(*held))
    num_wrong = torch.zeros((), dtype=torch.int64, device=out.device)
    for number in range(200):
        for part, new in zip(held, given[number % 2], strict=True):
            part.copy_(new)
        graph.replay()
        num_wrong += wrong_bits(out, wanted[number % 2])
    torch.cuda.synchronize()
    pushed.check()
    assert not int(num_wrong), (told, int(num_wrong))


def by_heads(group: Group, y: torch.Tensor, form: dict[str, str]) -> None:
    """The same bits on all ranks."""
    found = [one.cpu() for (one,) in group.swap("answers", (y,))]
    if form["attention"] == "heads":
        assert all(torch.equal(one, found[0]) for one in found), form


def main() -> None:
    """Runs one rank."""
    task, rank, size, meeting, *rest = sys.argv[1:]
    torch.cuda.set_device(int(rank))
    if task == "mega":
        mega(int(rank), int(size), meeting)
        dist.destroy_process_group()
        return
    limit = timedelta(seconds=120)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{meeting}", rank=int(rank), world_size=int(size), timeout=limit
    )
    group = dist.group.WORLD
    assert group is not None
    host_group = dist.new_group(backend="gloo")
    layout = WindowLayout(int(size), max(TOKENS) * WIDTH, row_elements=max(TOKENS) * 2 * WIDTH)
    window = open_window(layout, group, host_group)
    operand = PUSHED_REDUCE.prepare(window)
    if task == "replays":
        replays(operand, int(rest[0]), [Replayed(operand, num_tokens, int(size)) for num_tokens in TOKENS])
    elif task == "rows":
        replays(operand, int(rest[0]), graphs_of_rows(operand, int(size)))
    elif task == "dies":
        dies(operand, int(size), rest[0])
    else:
        baselines(operand, int(size), group)
    dist.barrier(host_group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
