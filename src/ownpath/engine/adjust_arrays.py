"""The parameters and masks of rows that are drawn again: one buffer in host memory, one on the device, sent as one.

The host may write as soon as the step that was sent last is read: what that step sent has arrived by then.

Legend: S rows in use, C rows that there is room for, W words of a mask, K places of a row's bias.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ownpath.cache.layout import aligned_rows
from ownpath.engine.masks import MaskWords
from ownpath.kernels.sample.types import BiasRows, FilterRows, PenaltyRows, SampleRows

NUM_INTEGERS, NUM_FLOATS = 5, 6
WORDS = 2 + NUM_INTEGERS + NUM_FLOATS
"""Words of a row beside its mask: a seed of two; place, index, top_k, table and number of biased tokens; temperature,
top_p, min_p, presence, frequency and repetition."""


class AdjustArrays:
    """Room for at least so many rows. num_words: of a mask."""

    def __init__(self, num_rows: int, num_words: int, device: torch.device) -> None:
        self.num_rows, self.num_words = aligned_rows(num_rows), num_words
        num_heads = WORDS * self.num_rows
        size = num_heads + self.num_rows * num_words
        self._num_heads = num_heads
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        words = self._host.numpy()
        heads = words[:num_heads].reshape(WORDS, self.num_rows)
        self.seeds: npt.NDArray[np.int64] = heads[:2].reshape(-1).view(np.int64)
        self.integers: npt.NDArray[np.int32] = heads[2 : 2 + NUM_INTEGERS]
        self.floats: npt.NDArray[np.float32] = heads[2 + NUM_INTEGERS :].view(np.float32)
        self.masks: MaskWords = words[num_heads:].reshape(self.num_rows, num_words)
        self._views: dict[tuple[int, bool], _Views] = {}

    def send(
        self, num_rows: int, tables_RV: torch.Tensor, bias: tuple[torch.Tensor, torch.Tensor], with_masks: bool
    ) -> SampleRows:
        """Sends what the host has written of the first rows, and returns them as the device has them then. Does not
        wait. tables_RV: counts for penalties. bias: biased tokens and their values, [S, K] each."""
        views = self._views.get((num_rows, with_masks))
        if views is None:
            views = self._views[num_rows, with_masks] = self._make_views(num_rows, with_masks)
        views.device.copy_(views.host, non_blocking=True)
        rows, num_places = views.rows, views.num_places
        return rows._replace(penalties=PenaltyRows(tables_RV, *views.penalties), bias=BiasRows(*bias, num_places))

    def _make_views(self, num_rows: int, with_masks: bool) -> "_Views":
        size = self._num_heads + with_masks * num_rows * self.num_words
        heads = self._device[: self._num_heads].view(WORDS, self.num_rows)
        seeds = heads[:2].flatten().view(torch.int64)[:num_rows]
        place, index, top_k, table, num_places = heads[2 : 2 + NUM_INTEGERS, :num_rows]
        floats = heads[2 + NUM_INTEGERS :].view(torch.float32)
        temperature, top_p, min_p, presence, frequency, repetition = floats[:, :num_rows]
        masks = self._device[self._num_heads :].view(self.num_rows, self.num_words)[:num_rows] if with_masks else None
        filters = FilterRows(top_k, top_p, min_p)
        rows = SampleRows(temperature, seeds, index, filters, mask_TW=masks, place_T=place)
        penalties = table, presence, frequency, repetition
        return _Views(self._host[:size], self._device[:size], rows, penalties, num_places)


class _Views(NamedTuple):
    """The sent part for so many rows, and the rows as the device has them, but for penalties and bias."""

    host: torch.Tensor
    device: torch.Tensor
    rows: SampleRows
    penalties: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    num_places: torch.Tensor
