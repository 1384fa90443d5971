"""A bound of the norms that a layer's keys have, whatever tokens they are of: by the weights of the norms they pass."""

from collections.abc import Mapping

import torch

ROUNDINGS = 1 + 2.0**-4
"""Of a key on its way into a cache: E4M3 rounds a channel by up to 2^-4 of it."""


def largest_key_norm(params: Mapping[str, torch.Tensor], attn: str, head_dim: int) -> float:
    """Returns a bound of the L2 norm of a layer's window keys and entries.

    A vector over its root mean square is up to sqrt(head_dim) long; a norm's weight makes that as much longer as its
    largest channel says. A rotation changes no length.
    """
    names = (f"{attn}.kv_norm.weight", f"{attn}.compressor.norm.weight")
    largest = max(float(params[name].abs().max()) for name in names if name in params)
    return ROUNDINGS * largest * float(head_dim**0.5)
