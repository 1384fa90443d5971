"""One rank of exchanges between GPUs: python -m support.exchange_ranks TASK RANK SIZE FILE [ARGUMENT].

replays COUNT: graphs of several sizes, in a random order, with random delays on every rank; each replay checks its
sums. dies PHASE: the last rank ends itself by SIGKILL; the others print how long it took them to raise PeerLost, and
exit 75. baselines: torch's NCCL and symmetric memory give the sums too.
"""

import os
import random
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ownpath.kernels.exchange.collectives import Collectives, GroupCollectives, SymmetricCollectives
from ownpath.kernels.exchange.launch import PUSHED_REDUCE, PushedOperand, start_exchange
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.ref import all_reduce
from ownpath.kernels.exchange.symmetric import open_window
from ownpath.kernels.exchange.window import SERVING_LIMIT_US
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
        self.num_wrong += (found.view(torch.int16) != all_reduce(parts).view(torch.int16)).sum()


def replays(operand: PushedOperand, size: int, count: int) -> None:
    """Replays graphs of random sizes, the same on all ranks, with delays of this rank's own."""
    graphs = [Replayed(operand, num_tokens, size) for num_tokens in TOKENS]
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
    wrong = {num_tokens: int(graph.num_wrong) for num_tokens, graph in zip(TOKENS, graphs, strict=True)}
    assert not any(wrong.values()), wrong


def die(operand: PushedOperand, phase: str, x: torch.Tensor) -> None:
    """Ends this process in a phase of an exchange."""
    if phase == "in the wait":  # its own wait: the others are late
        PUSHED_REDUCE.run(x, operand)
    elif phase == "after the push":
        start_exchange(operand.window, x, None, x, pushes=True, sums=False)
        torch.cuda.synchronize()
    elif phase == "in the push":
        start_exchange(operand.window, x, None, x, pushes=True, sums=False)
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


def main() -> None:
    """Runs one rank."""
    task, rank, size, meeting, *rest = sys.argv[1:]
    torch.cuda.set_device(int(rank))
    limit = timedelta(seconds=120)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{meeting}", rank=int(rank), world_size=int(size), timeout=limit
    )
    group = dist.group.WORLD
    assert group is not None
    host_group = dist.new_group(backend="gloo")
    window = open_window(WindowLayout(int(size), max(TOKENS) * WIDTH), group, host_group)
    operand = PUSHED_REDUCE.prepare(window)
    if task == "replays":
        replays(operand, int(size), int(rest[0]))
    elif task == "dies":
        dies(operand, int(size), rest[0])
    else:
        baselines(operand, int(size), group)
    dist.barrier(host_group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
