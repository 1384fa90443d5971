"""A rank that maps other processes' windows, which are files, as GPUs map each other's memory; kernels are interpreted.

python -m support.mapped_windows RANK SIZE FOLDER: ``MegaMoE`` in four forms, and rows that go to all ranks and whose
columns come back, by pushed kernels and through gloo; exits 0 if the bits are the same.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist

from ownpath import MegaMoE
from ownpath.conformance.quant_weights import ExpertStacks, RoutedTokens
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import Window, start_words
from ownpath.ranks.group import Group
from ownpath.runners.exchange import GatherRows, Turn
from ownpath.runners.window import WindowedPeers, expert_layout
from support import triton_interpreter

LIMIT_POLLS = 20_000
HIDDEN, WIDTH, NUM_EXPERTS, TOP_K, LIMIT = 128, 64, 4, 2, 10.0
FORMS = [{"attention": a, "experts": e} for a in ("data", "heads") for e in ("ids", "width")]


def mapped_window(layout: WindowLayout, rank: int, folder: Path) -> Window:
    """Maps all ranks' files; this rank's is in its first state, NaN behind it, once every rank has called it."""
    memory = []
    for other in range(layout.size):
        file, made = folder / f"window{other}", rank == other
        memory.append(torch.from_file(str(file), shared=True, size=layout.num_words, dtype=torch.int32))
        if made:
            memory[-1].fill_(-1)
            start_words(memory[-1], layout, epoch=2**31 - 3)
    dist.barrier()
    peers = torch.tensor([words.data_ptr() for words in memory], dtype=torch.int64)
    KEPT.extend(memory)
    return Window(layout, rank, memory[rank], peers, torch.zeros(1, dtype=torch.int64))


KEPT = list[torch.Tensor]()
"""The memory that is mapped."""


def run_rank(rank: int, size: int, folder: Path) -> None:
    """Runs one rank. Errors: AssertionError for other bits; PeerLost."""
    group = Group(dist.FileStore(str(folder / "meeting"), size), rank, size)
    layout = expert_layout(size, HIDDEN, 3, TOP_K)
    small = WindowLayout(size, layout.max_elements, num_programs=2, row_elements=layout.row_elements)
    peers = WindowedPeers(group, mapped_window(small, rank, folder))
    peers.window.set_limit(LIMIT_POLLS)
    routed, shared = stacks_of()
    for form, counts in zip(FORMS, ((3, 1), (2,), (2,), (1,)), strict=True):
        for num_tokens in counts:
            drawn = RoutedTokens.draw(size * num_tokens, HIDDEN, NUM_EXPERTS, TOP_K, torch.device("cpu"))
            drawn.ids[0, 0] = -1
            compare_form(peers, routed, shared, drawn, form)
    check_turn(peers)
    dist.barrier()
    dist.destroy_process_group()


def stacks_of() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draws routed experts and a shared one, the same on all ranks."""
    torch.manual_seed(3)
    stacks = ExpertStacks.draw(NUM_EXPERTS + 1, HIDDEN, WIDTH, torch.device("cpu")).tensors()
    return [part[:NUM_EXPERTS] for part in stacks], [part[NUM_EXPERTS:] for part in stacks]


def compare_form(
    peers: WindowedPeers,
    routed: list[torch.Tensor],
    shared: list[torch.Tensor],
    drawn: RoutedTokens,
    form: dict[str, str],
) -> None:
    """Checks that a call by kernels gives the bits of one through the host. drawn: tokens of all ranks, equally many;
    by heads those of rank 0 are given by all."""
    pushed = MegaMoE.cut(routed, LIMIT, peers, shared=shared, **form)
    hosted = MegaMoE.cut(routed, LIMIT, peers.peers, shared=shared, **form)
    num_tokens = len(drawn.x) // peers.size
    first = peers.rank * num_tokens if form["attention"] == "data" else 0
    mine = slice(first, first + num_tokens)
    given = drawn.x[mine].bfloat16(), drawn.ids[mine], drawn.weights[mine]
    assert torch.equal(pushed(*given), hosted(*given)), (form, num_tokens)
    pushed.check()


def check_turn(peers: WindowedPeers) -> None:
    """Checks rows of 3 tokens a rank, and of 1, there and back; more than fit the window's inbox go in two."""
    window, group = peers.window, peers.peers
    for num_tokens in (3, 1):
        mine = torch.randn(num_tokens, HIDDEN).bfloat16()
        part_VD = torch.randn(window.layout.max_elements // 8, HIDDEN)
        found = []
        for kernels, at in ((("triton.gather", "triton.turn"), window), (("ref.all_gather", "ref.all_to_all"), None)):
            gather, turn = (
                GatherRows(group, "gather", at, kernel=kernels[0]),
                Turn(group, "turn", at, kernel=kernels[1]),
            )
            (rows_BD,), counts = gather(mine)
            assert counts == (num_tokens,) * peers.size
            found.append(turn(rows_BD.float() @ part_VD.T, counts))
        assert torch.equal(*found), num_tokens
        window.check()


def main() -> None:
    """Runs the rank that the command line names."""
    triton_interpreter.install()
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
