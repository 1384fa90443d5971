"""Windows on several GPUs of one host: memory of torch's symmetric memory, which every process maps.

A peer's memory stays mapped after its process has ended, so that what is pushed there harms nobody.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import Window, start_words


def open_on_gpus(layout: WindowLayout) -> Window:
    """Opens a window as ``open_window`` does, among all processes of torch's default group, of whatever backend: ranks
    find each other's memory through its store."""
    world = dist.group.WORLD
    assert world is not None
    return open_window(layout, world, world)


def open_window(layout: WindowLayout, group: dist.ProcessGroup, host_group: dist.ProcessGroup) -> Window:
    """Opens a window on this process's GPU; every rank calls it. group: of GPUs, which torch maps memory for;
    host_group: gloo, on which ranks wait until all windows are in their first state.

    Errors: ValueError for a layout of another number of ranks; RuntimeError of torch's where GPUs cannot map memory.
    """
    if layout.size != group.size():
        raise ValueError(f"a window for {layout.size} ranks in a group of {group.size()}")
    device = torch.device("cuda", torch.cuda.current_device())
    words: Tensor = symmetric.empty(layout.num_words, dtype=torch.int32, device=device)
    handle = symmetric.rendezvous(words, group)
    start_words(words, layout)
    torch.cuda.synchronize(device)
    dist.barrier(host_group)
    peers = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
    record = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    return Window(layout, handle.rank, words, peers, record)
