"""The interface of contenders: each prepares its operands once and then computes, all with the same calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ownpath.bench.operands import Fp8Operands, MoeOperands, Nvfp4Operands
from ownpath.bench.row import Status

MoeCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x bfloat16 [T, D], topk_ids int32 [T, K], topk_weights float32 [T, K]) -> y bfloat16 [T, D]."""

LinearCall = Callable[[torch.Tensor], torch.Tensor]
"""x bfloat16 [M, K] -> y bfloat16 [M, N]."""

SWIGLU_LIMIT = 10.0
"""DeepSeek-V4's clamp."""


@dataclass(frozen=True)
class Missing:
    """The reason why a contender does not take part, shown in its row."""

    status: Status
    reason: str


W4A16_MAX_REL_L2 = 1e-2
"""Largest error of a contender with bfloat16 activations. Rounding an MoE's hidden rows and output to bfloat16 gives
2e-3 to 3e-3, and a peer that rounds scales stays below 6e-3."""

W8A8_MAX_REL_L2 = 5e-2
"""Largest error of a contender with E4M3 activations: rounding has at most 2^-4, 2.6e-2 in the quadratic mean of random
values; half of that is added for a peer that rounds weights."""

W4A8_MOE_MAX_REL_L2 = 8e-2
"""An MoE whose activations, perhaps weights too, are rounded to E4M3 in front of both products: four times 2.6e-2 in
the quadratic mean, 5.2e-2; half of that is added."""

W4A4_MAX_REL_L2 = 2e-1
"""Activations in E2M1: an error of at most a quarter of a value, 0.1 in the quadratic mean of random ones, in front of
each of an MoE's two products."""


class Contender(Protocol):
    """A system under test, imported only when it prepares. max_rel_l2: a larger error marks a row as wrong."""

    name: str
    is_peer: bool
    max_rel_l2: float

    def missing(self, device: str) -> Missing | None:
        """Returns the reason why it cannot run here, or None if it can."""


class MoeContender(Contender, Protocol):
    """A contender of ``bench moe``."""

    def prepare(self, operands: MoeOperands, num_tokens: Sequence[int], top_k: int) -> MoeCall:
        """Repacks a copy of the operands and compiles for these token counts. Not timed."""


class Nvfp4Contender(Contender, Protocol):
    """A contender of ``bench linear``."""

    def prepare(self, operands: Nvfp4Operands, num_rows: Sequence[int]) -> LinearCall:
        """Repacks a copy of the operands and compiles for these row counts. Not timed."""


class Fp8Contender(Contender, Protocol):
    """A contender of ``bench fp8``."""

    def prepare(self, operands: Fp8Operands, num_rows: Sequence[int]) -> LinearCall:
        """Repacks a copy of the operands and compiles for these row counts. Not timed."""


_Some = TypeVar("_Some", bound=Contender)


def chosen(everyone: Sequence[_Some], named: Sequence[_Some], names: str | None) -> list[_Some]:
    """Selects contenders by name. named: those that take part only when asked for.

    Errors: ValueError for a name that nobody has.
    """
    if names is None:
        return list(everyone)
    known = {contender.name: contender for contender in (*everyone, *named)}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--contenders: {', '.join(unknown)} not among {', '.join(known)}")
    return [known[name] for name in wanted]
