"""The exchanges as others make them: torch's groups (gloo on a host, NCCL between GPUs), and its symmetric memory.

What pushed exchanges are measured beside. Groups add in an order of their own; symmetric memory adds in the order of
ranks.

Legend: N ranks, T rows of a rank, C columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor


class Collectives(Protocol):
    """Exchanges of equal shapes on all ranks. Every rank calls the same ones in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replaces x by its sum over ranks, and returns it."""

    def all_gather(self, x_TC: Tensor) -> Tensor:
        """Returns all ranks' rows, in the order of ranks: [N * T, C]."""

    def reduce_scatter(self, x_BC: Tensor) -> Tensor:
        """Returns this rank's rows of the sum over ranks of x [N * T, C]: [T, C]. Errors: ValueError for rows that
        ranks cannot share equally."""


def rows_of_each(x_BC: Tensor, size: int) -> int:
    """Returns the rows of one rank. Errors: ValueError for rows that ranks cannot share equally."""
    if len(x_BC) % size:
        raise ValueError(f"{len(x_BC)} rows cannot be shared equally by {size} ranks")
    return len(x_BC) // size


class GroupCollectives:
    """Those of a process group of torch's."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ``Collectives``."""
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x_TC: Tensor) -> Tensor:
        """See ``Collectives``."""
        rows, columns = x_TC.shape
        out = x_TC.new_empty(self._group.size() * rows, columns)
        dist.all_gather_into_tensor(out, x_TC.contiguous(), group=self._group)
        return out

    def reduce_scatter(self, x_BC: Tensor) -> Tensor:
        """See ``Collectives``."""
        out = x_BC.new_empty(rows_of_each(x_BC, self._group.size()), x_BC.shape[1])
        dist.reduce_scatter_tensor(out, x_BC.contiguous(), group=self._group)
        return out


class SymmetricCollectives:
    """Those of torch's symmetric memory, bfloat16: the one-shot sum; rows that ranks read from each other's memory."""

    def __init__(self, group: dist.ProcessGroup, max_elements: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._name = group.group_name
        self._own: Tensor = symmetric.empty(max_elements, dtype=torch.bfloat16, device=device)
        self._handle = symmetric.rendezvous(self._own, group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ``Collectives``."""
        own = self._own[: x.numel()].view_as(x)
        copied: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy_out(own, x, "sum", self._name, x)
        return copied

    def all_gather(self, x_TC: Tensor) -> Tensor:
        """See ``Collectives``."""
        with self._shared(x_TC) as parts:
            return torch.cat(parts)

    def reduce_scatter(self, x_BC: Tensor) -> Tensor:
        """See ``Collectives``."""
        num_rows, rank = rows_of_each(x_BC, self._handle.world_size), self._handle.rank
        mine = slice(rank * num_rows, (rank + 1) * num_rows)
        with self._shared(x_BC) as parts:
            return torch.stack([part[mine] for part in parts]).float().sum(0).to(x_BC.dtype)

    @contextmanager
    def _shared(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Yields all ranks' x, in their memory."""
        self._own[: x.numel()].view_as(x).copy_(x)
        self._handle.barrier(channel=0)
        size = self._handle.world_size
        yield [self._handle.get_buffer(rank, tuple(x.shape), x.dtype) for rank in range(size)]
        self._handle.barrier(channel=1)  # nobody writes before all have read
