"""The stored format of each parameter, and training through the rounding (straight-through estimator).

The last part of training runs with the stored weights' values: each step, every parameter that is stored as NVFP4 or
FP8 is set to its master copy, quantised and read back. Gradients of the rounded weights update the master copies.
"""

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from ownpath.formats import FP8_BLOCK, NVFP4, Format
from ownpath.numerics import dequantize, quantize_fp8_block, quantize_nvfp4
from ownpath.qtensor import QuantTensor

# transformers' names. A fused gate_up_proj is one matrix per expert: w1 and w3 share their global scale.
_STORED: tuple[tuple[re.Pattern[str], Format], ...] = (
    (re.compile(r"\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)\.weight$"), NVFP4),
    (re.compile(r"\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)\.weight$"), NVFP4),
    (re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$"), NVFP4),
    (re.compile(r"\.indexer\.q_b_proj\.weight$"), FP8_BLOCK),
)


def stored_format(name: str) -> Format | None:
    """Returns the quantised format of a parameter, or ``None`` when it is stored unquantised."""
    return next((stored for pattern, stored in _STORED if pattern.search(name)), None)


def quantize_as(stored: Format, weight: Tensor) -> QuantTensor:
    """Quantises ``weight`` [..., N, K] to its stored format, from its value in BF16, the dtype that training keeps."""
    value = weight.to(torch.bfloat16).to(torch.float32)
    return quantize_nvfp4(value) if stored == NVFP4 else quantize_fp8_block(value)


class MasterWeights:
    """FP32 copies of a network's parameters, which the optimiser updates; the network holds their rounded values."""

    def __init__(self, network: nn.Module) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        self.params = [parameter for _, parameter in network.named_parameters()]
        self.masters = [nn.Parameter(p.detach().to(torch.float32).clone()) for p in self.params]
        for parameter, master in zip(self.params, self.masters, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            master.grad = torch.zeros_like(master)
        self._groups = self._quantised_groups()

    def _quantised_groups(self) -> list[tuple[Format, list[int]]]:
        """Groups the quantised parameters' indices by format and shape, for fewer and larger calls."""
        groups: dict[tuple[Format, torch.Size], list[int]] = defaultdict(list)
        for i, name in enumerate(self.names):
            stored = stored_format(name)
            if stored is not None:
                groups[stored, self.masters[i].shape].append(i)
        return [(stored, members) for (stored, _), members in groups.items()]

    @torch.no_grad()
    def refresh(self, quantised: bool) -> None:
        """Sets the network's parameters from the master copies, through the stored formats when ``quantised``."""
        torch._foreach_copy_(list(self.params), list(self.masters))
        if not quantised:
            return
        for stored, members in self._groups:
            values = dequantize(quantize_as(stored, torch.stack([self.masters[i] for i in members])))
            for i, value in zip(members, values.unbind(0), strict=True):
                self.params[i].copy_(value)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Moves the network's gradients to the master copies and zeroes them."""
        grads = [parameter.grad for parameter in self.params if parameter.grad is not None]
        kept = [master.grad for master in self.masters if master.grad is not None]
        torch._foreach_copy_(kept, grads)
        torch._foreach_zero_(grads)
