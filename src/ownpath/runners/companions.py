"""Runners of what lies between the products: norms, the hyper-connections' boundary, expert choice, attention.

Each holds what does not change from step to step beside the kernel that the plan chose.
"""

from typing import Any

import torch

from ownpath.kernels.hyper.ref import HyperOut, HyperWeights, Mix
from ownpath.kernels.registry import KERNELS, Kernel
from ownpath.runners.linear import Linear

__all__ = ["HyperBoundary", "HyperWeights", "Mix", "RMSNorm", "Router", "SharedKeyAttention", "SwiGLU"]


class RMSNorm:
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; ``None`` for a weight of ones."""

    def __init__(self, weight: torch.Tensor | None, eps: float, *, kernel: Kernel = KERNELS["ref.rms_norm"]) -> None:
        self.weight, self.eps = weight, eps
        self._kernel = kernel

    def kernel_arguments(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x, self.weight, self.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._kernel(x, self.weight, self.eps)
        return y


class HyperBoundary:
    """What lies between two sublayers: the streams take one's output in, and the other's input is made of them.

    ``__call__``: streams x [T, S, D], output y [T, D] and its mix (both ``None`` before the first sublayer) -> new
    streams, normed input of the coming sublayer [T, D], and its mix (``None`` after the last sublayer).
    """

    def __init__(self, weights: HyperWeights, *, kernel: Kernel = KERNELS["ref.hyper_boundary"]) -> None:
        self.weights = weights
        self._kernel = kernel

    def kernel_arguments(self, x_TSD: torch.Tensor, y_TD: torch.Tensor | None, mix: Mix | None) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return x_TSD, y_TD, mix, self.weights

    def __call__(self, x_TSD: torch.Tensor, y_TD: torch.Tensor | None, mix: Mix | None) -> HyperOut:
        out: HyperOut = self._kernel(x_TSD, y_TD, mix, self.weights)
        return out


class Router:
    """Which experts a token goes to, and with what weight: by score with a selection bias, or by token id.

    gate: x [T, D] -> logits [T, E], at least float32. Exactly one of ``bias_E`` and ``tid2eid_VK`` is given. bias_E
    float32 [E] shifts the scores for the selection only, never the weights. tid2eid_VK int64 [vocab, K] names the
    experts of each token id (hash-routed layers).
    """

    def __init__(
        self,
        gate: Linear,
        num_experts_per_tok: int,
        routed_scaling_factor: float,
        bias_E: torch.Tensor | None,
        tid2eid_VK: torch.Tensor | None,
        *,
        kernel: Kernel = KERNELS["ref.router"],
    ) -> None:
        if (bias_E is None) == (tid2eid_VK is None):
            raise ValueError("exactly one of bias_E and tid2eid_VK must be given")
        self.gate = gate
        self.num_experts_per_tok, self.routed_scaling_factor = num_experts_per_tok, routed_scaling_factor
        self.bias_E, self.tid2eid_VK = bias_E, tid2eid_VK
        self._kernel = kernel

    def kernel_arguments(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel, without the gate's logits."""
        return None, self.num_experts_per_tok, self.routed_scaling_factor, self.bias_E, token_ids_T, self.tid2eid_VK

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids [T, K] and weights, at least float32 [T, K], that sum to ``routed_scaling_factor``.

        Errors: ValueError when there is not one token id for each row of x.
        """
        if len(token_ids_T) != len(x_TD):
            raise ValueError(f"token_ids_T has {len(token_ids_T)} ids for {len(x_TD)} rows of x")
        chosen: tuple[torch.Tensor, torch.Tensor] = self._kernel(
            self.gate(x_TD),
            self.num_experts_per_tok,
            self.routed_scaling_factor,
            self.bias_E,
            token_ids_T,
            self.tid2eid_VK,
        )
        return chosen


class SwiGLU:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of [..., gate | up], at least float32 inside, rounded once."""

    def __init__(self, limit: float, *, kernel: Kernel = KERNELS["ref.swiglu"]) -> None:
        self.limit = limit
        self._kernel = kernel

    def kernel_arguments(self, gate_up: torch.Tensor) -> tuple[Any, ...]:
        """What a call gives the kernel."""
        return gate_up, self.limit

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._kernel(gate_up, self.limit)
        return y


class SharedKeyAttention:
    """Softmax attention of many query heads over one set of keys, which are the values too, with a sink per head."""

    def __init__(
        self, sink_N: torch.Tensor, softmax_scale: float, *, kernel: Kernel = KERNELS["ref.attention"]
    ) -> None:
        self.sink_N, self.softmax_scale = sink_N, softmax_scale
        self._kernel = kernel

    def __call__(self, q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor) -> torch.Tensor:
        """q [t, N, H], keys [K, H], visible bool [t, K] -> [t, N, H]."""
        o_tNH: torch.Tensor = self._kernel(q_tNH, keys_KH, visible_tK, self.sink_N, self.softmax_scale)
        return o_tNH
