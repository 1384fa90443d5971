"""The reference of one checkpoint, in the arithmetic that judges one engine."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ownpath.official import ALWAYS_OFFICIAL
from ownpath.verify.budgets import LogitBudget, budget, logit_budget
from ownpath.verify.reference.arithmetic import Arithmetic
from ownpath.verify.reference.block import Choices, Trace, reference_block, reference_embed, reference_head
from ownpath.verify.reference.stored import Stored
from ownpath.verify.subject import Subject


@dataclass(frozen=True)
class Oracle:
    """Computes what the engine should have computed, of one sequence from its first token on.

    It is wider than the engine: float64 for float32, float32 for 16 bits. It rounds activations where official
    numerics ask for it; where kernels do so of their own accord, the budget is that of such kernels.
    """

    subject: Subject
    stored: Stored
    arithmetic: Arithmetic
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, subject: Subject, token_ids: tuple[int, ...]) -> "Oracle":
        dtype = torch.float64 if subject.engine.dtype.itemsize >= 4 else torch.float32
        arithmetic = Arithmetic(dtype, official=subject.engine.official)
        return cls(subject, Stored(subject.index, subject.device, dtype), arithmetic, token_ids)

    @cached_property
    def token_ids_T(self) -> torch.Tensor:
        return torch.tensor(self.token_ids, dtype=torch.int64, device=self.subject.device)

    def embed(self) -> torch.Tensor:
        """The streams before the first layer [T, S, D]."""
        return reference_embed(self.subject.config, self.stored, self.token_ids_T, self.arithmetic)

    def block(self, layer_idx: int, streams_TSD: torch.Tensor, choices: Choices | None = None) -> Trace:
        """Everything that one layer computes."""
        subject, ids_T = self.subject, self.token_ids_T
        return reference_block(
            subject.config, layer_idx, self.stored, subject.plan, streams_TSD, ids_T, self.arithmetic, choices
        )

    def head(self, streams_TSD: torch.Tensor) -> torch.Tensor:
        """Logits of some rows [T, V]."""
        return reference_head(self.subject.config, self.stored, self.subject.plan, streams_TSD, self.arithmetic)

    def budget(self, kind: str) -> float:
        """How far a value of the engine may be from this."""
        return budget(kind, *self._mode)

    def logit_budget(self) -> LogitBudget:
        """How far the whole model's logits may be from this."""
        return logit_budget(*self._mode)

    @property
    def _mode(self) -> tuple[torch.dtype, bool, bool, bool]:
        """dtype, and whether NVFP4 weights, FP8 weights have their inputs rounded, and whether that is official."""
        kernels = [op.choice.kernel for op in self.subject.plan.ops]
        is_w4a4 = any("W4A4" in kernel.runner for kernel in kernels)
        is_w8a8 = any(kernel.name in W8A8_KERNELS for kernel in kernels)
        engine = self.subject.engine
        return engine.dtype, is_w4a4, is_w8a8, bool(engine.official - ALWAYS_OFFICIAL)


W8A8_KERNELS = ("cute.fp8_linear_sm90",)
"""Kernels of FP8 weights that quantise a long prompt's activations without having been asked for official numerics."""
