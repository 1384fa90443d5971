"""Exact keys as a cache holds them: rounded to codes, within what the input of a right kernel can become.

An input whose error reaches over the middle between two codes may become either, and a block whose largest value
reaches over a power of two may have either scale. Everything else has one right code.

Legend: T keys, H channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.conformance.bounds import FLOAT32_ROUND, SPREAD, Exact, rounding
from ownpath.formats import CacheFormat, KeyFormat
from ownpath.oracle.formats import E2M1, E4M3, fp8, hadamard_matrix, nearest, power_of_two_scale

KEY_BLOCK, INDEX_BLOCK = 64, 32
LEAST_KEY_AMAX, LEAST_INDEX_AMAX = 1e-4, 6 * 2.0**-126
"""The least largest value that a block's scale is made for."""


@dataclass(frozen=True)
class CachedKeys:
    """The form of keys in a cache. dtype: of the activations, which keys are rounded to before.

    num_rotary: channels at the end that have no codes; 0 for index keys. is_official: rounded as the published code
    does. stored: the pages that keep them, if any.
    """

    dtype: torch.dtype
    num_rotary: int
    is_official: bool = False
    stored: KeyFormat = KeyFormat.BF16

    def of(self, x: Exact) -> Exact:
        """Returns what the cache holds of keys [T, H] that are normed and turned."""
        if not self.is_official and self.stored is KeyFormat.BF16:
            return x
        x = x.plus(rounding(self.dtype) * x.value.abs())
        return self._keys(x) if self.num_rotary else self._index_keys(x)

    def _keys(self, x: Exact) -> Exact:
        plain, rotary = (Exact(x.value[:, at], x.bound[:, at]) for at in self._parts)
        plain = in_blocks(plain, KEY_BLOCK, E4M3, LEAST_KEY_AMAX)
        if self.stored is not KeyFormat.BF16:
            rotary = rotary.plus(rounding(torch.bfloat16) * rotary.value.abs())
        return Exact(torch.cat((plain.value, rotary.value), 1), torch.cat((plain.bound, rotary.bound), 1))

    @property
    def _parts(self) -> tuple[slice, slice]:
        return slice(None, -self.num_rotary), slice(-self.num_rotary, None)

    def _index_keys(self, x: Exact) -> Exact:
        x = fp4_of(x, self.dtype) if self.is_official else x
        if self.stored is KeyFormat.FP8:
            return in_blocks(x, x.value.shape[-1], E4M3, LEAST_INDEX_AMAX)
        # What is FP4 already stays as it is; see ``numerics.pages``.
        is_new = self.stored is KeyFormat.FP4 and not self.is_official
        return in_blocks(x, INDEX_BLOCK, E2M1, LEAST_INDEX_AMAX) if is_new else x


def kept(keys_TH: Tensor, num_rotary: int, cache_format: CacheFormat) -> Tensor:
    """Returns what the caches keep of keys [T, H], bit by bit, in their dtype."""
    if not cache_format.in_pages:
        return keys_TH
    plain, rotary = keys_TH[:, :-num_rotary], keys_TH[:, -num_rotary:]
    return torch.cat((fp8(plain, KEY_BLOCK).to(keys_TH.dtype), rotary.bfloat16().to(keys_TH.dtype)), 1)


def fp4_of(x: Exact, dtype: torch.dtype) -> Exact:
    """Multiplies by the Hadamard matrix, rounds to ``dtype`` and then to E2M1.

    The product spreads the independent errors of all channels over each.
    """
    turned = x.value @ hadamard_matrix(x.value.shape[-1]).to(x.value)
    spread = SPREAD * x.bound.square().mean(-1, keepdim=True).sqrt()
    largest = x.value.abs().mean(-1, keepdim=True) * x.value.shape[-1] ** 0.5
    bound = spread + rounding(dtype) * turned.abs() + 8 * FLOAT32_ROUND * largest
    return in_blocks(Exact(turned, bound), INDEX_BLOCK, E2M1, LEAST_INDEX_AMAX)


def in_blocks(x: Exact, size: int, magnitudes: tuple[float, ...], least_amax: float) -> Exact:
    """Rounds blocks of ``size`` channels to codes times a power of two: the middle of what is allowed, and the rest."""
    parts = [torch.stack(_candidates(*block, magnitudes, least_amax)) for block in _blocks(x, size)]
    low, high = (torch.cat([reach(part, 0) for part in parts], -1) for reach in (torch.amin, torch.amax))
    return Exact((low + high) / 2, (high - low) / 2)


def _blocks(x: Exact, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.value.double().split(size, -1), x.bound.double().split(size, -1), strict=True))


def _candidates(value: Tensor, bound: Tensor, magnitudes: tuple[float, ...], least_amax: float) -> list[Tensor]:
    """Rounds both ends of the input's range with both ends of the scale's."""
    reaches = ((value.abs() - bound).amax(-1, keepdim=True), (value.abs() + bound).amax(-1, keepdim=True))
    scales = [power_of_two_scale(reach.clamp(min=least_amax), magnitudes[-1]) for reach in reaches]
    return [nearest(end / scale, magnitudes) * scale for end in (value - bound, value + bound) for scale in scales]
