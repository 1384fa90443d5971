"""The contract of kernels: one protocol for each kind of operation, and the types of their arguments.

A kernel has four methods. ``prepare`` turns stored weights into an operand, the form that the kernel reads, and
resolves everything that does not change from call to call. ``restore`` reads an operand back. ``workspace`` allocates
scratch for calls up to a size. ``run`` computes. Given ``out`` and ``workspace``, ``run`` allocates nothing.

An operand belongs to one device; calls on it may come from any stream, one thread at a time.

Legend: M rows, K in, N out; T tokens, D hidden, F expert width, E experts; G head groups, I in and R out per group.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ownpath.qtensor import QuantTensor


class Config(Hashable, Protocol):
    """The compile-time configuration of a kernel that is compiled to disk: a dataclass of numbers, strings and tuples.

    compiler: "module:function" below ``ownpath.kernels``; takes the configuration and returns the DSL's compiled
    function. num_threads: of a CTA. cluster: CTAs of one. sources: paths of modules in ``kernels`` that it is compiled
    from.
    """

    compiler: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def num_threads(self) -> int: ...

    @property
    def cluster(self) -> int: ...


@dataclass(frozen=True)
class StoredLinear:
    """A stored dense matrix: fused shards, whose rows follow each other in y.

    input_scale: float32 [], the calibrated global scale of the input (a multiplier), where activations are quantised.
    """

    shards: tuple[QuantTensor, ...]
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of all shards."""
        return sum(shard.shape[0] for shard in self.shards), self.shards[0].shape[1]


@dataclass(frozen=True)
class StoredGroups:
    """A stored matrix per group: one above the other, [G * R, I]."""

    matrix: QuantTensor
    num_groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[G, R, I]."""
        num_rows, width = self.matrix.shape
        return self.num_groups, num_rows // self.num_groups, width


@dataclass(frozen=True)
class StoredExperts:
    """Stored routed SwiGLU experts: gate above up, and down.

    Shapes: gate_up [E, 2F, D], its global scale [E, 2], its FP8 grids [E, 2, R, C]; down [E, D, F], global scale [E].
        gate_up_input_scale, down_input_scale: float32 [E], where activations are quantised.
    """

    gate_up: QuantTensor
    down: QuantTensor
    swiglu_limit: float
    gate_up_input_scale: Tensor | None = None
    down_input_scale: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return len(self.gate_up.qdata)

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]


FusedExpert = tuple[QuantTensor, QuantTensor]
"""One expert's stored matrices: gate above up [2F, D], and down [D, F]."""


class Routing(NamedTuple):
    """The expert ids and weights of a call's tokens.

    Shapes: ids int32 or int64 [T, K]; weights float32 [T, K]; expert_map int32 [global experts], the expert here or -1.
    num_shared: number of shared experts at the end of the stacks; every token goes to them with weight 1.
    """

    ids: Tensor
    weights: Tensor
    num_shared: int = 0
    expert_map: Tensor | None = None


Operand = TypeVar("Operand")
Operand_contra = TypeVar("Operand_contra", contravariant=True)


class Kernel(Protocol[Operand_contra]):
    """The methods that all kernels have."""

    def configs(self, operand: Operand_contra) -> Sequence[Config]:
        """Returns the configurations of every kernel compiled to disk that a call may launch."""


class MatrixKernel(Kernel[Operand], Protocol[Operand]):
    """The methods of kernels for a dense matrix."""

    def prepare(self, stored: StoredLinear) -> Operand:
        """Makes the operand. The kernel takes ownership of the stored tensors and may repack them in place.

        Errors: ValueError naming a tensor that the kernel refuses; nothing is changed then.
        """

    def restore(self, operand: Operand) -> tuple[QuantTensor, ...]:
        """Reads the shards back from the operand; a kernel that fuses shards returns one."""

    def padding(self, operand: Operand) -> Tensor | None:
        """Returns the padding bytes of the kernel's layout; ``None`` if it has none."""

    def planned_configs(self, stored: StoredLinear) -> Sequence[Config]:
        """Returns ``configs`` from shapes and dtypes alone: the tensors may be on ``meta``."""


