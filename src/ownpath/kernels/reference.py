"""The base class of torch references: no variants, nothing compiled, the stored layout, no scratch."""

from collections.abc import Sequence

import torch

from ownpath.kernels.contract import Config, StoredExperts, StoredLinear


class Reference:
    """The methods around ``run`` of a kernel made of torch operations."""

    def configs(self, operand: object) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def planned_configs(self, stored: StoredLinear | StoredExperts) -> Sequence[Config]:
        """Returns nothing: no kernel is compiled to disk."""
        return ()

    def padding(self, operand: object) -> None:
        """Returns ``None``: the stored layout has no padding."""


def filled(out: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """Returns y, copied into ``out`` where that is given."""
    return y if out is None else out.copy_(y)
