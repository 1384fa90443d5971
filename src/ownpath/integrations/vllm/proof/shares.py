"""A layer's values on several ranks: the part that each holds, and the whole that the parts make.

vLLM cuts a layer by heads, by groups of heads, by the width of experts, or by experts, and adds up what ranks computed
of one sum. Here a rank's values become those of a whole layer: what is cut is put side by side from all ranks, in their
order; what is everywhere stays the rank's own. The reference then computes the whole, of which the rank's part is
``cut``, or the rank's part of a sum, so that an error shows on the rank that made it.

Legend: T rows, N heads, H head dim, F width of an expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ownpath.config import ModelConfig
from ownpath.integrations.vllm.proof.taps import Kept

VOCAB_BLOCK = 64
"""vLLM pads a vocabulary to so many rows before it cuts it."""
_CUT = MappingProxyType(
    {
        "attn.wq_b": 1,
        "attn.q": 1,
        "attn.core": 1,
        "attn.o": 1,
        "attn.wo_a": 1,
        "attn.wo_b.in": 1,
        "ffn.shared_experts.w13": 2,
        "ffn.shared_experts.swiglu": 1,
        "ffn.shared_experts.w2.in": 1,
    }
)
"""A value that ranks cut, in its second dimension -> the parts side by side in it that are each cut."""
_PADDED = ("attn.q", "attn.core", "attn.o")
SUMS = MappingProxyType(
    {
        "attn.wo_b.sum": ("attn.wo_b.part",),
        "ffn.sum": ("ffn.experts", "ffn.shared_experts.w2"),
    }
)
"""A sum over ranks -> the values of each rank that it adds up."""


@dataclass(frozen=True)
class LayerShare:
    """A rank's share of one layer. experts: the ids that it has, ``None``: all. width: its place and the number of
    places among which the experts' width is cut."""

    rank: int = 0
    num_ranks: int = 1
    experts: frozenset[int] | None = None
    width: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, rank: int, num_ranks: int, experts: Mapping[str, Any] | None) -> "LayerShare":
        """experts: what the walk says of the layer's experts."""
        if experts is None or "experts" not in experts:
            return cls(rank, num_ranks, None, (rank, num_ranks))
        at, size = experts["width"]
        return cls(rank, num_ranks, frozenset(experts["experts"]), (at, size))

    @property
    def is_whole(self) -> bool:
        return self.num_ranks == 1

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Returns the rank's slice of a value that ranks cut, else the value."""
        if self.is_whole or name not in _CUT:
            return whole
        parts = (part.chunk(self.num_ranks, 1)[self.rank] for part in whole.chunk(_CUT[name], 1))
        return torch.cat(tuple(parts), 1)

    def only(self, x: Tensor) -> Tensor:
        """Returns x [T, K] with zeros for the inputs that other ranks multiply."""
        return x if self.is_whole else _only(x, self.rank, self.num_ranks)

    def only_width(self, hidden: Tensor) -> Tensor:
        """Returns an expert's hidden values [T, F] with zeros where other ranks have its width."""
        return _only(hidden, *self.width)

    def vocabulary(self, vocab_size: int) -> slice:
        """The rows of the embedding, and of the head, that the rank has."""
        each = -(-vocab_size // VOCAB_BLOCK) * VOCAB_BLOCK // self.num_ranks
        return slice(min(self.rank * each, vocab_size), min((self.rank + 1) * each, vocab_size))


WHOLE = LayerShare()


def _only(x: Tensor, at: int, size: int) -> Tensor:
    if size == 1:
        return x
    kept = torch.zeros_like(x)
    each = x.shape[1] // size
    own = slice(at * each, (at + 1) * each)
    kept[:, own] = x[:, own]
    return kept


def whole_values(config: ModelConfig, by_rank: Sequence[Kept]) -> list[Kept]:
    """Returns each rank's values of a layer as those of a whole one, with the sums over ranks.

    A value that some rank lacks is left out where it would be put together.
    """
    if len(by_rank) == 1:
        return list(by_rank)
    heads = config.num_attention_heads // len(by_rank)
    trimmed = [{name: x[:, :heads] if name in _PADDED else x for name, x in values.items()} for values in by_rank]
    common = set(trimmed[0]).intersection(*trimmed[1:])
    joined = {name: _side_by_side([values[name] for values in trimmed], _CUT[name]) for name in _CUT if name in common}
    for name, parts in SUMS.items():
        if set(parts) <= common:
            joined[f"{name}.parts"] = sum_of([values[part] for values in trimmed for part in parts])
    return [{name: x for name, x in values.items() if name not in _CUT} | joined for values in trimmed]


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Adds up in float64."""
    return torch.stack([part.double() for part in parts]).sum(0)


def _side_by_side(ranks: Sequence[Tensor], num_parts: int) -> Tensor:
    chunks = [x.chunk(num_parts, 1) for x in ranks]
    return torch.cat([chunk[part] for part in range(num_parts) for chunk in chunks], 1)
