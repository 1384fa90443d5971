"""The oracle for one checkpoint, in the arithmetic that judges one engine."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ownpath.kernels.spec import InputRounding
from ownpath.official import ALWAYS_OFFICIAL, Step
from ownpath.oracle.arithmetic import Arithmetic
from ownpath.oracle.block import Choices, LayerTrace, reference_block, reference_embed, reference_head
from ownpath.oracle.weights import StoredWeights
from ownpath.verify.budgets import LogitBudget, budget, logit_budget
from ownpath.verify.subject import Subject


@dataclass(frozen=True)
class Oracle:
    """Computes what the engine should have computed, for one sequence from its first token on.

    It is wider than the engine: float64 for float32, float32 for 16 bits. It quantises activations where the engine
    does: as official numerics demand, or as the planned kernels do.
    """

    subject: Subject
    stored: StoredWeights
    arithmetic: Arithmetic
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, subject: Subject, token_ids: tuple[int, ...]) -> "Oracle":
        dtype = torch.float64 if subject.engine.dtype.itemsize >= 4 else torch.float32
        official, num_rows = subject.engine.official, len(token_ids)
        own = [op.choice.kernel for op in subject.plan.ops if not op.choice.kernel.official]
        rounding = {kernel.rounding for kernel in own if num_rows >= kernel.rounds_from}
        is_w4a4 = InputRounding.NVFP4 in rounding
        is_w8a8 = InputRounding.E4M3 in rounding and Step.FP8_INPUTS not in official
        arithmetic = Arithmetic(dtype, None, is_w4a4, official, is_w8a8, subject.engine.cache_format)
        return cls(subject, StoredWeights(subject.index, subject.device, dtype), arithmetic, token_ids)

    @cached_property
    def token_ids_T(self) -> torch.Tensor:
        return torch.tensor(self.token_ids, dtype=torch.int64, device=self.subject.device)

    def embed(self) -> torch.Tensor:
        """Returns the streams before the first layer [T, S, D]."""
        return reference_embed(self.subject.config, self.stored, self.token_ids_T, self.arithmetic)

    def block(self, layer_idx: int, streams_TSD: torch.Tensor, choices: Choices | None = None) -> LayerTrace:
        """Computes one layer, every slot's result included."""
        subject, ids_T = self.subject, self.token_ids_T
        return reference_block(
            subject.config, layer_idx, self.stored, subject.plan, streams_TSD, ids_T, self.arithmetic, choices
        )

    def head(self, streams_TSD: torch.Tensor) -> torch.Tensor:
        """Computes logits of some rows [T, V]."""
        return reference_head(self.subject.config, self.stored, self.subject.plan, streams_TSD, self.arithmetic)

    def budget(self, kind: str) -> float:
        """Returns the largest relative L2 distance that a right engine's value may have."""
        return budget(kind, *self._mode)

    def logit_budget(self) -> LogitBudget:
        """Returns the bounds of the whole model's logits."""
        return logit_budget(*self._mode)

    @property
    def _mode(self) -> tuple[torch.dtype, bool, bool, bool]:
        """dtype, and whether inputs of NVFP4 weights and of FP8 weights are rounded, and whether numerics are
        official, or keys in pages, which is a part of it."""
        engine, how = self.subject.engine, self.arithmetic
        has_codes = bool(engine.official - ALWAYS_OFFICIAL) or how.cache_format.in_pages
        return engine.dtype, how.w4a4, how.w8a8, has_codes

    def of_few_rows(self) -> "Oracle | None":
        """Returns an oracle for steps of few rows, where the engine computes those otherwise: without W8A8. Else
        ``None``."""
        return replace(self, arithmetic=replace(self.arithmetic, w8a8=False)) if self.arithmetic.w8a8 else None