class LinearKernel(MatrixKernel[Operand], Protocol[Operand]):
    """y = x Wᵀ."""

    def variant(self, x: Tensor, operand: Operand) -> str | None:
        """Returns the names of the variants that a call launches; ``None`` for a kernel without variants."""

    def workspace(self, operand: Operand, num_tokens: int) -> Tensor | None:
        """Allocates uint8 scratch for calls of up to ``num_tokens`` rows; ``None`` if the kernel needs none."""

    def run(self, x: Tensor, operand: Operand, *, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
        """Computes y [..., N] for x [..., K]. Errors: ValueError naming what is wrong with x, out or workspace."""

    def run_wide(self, x: Tensor, operand: Operand) -> Tensor:
        """Computes y in at least float32, with unrounded sums. Errors: ValueError if the kernel has no such output."""

    def rounds_to_powers(self, operand: Operand, num_rows: int) -> bool:
        """Returns True if a call with so many rows rounds its input to E4M3 itself, with a power of two per 1 x 128."""


class GroupedKernel(Kernel[Operand], Protocol[Operand]):
    """y[t, g] = W[g] u[t, g], where u is attention's output with its rotation undone."""

    def prepare(self, stored: StoredGroups) -> Operand:
        """See ``LinearKernel``."""

    def restore(self, operand: Operand) -> tuple[QuantTensor, ...]:
        """Reads the matrix of all groups' rows back from the operand."""

    def planned_configs(self, stored: StoredGroups) -> Sequence[Config]:
        """See ``LinearKernel``."""

    def variant(self, o_TNH: Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(
        self, o_TNH: Tensor, cos_TA: Tensor, sin_TA: Tensor, operand: Operand, *, out: Tensor | None = None
    ) -> Tensor:
        """Computes y [T, G, R] for o [T, N, H] and float32 angles. Errors: ValueError naming the operand."""


class ExpertsKernel(Kernel[Operand], Protocol[Operand]):
    """y[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t]."""

    def prepare(self, stored: StoredExperts) -> Operand:
        """See ``LinearKernel``."""

    def restore(self, operand: Operand, expert: int) -> FusedExpert:
        """Reads one expert back from the operand; a global scale may be there twice."""

    def planned_configs(self, stored: StoredExperts) -> Sequence[Config]:
        """See ``LinearKernel``."""

    def variant(self, x: Tensor, routing: Routing, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def workspace(self, operand: Operand, num_tokens: int, num_slots: int) -> Tensor | None:
        """Allocates uint8 scratch for ``num_tokens`` tokens or fewer. num_slots: experts per token, shared included."""

    def run(
        self,
        x: Tensor,
        routing: Routing,
        operand: Operand,
        *,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Computes y [T, D] for x [T, D]. Ids outside the experts contribute nothing.

        Errors: ValueError naming what is wrong with x, the routing, out or workspace.
        """


@dataclass(frozen=True)
class NormWeights:
    """weight float32 or bfloat16 [D], ``None`` for ones; eps: added to the mean square."""

    weight_D: Tensor | None
    eps: float


@dataclass(frozen=True)
class RouterWeights:
    """The router's weights: a selection bias for the scores, or a table by token id. Exactly one tensor is given.

    bias float32 [E] shifts the scores for the selection only, never the weights. tid2eid int64 or int32 [vocab, K]
    names the experts of each token id (hash-routed layers).
    """

    num_experts_per_tok: int
    routed_scaling_factor: float
    bias_E: Tensor | None
    tid2eid_VK: Tensor | None


@dataclass(frozen=True)
class RouteWeights:
    """The gate's matrix bfloat16 or float32 [E, D], and what the router chooses by."""

    gate_ED: Tensor
    router: RouterWeights


class NormKernel(Kernel[Operand], Protocol[Operand]):
    """y = weight * x / sqrt(mean(x²) + eps) over the last dimension, rounded once."""

    def prepare(self, weights: NormWeights) -> Operand:
        """Makes the operand."""

    def variant(self, x: Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(self, x: Tensor, operand: Operand, *, out: Tensor | None = None) -> Tensor:
        """Computes y, of the shape and dtype of x. Errors: ValueError naming the operand."""


class RouterKernel(Kernel[Operand], Protocol[Operand]):
    """Expert ids and weights from the gate's logits."""

    def prepare(self, weights: RouterWeights) -> Operand:
        """Makes the operand."""

    def variant(self, logits_TE: Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(
        self, logits_TE: Tensor, token_ids_T: Tensor, operand: Operand, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ids int64 [T, K] and weights, at least float32 [T, K]. Errors: ValueError naming the operand."""


class RouteKernel(Kernel[Operand], Protocol[Operand]):
    """Expert ids and weights from the router's input: gate and router of few rows. max_rows: the most it is for."""

    @property
    def max_rows(self) -> int: ...

    def prepare(self, weights: RouteWeights) -> Operand:
        """Makes the operand."""

    def variant(self, x_TD: Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(
        self, x_TD: Tensor, token_ids_T: Tensor, operand: Operand, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ids int64 [T, K] and weights, at least float32 [T, K]. Errors: ValueError naming the operand."""


class SwigluKernel(Kernel[Operand], Protocol[Operand]):
    """The clamped activation of [..., gate | up]."""

    def prepare(self, limit: float) -> Operand:
        """Makes the operand."""

    def variant(self, gate_up: Tensor, operand: Operand) -> str | None:
        """See ``LinearKernel``."""

    def run(self, gate_up: Tensor, operand: Operand, *, out: Tensor | None = None) -> Tensor:
        """Computes y [..., F] for gate_up [..., 2F]. Errors: ValueError naming the operand."""
