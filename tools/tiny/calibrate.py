"""Largest input of every NVFP4 linear, for the checkpoint's ``input_scale``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny.batches import Rows
from tiny.fakequant import stored_format
from tiny.names import native_name

# amax / (6 * 448): the largest activation block then gets the largest block scale.
_INPUT_SCALE_DIVISOR = 6 * 448


class Calibration:
    """Runs a network on rows and records the largest magnitude of each linear's input.

    ``amax`` is keyed by native module names (``layers.0.attn.wq_a``, ``layers.0.ffn.experts.3.w1``). The network must
    be transformers' own; its experts are replaced by a loop that measures each one.
    """

    def __init__(self, network: Any) -> None:
        self.amax: dict[str, float] = {}
        self._network = network
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and stored_format(f"{name}.weight") is not None:
                native = native_name(f"{name}.weight").removesuffix(".weight")
                module.register_forward_pre_hook(self._hook(native))
        for layer_idx, layer in enumerate(network.model.layers):
            layer.mlp.experts.forward = self._expert_loop(layer.mlp.experts, f"layers.{layer_idx}.ffn.experts")

    @torch.no_grad()
    def run(self, rows: Rows, num_rows: int) -> None:
        """Runs the first ``num_rows`` rows, each without its padding."""
        for ids, role in zip(rows.ids[:num_rows], rows.role[:num_rows], strict=True):
            self._network(input_ids=ids[role > 0].long()[None], use_cache=False)

    def input_scale(self, module: str) -> Tensor:
        """Returns ``input_scale`` of an NVFP4 linear: float32, 0-d.

        An expert that no row reached gets the largest value of its projection over the layer's other experts.
        """
        amax = self.amax.get(module)
        if amax is None:
            experts, _, projection = module.rsplit(".", 2)
            siblings = [value for name, value in self.amax.items() if _is_sibling(name, experts, projection)]
            amax = max(siblings)
        return torch.tensor(amax / _INPUT_SCALE_DIVISOR, dtype=torch.float32)

    def _see(self, module: str, x: Tensor) -> None:
        self.amax[module] = max(self.amax.get(module, 0.0), float(x.abs().max()))

    def _hook(self, module: str) -> Any:
        return lambda _module, args: self._see(module, args[0])

    def _expert_loop(self, experts: Any, name: str) -> Any:
        def forward(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for expert in top_k_index.unique().tolist():
                token_ids, slots = torch.where(top_k_index == expert)
                entering = x[token_ids]
                gate, up = F.linear(entering, experts.gate_up_proj[expert]).chunk(2, dim=-1)
                hidden = F.silu(gate.clamp(max=experts.limit)) * up.clamp(-experts.limit, experts.limit)
                for projection, value in (("w1", entering), ("w3", entering), ("w2", hidden)):
                    self._see(f"{name}.{expert}.{projection}", value)
                out = F.linear(hidden, experts.down_proj[expert])
                y.index_add_(0, token_ids, out * top_k_weights[token_ids, slots, None])
            return y

        return forward


def _is_sibling(name: str, experts: str, projection: str) -> bool:
    return name.startswith(f"{experts}.") and name.endswith(f".{projection}")
