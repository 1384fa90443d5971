"""The shared expert: a dense SwiGLU block of two planned linears with the activation between them."""

from collections.abc import Callable

import torch

from ownpath.runners.companions import SwiGLU
from ownpath.runners.linear import Linear


class SwigluMlp:
    """y = w2 swiglu(w13 x), gate rows first in w13; x and y are [..., D].

    The clamped activation is computed in at least float32 and rounded once, to the dtype of x.
    """

    def __init__(
        self,
        w13: Linear,
        w2: Linear,
        swiglu_limit: float,
        *,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.w13, self.w2 = w13, w2
        self._activation = activation or SwiGLU(swiglu_limit)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self._activation(self.w13(x)))
