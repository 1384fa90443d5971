"""Small arrays on their way between host and device, behind the work before them; nobody waits."""

from typing import Any

import numpy as np
import torch


def to_device(array: "np.ndarray[Any, Any]", device: torch.device) -> torch.Tensor:
    """Copies an array to a device. The host may go on at once, and must not write to the array where it is a CPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor to the host, where it may be read once the device is behind this. On a CPU it is there."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
