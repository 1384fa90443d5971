"""The window of ranks whose experts exchange rows by kernels: opened once, for all layers.

Legend: N ranks, T tokens of a rank, D hidden, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ownpath.kernels.exchange.layout import SHARE_MULTIPLE, WindowLayout
from ownpath.ranks.peers import Peers

if TYPE_CHECKING:  # needs triton
    from ownpath.kernels.exchange.window import Window

MIN_SM = 90
_ID_WORDS, _WEIGHT_WORDS = 4, 2
"""Words of 16 bits of an int64 and of a float32."""


def expert_layout(size: int, hidden_size: int, max_tokens: int, top_k: int) -> WindowLayout:
    """Returns the layout of windows with room for calls of ``MegaMoE`` with up to ``max_tokens`` a rank.

    A rank's window takes 2 N T D * 2 bytes for sums and N T (2 D + 12 K) for rows: 131 MB for 2 ranks, 1024 tokens and
    V4-Flash's sizes.
    """
    rows = max_tokens * (hidden_size + top_k * (_ID_WORDS + _WEIGHT_WORDS)) + 3 * SHARE_MULTIPLE
    return WindowLayout(size, _whole(max_tokens * hidden_size), row_elements=_whole(rows))


def _whole(num_elements: int) -> int:
    return -(-num_elements // SHARE_MULTIPLE) * SHARE_MULTIPLE


@dataclass(frozen=True)
class WindowedPeers:
    """Ranks that can also write to each other's memory; see ``Peers``. window: this rank's."""

    peers: Peers
    window: "Window"

    @property
    def rank(self) -> int:
        """See ``Peers``."""
        return self.peers.rank

    @property
    def size(self) -> int:
        """See ``Peers``."""
        return self.peers.size

    def swap(self, slot: str, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``: through the host."""
        return self.peers.swap(slot, tensors)

    def trade(self, slot: str, parts: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """See ``Peers``: through the host."""
        return self.peers.trade(slot, parts)


def open_window(peers: Peers, hidden_size: int, max_tokens: int, top_k: int) -> WindowedPeers:
    """Opens this process's window on the current CUDA device, for ``MegaMoE`` of any number of layers on one stream.
    Every rank calls it.

    peers: ``ownpath.ranks.group.join(os.environ)``. hidden_size, top_k: of the experts. max_tokens: the most tokens
    that a rank gives a call; by heads, that all give. A wait for another rank ends after two minutes; with
    ``window.set_limit(us)`` earlier, which graphs that are captured already obey too.
    Errors: ValueError for ranks that are not processes of a group, or a device without these kernels; RuntimeError of
        torch's where GPUs cannot map each other's memory.
    """
    if not dist.is_initialized() or dist.get_world_size() != peers.size:
        raise ValueError("a window needs ranks that are processes: those of ownpath.ranks.group.join")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < divmod(MIN_SM, 10):
        raise ValueError("a window needs a GPU of compute capability 9.0 or later")
    from ownpath.kernels.exchange import symmetric

    group = dist.group.WORLD
    assert group is not None
    layout = expert_layout(peers.size, hidden_size, max_tokens, top_k)
    return WindowedPeers(peers, symmetric.open_window(layout, group, group))
