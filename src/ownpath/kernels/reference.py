"""What torch references have in common as kernels: one form, nothing compiled, no layout of their own, no scratch."""

from collections.abc import Sequence

import torch

from ownpath.kernels.contract import Config, StoredExperts, StoredLinear


class Reference:
    """The steps around ``run`` of a kernel that is torch's own operations."""

    def configs(self, operand: object) -> Sequence[Config]:
        """Nothing is compiled."""
        return ()

    def planned_configs(self, stored: StoredLinear | StoredExperts) -> Sequence[Config]:
        """Nothing is compiled."""
        return ()

    def padding(self, operand: object) -> None:
        """The stored layout has none."""


def filled(out: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """y, in ``out`` where that is given."""
    return y if out is None else out.copy_(y)
