"""The shared expert: a dense SwiGLU block made of two planned linears."""

import torch

from ownpath.kernels.ref.moe import swiglu
from ownpath.runners.linear import Linear


class SwigluMlp:
    """y = w2 swiglu(w13 x), gate rows first in w13; x and y are [..., D].

    The clamped activation is computed in at least float32 and rounded once, to the dtype of x.
    """

    def __init__(self, w13: Linear, w2: Linear, swiglu_limit: float) -> None:
        self.w13, self.w2, self.swiglu_limit = w13, w2, swiglu_limit

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gate, up = self.w13(x).to(wide).chunk(2, dim=-1)
        return self.w2(swiglu(gate, up, self.swiglu_limit).to(x.dtype))
