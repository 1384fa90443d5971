"""Trains the CSA indexer to predict attention weights.

The indexer's selection is a hard choice, so no gradient of the language loss reaches it. As in DeepSeek's sparse
attention, its scores are trained to predict the weight that attention gives each compressed entry, with detached
inputs, so that no other parameter is trained. During this training every entry is selected (the width is at most
``4 * index_topk``), so the target is complete.
"""

from typing import Any

import torch
from torch import Tensor, nn


class IndexerTeacher:
    """Records index scores and attention weights during a forward; ``loss`` compares them.

    Legend: B rows, H heads, T query positions, S compressed entries.
    """

    def __init__(self, network: Any, ratio: int = 4) -> None:
        self._ratio = ratio
        self._scores: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        for layer_idx, layer in enumerate(network.model.layers):
            indexer = getattr(layer.self_attn.compressor, "indexer", None)
            if indexer is not None:
                indexer.register_forward_pre_hook(_detach_inputs)
                indexer.scorer.register_forward_hook(self._score_hook(layer_idx))
                layer.self_attn.register_forward_hook(self._attention_hook(layer_idx))

    def _score_hook(self, layer_idx: int) -> Any:
        def hook(_module: nn.Module, _args: Any, scores_BTS: Tensor) -> None:
            self._scores[layer_idx] = scores_BTS

        return hook

    def _attention_hook(self, layer_idx: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
            self._attention[layer_idx] = output[1].detach()

        return hook

    def loss(self) -> Tensor:
        """Returns the mean cross-entropy of index scores against attention's share of each entry, over the layers."""
        terms = [self._layer_loss(self._scores[i], self._attention[i]) for i in self._scores]
        self._scores, self._attention = {}, {}
        return torch.stack(terms).mean()

    def _layer_loss(self, scores_BTS: Tensor, attention_BHTK: Tensor) -> Tensor:
        num_queries, num_entries = scores_BTS.shape[1:]
        share_BTS = attention_BHTK[..., -num_entries:].float().sum(dim=1)
        share_BTS = share_BTS / share_BTS.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        position = torch.arange(num_queries, device=scores_BTS.device)
        entry = torch.arange(num_entries, device=scores_BTS.device)
        future = entry[None, :] >= ((position + 1) // self._ratio)[:, None]
        log_share = scores_BTS.float().masked_fill(future, -1e4).log_softmax(dim=-1)
        return -(share_BTS * log_share).sum(dim=-1).mean()


def _detach_inputs(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
