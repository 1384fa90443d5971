"""One of two processes that exchange over gloo: python -m support.gloo_collectives RANK FILE. Exits 0 if all is
right."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from ownpath.kernels.exchange.collectives import GroupCollectives

SIZE, ROWS, COLUMNS = 2, 4, 96


def part(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's part: whole numbers whose sums are exact."""
    g = torch.Generator().manual_seed(rank)
    return torch.randint(-100, 101, (ROWS, COLUMNS), generator=g).to(dtype)


def check(rank: int, dtype: torch.dtype) -> None:
    """Checks every exchange of one dtype."""
    group = dist.group.WORLD
    assert group is not None
    collectives, mine = GroupCollectives(group), part(rank, dtype)
    parts = [part(other, dtype) for other in range(SIZE)]
    total = sum(parts[1:], start=parts[0])
    half = ROWS // SIZE
    assert torch.equal(collectives.all_gather(mine), torch.cat(parts))
    assert torch.equal(collectives.reduce_scatter(mine), total[rank * half : (rank + 1) * half])
    in_place = collectives.all_reduce(mine)
    assert in_place is mine
    assert torch.equal(mine, total)


def main() -> None:
    """Runs one rank."""
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=limit)
    for dtype in (torch.bfloat16, torch.float32):
        check(rank, dtype)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
