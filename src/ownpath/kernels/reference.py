"""Torch references as kernels: no variants, nothing compiled, the stored layout, no scratch."""

from collections.abc import Callable, Sequence

import torch

from ownpath.kernels.checks import require_input, require_routing
from ownpath.kernels.contract import Config, FusedExpert, Routing, StoredExperts, StoredGroups, StoredLinear
from ownpath.qtensor import QuantTensor


class Reference:
    """The methods around ``run`` of a kernel made of torch operations."""

    def configs(self, operand: object) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def planned_configs(self, stored: StoredLinear | StoredGroups | StoredExperts) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def padding(self, operand: object) -> None:
        """Returns ``None``: the stored layout has no padding."""


LinearFunction = Callable[[torch.Tensor, StoredLinear], torch.Tensor]
"""Computes y [M, N] for x [M, K] and the operand."""


class LinearReference(Reference):
    """A product with a stored weight. fuse: makes the operand of the shards; without it, they stay as they are."""

    def __init__(self, product: LinearFunction, fuse: Callable[[StoredLinear], StoredLinear] | None = None) -> None:
        self._product, self._fuse = product, fuse

    def prepare(self, stored: StoredLinear) -> StoredLinear:
        """Returns the operand: the shards as they are, or fused."""
        return stored if self._fuse is None else self._fuse(stored)

    def restore(self, operand: StoredLinear) -> tuple[QuantTensor, ...]:
        """Returns the operand's shards."""
        return operand.shards

    def variant(self, x: torch.Tensor, operand: StoredLinear) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: StoredLinear, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        operand: StoredLinear,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [..., N] in the dtype of x. Errors: ValueError naming what is wrong with x."""
        num_rows, width = operand.shape
        require_input(x, width, operand.shards[0].qdata)
        return filled(out, self._product(x.reshape(-1, width), operand).view(*x.shape[:-1], num_rows))

    def rounds_to_powers(self, operand: StoredLinear, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return False

    def run_wide(self, x: torch.Tensor, operand: StoredLinear) -> torch.Tensor:
        """Computes y in at least float32."""
        return self.run(x.to(torch.promote_types(x.dtype, torch.float32)), operand)


ExpertsFunction = Callable[[torch.Tensor, Routing, StoredExperts], torch.Tensor]
"""Computes y [T, D] for x [T, D], the routing and the operand."""


class ExpertsReference(Reference):
    """Experts as they are stored: each is decoded when a token chooses it."""

    def __init__(self, experts: ExpertsFunction) -> None:
        self._experts = experts

    def prepare(self, stored: StoredExperts) -> StoredExperts:
        """Returns the stored experts unchanged."""
        return stored

    def restore(self, operand: StoredExperts, expert: int) -> FusedExpert:
        """Returns one expert's matrices."""
        return operand.gate_up.of_expert(expert), operand.down.of_expert(expert)

    def variant(self, x: torch.Tensor, routing: Routing, operand: StoredExperts) -> None:
        """Returns ``None``: the kernel has no variants."""

    def workspace(self, operand: StoredExperts, num_tokens: int, num_slots: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        operand: StoredExperts,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [T, D] in the dtype of x. Errors: ValueError naming what is wrong with x or the routing."""
        require_input(x, operand.hidden_size, operand.gate_up.qdata)
        require_routing(x, routing.ids, routing.weights)
        return filled(out, self._experts(x, routing, operand))


def filled(out: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """Returns y, copied into ``out`` where that is given."""
    return y if out is None else out.copy_(y)
