"""One rank's view of all ranks' windows, as kernels take it; and windows of virtual ranks, in one process."""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from ownpath.kernels.exchange.layout import SHARE_MULTIPLE, WindowLayout
from ownpath.kernels.exchange.order import ExchangeOrder
from ownpath.ranks.peers import PeerLost

INTERPRETED = triton.knobs.runtime.interpret
LOOKS = 1 if INTERPRETED else 64
"""Polls of flags between two looks at the abort cell and at the clock."""
MAX_TAGGED_BLOCK = 512
SERVING_LIMIT_US, START_LIMIT_US, MOST_LIMIT_US = 5_000_000, 120_000_000, 1_800_000_000


@dataclass(frozen=True)
class Window:
    """words: int32 [num_words], this rank's window. peers: int64 [N], the address here of each rank's. record: int64
    [1], where a wait that was given up says so: memory of the host on a GPU, which reads it after each step. order: the
    exchanges by their epochs, where they are noted."""

    layout: WindowLayout
    rank: int
    words: Tensor
    peers: Tensor
    record: Tensor
    order: ExchangeOrder = field(default_factory=ExchangeOrder, compare=False)

    def note(self, slot: str) -> None:
        """Notes an exchange that is launched, or captured, now."""
        self.order.note(slot, self.words.is_cuda and torch.cuda.is_current_stream_capturing())

    def arguments(self, num_elements: int) -> tuple[Tensor | int, ...]:
        """Returns a reader's arguments for an exchange of so many elements: window, peers, record, share and the
        inbox's pitch. Errors: ValueError for more elements than fit, or not a multiple of 128."""
        layout = self.layout
        self.require_room(num_elements)
        if num_elements % SHARE_MULTIPLE:
            raise ValueError(f"elements must be a multiple of {SHARE_MULTIPLE}, found {num_elements}")
        return self.words, self.peers, self.record, layout.share(num_elements), layout.max_elements

    def require_room(self, num_elements: int) -> None:
        """Checks that so many elements of a rank fit its place in an inbox. Errors: ValueError."""
        if num_elements > self.layout.max_elements:
            raise ValueError(f"{num_elements} elements do not fit a window of {self.layout.max_elements}")

    def constants(self) -> dict[str, Any]:
        """Returns what is known at compile time."""
        layout = self.layout
        return {
            "RANKS": layout.size,
            "LANES": int(triton.next_power_of_2(layout.size)),
            "PROGRAMS": layout.num_programs,
            "ABORT_AT": layout.abort_at,
            "INBOX_AT": layout.inbox_at,
            "LOOKS": LOOKS,
            "INTERPRETED": INTERPRETED,
        }

    def set_limit(self, limit_us: int) -> None:
        """Sets the limit of waits, for graphs that are captured already too. At most half an hour."""
        self.words[self.layout.limit_at] = min(limit_us, MOST_LIMIT_US)

    def lost(self) -> tuple[int, tuple[int, ...]] | None:
        """Returns the epoch of the wait that was given up last, and the lost ranks; ``None`` where none was."""
        value = int(self.record[0])
        if not value:
            return None
        return value >> 32, tuple(rank for rank in range(self.layout.size) if value >> rank & 1)

    def check(self, slot: str | None = None) -> None:
        """Checks that no wait was given up; the host asks after each step. slot: the exchange, where none are noted.
        Errors: PeerLost naming the first rank."""
        found = self.lost()
        if found is not None:
            epoch, ranks = found
            slot = slot or self.order.slot_of(epoch) or "an exchange"
            raise PeerLost(ranks[0], slot, f"its rows of exchange {epoch} have not come")


def tagged_block(window: Window, num_words: int) -> int:
    """Returns the step of a program that pushes so many words of two elements, tagged, with others."""
    return min(MAX_TAGGED_BLOCK, int(triton.next_power_of_2(window.layout.share(2 * num_words) // 2)))


def tagged_options(window: Window, num_words: int) -> dict[str, Any]:
    """Returns the options that every launch by tagged words has, and its constants."""
    constants = {name: value for name, value in window.constants().items() if name != "INBOX_AT"}
    block, pdl = tagged_block(window, num_words), not INTERPRETED
    options = {"BLOCK": block, "PDL": pdl, "TAGS_AT": window.layout.tags_at, **constants}
    return {**options, "num_warps": max(1, block // 128), "launch_pdl": pdl}


def start_words(words: Tensor, layout: WindowLayout, epoch: int = 0) -> None:
    """Writes a window's first state: no flag is there, whatever the memory held. epoch: the last one before."""
    words[: layout.inbox_at] = 0
    words[: layout.abort_at] = epoch
    words[layout.limit_at] = START_LIMIT_US
    words[layout.tags_at + 1 :: 2] = epoch  # of tagged words; the next exchange has another


def virtual_windows(layout: WindowLayout, device: torch.device, epoch: int = 0) -> list[Window]:
    """Returns windows of all ranks in the memory of one device."""
    memory = [torch.empty(layout.num_words, dtype=torch.int32, device=device) for _ in range(layout.size)]
    for words in memory:
        words.fill_(-1)  # NaN as bfloat16
        start_words(words, layout, epoch)
    peers = torch.tensor([words.data_ptr() for words in memory], dtype=torch.int64, device=device)
    records = [torch.zeros(1, dtype=torch.int64, device=device) for _ in memory]
    return [Window(layout, rank, words, peers, records[rank]) for rank, words in enumerate(memory)]
