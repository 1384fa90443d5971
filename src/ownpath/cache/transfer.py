"""Arrays of a step on their way to the device, behind the work before them: the host goes on at once.

A plain copy to the device waits for everything that was launched before it, so that a prompt's next chunk would be
prepared only when the chunk before it is done.
"""

from collections.abc import Sequence

import torch


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor of the host to a device. Nobody writes to it again."""
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def uploaded_ids(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Returns whole numbers as int64 on a device."""
    return upload(torch.tensor(values, dtype=torch.int64), device)
