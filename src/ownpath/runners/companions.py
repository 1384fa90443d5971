"""Runners of companions: norms, boundaries, router, SwiGLU, attention and the cache formats' quantisers.

Each holds its weights and constants beside the kernel that the plan chose.
"""

import torch

from ownpath.kernels.attention.ref import AttentionReference, AttentionWeights
from ownpath.kernels.cache_formats.ref import IndexQuantizerReference, KeyQuantizerReference
from ownpath.kernels.contract import (
    NormKernel,
    NormWeights,
    RouteKernel,
    RouterKernel,
    RouterWeights,
    RouteWeights,
    SwigluKernel,
)
from ownpath.kernels.hyper.ref import BoundaryKernel, HyperOut, HyperWeights, Mix
from ownpath.kernels.registry import KERNELS
from ownpath.kernels.router.ref import gate_logits
from ownpath.runners.linear import Linear
from ownpath.runners.ops import HANDLES
from ownpath.runners.runner import KernelOrName, KernelRunner, chosen_spec

__all__ = [
    "HyperBoundary",
    "HyperOut",
    "HyperWeights",
    "Mix",
    "RMSNorm",
    "Route",
    "RouteWeights",
    "Router",
    "RouterWeights",
    "SharedKeyAttention",
    "SwiGLU",
]


class RMSNorm(KernelRunner):
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once; a weight of ``None`` means ones."""

    def __init__(self, weight: torch.Tensor | None, eps: float, *, kernel: KernelOrName = "ref.rms_norm") -> None:
        self.spec, self.weight, self.eps = chosen_spec(kernel), weight, eps
        self.kernel: NormKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(NormWeights(weight, eps))
        self.handle = HANDLES.new(self)

    def variant(self, x: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(x, self.operand)

    def run(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns y, of the shape and dtype of x. Errors: ValueError naming an input that the kernel refuses."""
        return self.kernel.run(x, self.operand, out=out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.rms_norm(x, self.handle)
            return y
        return self.kernel.run(x, self.operand)


class HyperBoundary(KernelRunner):
    """The boundary between two sublayers: adds one's output to the streams and makes the other's normed input.

    ``__call__``: streams x [T, S, D], output y [T, D] and its mix (both ``None`` before the first sublayer), and other
    [T, D] where the output is y + other -> new streams, normed input of the coming sublayer [T, D], and its mix
    (``None`` after the last sublayer).
    """

    def __init__(self, weights: HyperWeights, *, kernel: KernelOrName = "ref.hyper_boundary") -> None:
        self.spec, self.weights = chosen_spec(kernel), weights
        self.kernel: BoundaryKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    @property
    def makes_mix(self) -> bool:
        """True if another sublayer follows."""
        num_streams = self.weights.fn.shape[1] // self.weights.norm_weight.shape[0]
        return len(self.weights.fn) > num_streams

    def variant(self, x_TSD: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(x_TSD, self.operand)

    def workspace(self, num_tokens: int) -> torch.Tensor | None:
        """Allocates scratch for calls of up to ``num_tokens`` tokens; ``None`` where none is used."""
        return self.kernel.workspace(self.operand, num_tokens)

    def run(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        other_TD: torch.Tensor | None = None,
        *,
        out: HyperOut | None = None,
        workspace: torch.Tensor | None = None,
    ) -> HyperOut:
        """Computes ``__call__`` directly, also while torch compiles."""
        return self.kernel.run(x_TSD, y_TD, mix, self.operand, other_TD, out=out, workspace=workspace)

    def run_flat(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        post: torch.Tensor | None,
        comb: torch.Tensor | None,
        other: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes ``run`` on tensors alone, for the torch operation: no result aliases an argument.

        A mix of ``None`` is returned as two tensors without elements.
        """
        mix = None if post is None or comb is None else Mix(post, comb)
        found = self.run(x, y, mix, other)
        streams = found.x_TSD.clone() if found.x_TSD.data_ptr() == x.data_ptr() else found.x_TSD
        if found.mix is None:
            nothing = x.new_empty((len(x), 0), dtype=torch.promote_types(x.dtype, torch.float32))
            return streams, found.h_TD, nothing, nothing.new_empty((len(x), 0, 0))
        return streams, found.h_TD, found.mix.post_TS, found.mix.comb_TSS

    def __call__(
        self,
        x_TSD: torch.Tensor,
        y_TD: torch.Tensor | None,
        mix: Mix | None,
        other_TD: torch.Tensor | None = None,
    ) -> HyperOut:
        if torch.compiler.is_compiling():
            post, comb = (None, None) if mix is None else (mix.post_TS, mix.comb_TSS)
            streams, h, *new = torch.ops.ownpath.hyper_boundary(x_TSD, y_TD, post, comb, other_TD, self.handle)
            return HyperOut(streams, h, Mix(*new) if self.makes_mix else None)
        return self.kernel.run(x_TSD, y_TD, mix, self.operand, other_TD)


class Router(KernelRunner):
    """Chooses each token's experts and their weights: by score with a selection bias, or by token id.

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
        kernel: KernelOrName = "ref.router",
    ) -> None:
        if (bias_E is None) == (tid2eid_VK is None):
            raise ValueError("exactly one of bias_E and tid2eid_VK must be given")
        self.spec, self.gate = chosen_spec(kernel), gate
        self.num_experts_per_tok, self.routed_scaling_factor = num_experts_per_tok, routed_scaling_factor
        self.bias_E, self.tid2eid_VK = bias_E, tid2eid_VK
        self.kernel: RouterKernel[object] = KERNELS[self.spec.name]
        weights = RouterWeights(num_experts_per_tok, routed_scaling_factor, bias_E, tid2eid_VK)
        self.operand = self.kernel.prepare(weights)
        self.handle = HANDLES.new(self)

    def variant(self, x_TD: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` without variants. Logits are not read."""
        return self.kernel.variant(x_TD, self.operand)

    def run(
        self,
        logits_TE: torch.Tensor,
        token_ids_T: torch.Tensor,
        *,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses experts from the gate's logits. Errors: ValueError naming an input that the kernel refuses."""
        return self.kernel.run(logits_TE, token_ids_T, self.operand, out=out)

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert ids [T, K] and weights, at least float32 [T, K], that sum to ``routed_scaling_factor``.

        Errors: ValueError when there is not one token id for each row of x.
        """
        if len(token_ids_T) != len(x_TD):
            raise ValueError(f"token_ids_T has {len(token_ids_T)} ids for {len(x_TD)} rows of x")
        logits_TE = self.gate(x_TD)
        if torch.compiler.is_compiling():
            ids, weights = torch.ops.ownpath.router(logits_TE, token_ids_T, self.handle)
            return ids, weights
        return self.kernel.run(logits_TE, token_ids_T, self.operand)


class Route(KernelRunner):
    """Gate and router of a decode step in one. gate: the gate's matrix [E, D], as stored; the others as ``Router``.

    max_rows: the most rows of a call; steps of more rows run gate and router.
    """

    def __init__(self, weights: RouteWeights, *, kernel: KernelOrName = "ref.route") -> None:
        self.spec, self.weights = chosen_spec(kernel), weights
        self.kernel: RouteKernel[object] = KERNELS[self.spec.name]
        self.operand, self.max_rows = self.kernel.prepare(weights), self.kernel.max_rows

    def variant(self, x_TD: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(x_TD, self.operand)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Computes the gate's logits [T, E], which a call of the kernel does not show, as the reference does."""
        return gate_logits(x_TD, self.weights.gate_ED)

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert ids and weights as ``Router``. Errors: ValueError naming an input that the kernel refuses."""
        if len(token_ids_T) != len(x_TD):
            raise ValueError(f"token_ids_T has {len(token_ids_T)} ids for {len(x_TD)} rows of x")
        return self.kernel.run(x_TD, token_ids_T, self.operand)


class SwiGLU(KernelRunner):
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of [..., gate | up], at least float32 inside, rounded once."""

    def __init__(self, limit: float, *, kernel: KernelOrName = "ref.swiglu") -> None:
        self.spec, self.limit = chosen_spec(kernel), limit
        self.kernel: SwigluKernel[object] = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(limit)
        self.handle = HANDLES.new(self)

    def variant(self, gate_up: torch.Tensor, *_: object) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""
        return self.kernel.variant(gate_up, self.operand)

    def run(self, gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns y [..., F]. Errors: ValueError naming an input that the kernel refuses."""
        return self.kernel.run(gate_up, self.operand, out=out)

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.swiglu(gate_up, self.handle)
            return y
        return self.kernel.run(gate_up, self.operand)


class SharedKeyAttention(KernelRunner):
    """Softmax attention of many query heads over shared keys, which are also the values, with a sink per head."""

    def __init__(self, sink_N: torch.Tensor, softmax_scale: float, *, kernel: KernelOrName = "ref.attention") -> None:
        self.spec, self.sink_N, self.softmax_scale = chosen_spec(kernel), sink_N, softmax_scale
        self.kernel: AttentionReference = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(AttentionWeights(sink_N, softmax_scale))
        self.handle = HANDLES.new(self)

    def variant(self, *_: object) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor) -> torch.Tensor:
        """Computes ``__call__`` directly, also while torch compiles."""
        return self.kernel.run(q_tNH, keys_KH, visible_tK, self.operand)

    def __call__(self, q_tNH: torch.Tensor, keys_KH: torch.Tensor, visible_tK: torch.Tensor) -> torch.Tensor:
        """Computes q [t, N, H], keys [K, H], visible bool [t, K] -> [t, N, H]."""
        if torch.compiler.is_compiling():
            o_tNH: torch.Tensor = torch.ops.ownpath.attention(q_tNH, keys_KH, visible_tK, self.handle)
            return o_tNH
        return self.run(q_tNH, keys_KH, visible_tK)


class KeyQuantizer(KernelRunner):
    """Rounds keys to the cache's format, all but their last ``num_rotary`` channels, and reads them back."""

    def __init__(self, num_rotary: int, *, kernel: KernelOrName = "ref.fp8_keys") -> None:
        self.spec, self.num_rotary = chosen_spec(kernel), num_rotary
        self.kernel: KeyQuantizerReference = KERNELS[self.spec.name]
        self.operand = self.kernel.prepare(num_rotary)
        self.handle = HANDLES.new(self)

    def variant(self, *_: object) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, kv: torch.Tensor) -> torch.Tensor:
        """Computes ``__call__`` directly, also while torch compiles."""
        return self.kernel.run(kv, self.operand)

    def __call__(self, kv: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.quantize_kv(kv, self.handle)
            return y
        return self.run(kv)


class IndexQuantizer(KernelRunner):
    """Rounds index queries and keys to the index cache's format and reads them back."""

    def __init__(self, *, kernel: KernelOrName = "ref.fp4_index") -> None:
        self.spec = chosen_spec(kernel)
        self.kernel: IndexQuantizerReference = KERNELS[self.spec.name]
        self.handle = HANDLES.new(self)

    def variant(self, *_: object) -> None:
        """Returns ``None``: the kernel has no variants."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Computes ``__call__`` directly, also while torch compiles."""
        return self.kernel.run(x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.ownpath.quantize_index(x, self.handle)
            return y
        return self.run(x)
