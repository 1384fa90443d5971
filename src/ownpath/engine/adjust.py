"""Changes of logits before a token is chosen: penalties on tokens seen, bias, end tokens that must wait, grammars.

Most requests ask for none of it. Rows that do are drawn again, behind the step that has drawn for all rows alike. What
changes depends on the token before: the step is launched before that is read, and its rows are made when it is, while
the device runs the step. What stayed as it was in the step before is not made again.

Legend: S rows with changes, R tables, V vocabulary, K places of a row's bias.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ownpath.engine.adjust_arrays import AdjustArrays
from ownpath.engine.limits import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from ownpath.engine.masks import Fill, Masks, fill_rows
from ownpath.engine.request import Request, RequestError, SamplingParams
from ownpath.engine.transfer import to_device
from ownpath.kernels.sample.numbers import LARGEST
from ownpath.kernels.sample.types import IN_PROMPT, SampleRows

NUM_PLACES = 512
"""Tokens of a row that may have a bias: always so many, as each number of places is a kernel of its own."""
MAX_END_TOKENS = NUM_PLACES - MAX_LOGIT_BIAS - MAX_STOP_TOKENS
"""End tokens that certainly find a place beside everything else."""
LEAST_REPETITION = 1e-30
"""A smaller repetition penalty counts as this one: its inverse would not be a float32."""
BARRED = -LARGEST
"""The bias of a token that must not be chosen: the sampler's range ends there, so no other logit is lower."""
_FEWEST_ROWS = 32
"""Rows that there is room for from the first on."""


class CountTables:
    """A table of counts for each request with penalties, on the device: made on demand, free again with the request."""

    def __init__(self, num_vocab: int, device: torch.device) -> None:
        self.tables_RV = torch.zeros(1, num_vocab, dtype=torch.int32, device=device)
        self._free = [0]
        self._held: dict[Request, tuple[int, int]] = {}

    def update(self, requests: Iterable[Request]) -> None:
        """Counts what these requests have seen since the last time, and prompts of those that are new."""
        entries: list[tuple[int, Sequence[int] | np.ndarray[Any, Any], int]] = []
        for request in requests:
            table, num_counted = self._held.get(request) or (self._take(), -1)
            if num_counted < 0:
                entries.append((table, np.unique(request.prompt_ids), IN_PROMPT))
            entries.append((table, request.output_ids[max(num_counted, 0) :], 1))
            self._held[request] = table, len(request.output_ids)
        if entries:
            num_vocab = self.tables_RV.shape[1]
            places = [np.asarray(ids, np.int64) + table * num_vocab for table, ids, _ in entries]
            amounts = np.repeat([amount for _, _, amount in entries], [len(some) for some in places])
            place_E, amount_E = to_device(np.stack((np.concatenate(places), amounts)), self.tables_RV.device)
            self.tables_RV.view(-1).index_add_(0, place_E, amount_E.int())

    def table_of(self, request: Request) -> int:
        """Returns the number of a request's table; -1 if it has none."""
        return self._held.get(request, (-1, 0))[0]

    def drop(self, request: Request) -> None:
        """Frees a request's table; with the last one, the memory of all."""
        held = self._held.pop(request, None)
        if held is not None:
            self._free.append(held[0])
        if not self._held and len(self.tables_RV) > 1:
            self.tables_RV, self._free = self.tables_RV[:1].clone(), [0]

    def _take(self) -> int:
        if not self._free:
            count = len(self.tables_RV)
            self.tables_RV = torch.cat((self.tables_RV, torch.zeros_like(self.tables_RV)))
            self._free = list(range(count, 2 * count))
        table = self._free.pop()
        self.tables_RV[table].zero_()
        return table


class _Picked(NamedTuple):
    """Rows of a step whose logits change. waits: whether their end tokens must wait."""

    places: list[int]
    requests: list[Request]
    waits: list[bool]

    @classmethod
    def of(cls, requests: Sequence[Request | None], asking: set[Request]) -> "_Picked":
        pairs = [(row, one) for row, one in enumerate(requests) if one in asking and one.adjusts_now]
        chosen = [one for _, one in pairs]
        waits = [one.params.min_tokens > 0 and one.must_go_on for one in chosen]
        return cls([row for row, _ in pairs], chosen, waits)

    def fills(self) -> list[Fill]:
        """Returns the masks to fill, each in its row."""
        pairs = enumerate(self.requests)
        return [(row, one.matcher, one.output_ids) for row, one in pairs if one.matcher is not None]


class Adjuster:
    """The running requests whose logits change. end_token_ids: the model's own."""

    def __init__(self, num_vocab: int, device: torch.device, end_token_ids: frozenset[int]) -> None:
        self._num_vocab, self._device, self._end_token_ids = num_vocab, device, end_token_ids
        self._asking: set[Request] = set()
        self._places: dict[Request, tuple[bool, int, torch.Tensor]] = {}
        self.counts = CountTables(num_vocab, device)
        self._masks = Masks()
        self._begun: tuple[_Picked, list[int]] | None = None
        self._arrays = AdjustArrays(0, 0, device)
        self._no_bias_2SK = torch.zeros(2, 0, NUM_PLACES, dtype=torch.int32, device=device)
        self._written: tuple[_Picked, tuple[torch.Tensor, torch.Tensor]] | None = None

    def check(self, params: SamplingParams) -> None:
        """Checks what depends on the model. Errors: RequestError with the field."""
        outside = [token_id for token_id, _ in params.logit_bias if token_id >= self._num_vocab]
        if outside:
            text = f"logit_bias: token id {outside[0]} is outside the vocabulary of {self._num_vocab} tokens"
            raise RequestError(text, "logit_bias")
        if params.min_tokens and len(self._end_token_ids) > MAX_END_TOKENS:
            text = f"min_tokens: the model has {len(self._end_token_ids)} end tokens; at most {MAX_END_TOKENS} can wait"
            raise RequestError(text, "min_tokens")

    def add(self, request: Request) -> None:
        """Takes a request that may run from now on."""
        if request.adjusts:
            self._asking.add(request)

    def drop(self, request: Request) -> None:
        """Forgets a request."""
        if request in self._asking:
            self._asking.discard(request)
            self._places.pop(request, None)
            self.counts.drop(request)
            self._written = None

    def may_change(self, requests: Iterable[Request]) -> bool:
        """Returns True if logits of these requests may change in a step that begins now, whatever tokens are still to
        be read."""
        return bool(self._asking) and any(one in self._asking and one.adjusts_now for one in requests)

    def start(self, requests: Sequence[Request | None]) -> None:
        """Begins to fill the masks of a step in which these requests draw, all of whose tokens are known. To be called
        before a forward that needs the engine's thread."""
        picked = _Picked.of(requests, self._asking)
        fills = picked.fills()
        if fills:
            self._make_room(len(picked.requests))
            self._masks.start(fills, self._arrays.masks)
            self._begun = picked, [len(one.output_ids) for one in picked.requests]

    def rows_of(self, requests: Sequence[Request | None]) -> SampleRows | None:
        """Returns the rows, among those of these requests, whose logits change in this step, each with its place;
        ``None``: nobody's do. All tokens before must be known. The rows are valid until the next call.

        requests: those of the step's rows; ``None``: a row that nobody hears of.
        """
        if not self._asking:
            return None
        picked = _Picked.of(requests, self._asking)
        count = len(picked.requests)
        if not count:
            return None
        with_masks = self._fill_masks(picked)
        self.counts.update(one for one in picked.requests if one.params.has_penalties)
        if self._written is None or self._written[0] != picked:
            self._written = picked, self._write(picked)
        self._arrays.integers[1, :count] = [len(one.output_ids) for one in picked.requests]
        return self._arrays.send(count, self.counts.tables_RV, self._written[1], with_masks)

    def _fill_masks(self, picked: _Picked) -> bool:
        """Fills the masks of these rows, or waits for them if they were begun. Returns whether there are any."""
        begun, self._begun = self._begun, None
        self._masks.wait()
        self._make_room(len(picked.requests))
        fills = picked.fills()
        if not fills:
            return False
        if begun is None or begun != (picked, [len(one.output_ids) for one in picked.requests]):
            fill_rows(fills, self._arrays.masks)
        if len(fills) < len(picked.requests):
            free = [row for row, one in enumerate(picked.requests) if one.matcher is None]
            self._arrays.masks[free] = -1
        return True

    def _make_room(self, num_rows: int) -> None:
        if num_rows > self._arrays.num_rows:
            self._masks.wait()
            count, num_words = max(2 * self._arrays.num_rows, num_rows, _FEWEST_ROWS), -(-self._num_vocab // 32)
            self._arrays, self._written = AdjustArrays(count, num_words, self._device), None
            shape = 2, self._arrays.num_rows, NUM_PLACES
            self._no_bias_2SK = torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _write(self, picked: _Picked) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the rows' numbers but those that change with every token. Returns the biased tokens and their values,
        [S, K] each, on the device."""
        _, requests, _ = picked
        count, params, arrays = len(requests), [one.params for one in requests], self._arrays
        places = [self._places_of(one) for one in requests]
        arrays.seeds[:count] = [one.seed for one in requests]
        arrays.integers[0, :count] = picked.places
        arrays.integers[2, :count] = [one.top_k for one in params]
        arrays.integers[3, :count] = [self.counts.table_of(one) for one in requests]
        arrays.integers[4, :count] = [num_places for num_places, _ in places]
        repetitions = [max(one.repetition_penalty, LEAST_REPETITION) for one in params]
        filters = [(one.temperature, one.top_p, one.min_p) for one in params]
        penalties = [(one.presence_penalty, one.frequency_penalty) for one in params]
        arrays.floats[:, :count] = np.column_stack((filters, penalties, repetitions)).T
        bias_2SK = self._no_bias_2SK[:, :count]
        if any(num_places for num_places, _ in places):
            none = self._no_bias_2SK[:, 0]
            bias_2SK = torch.stack([none if tensor is None else tensor for _, tensor in places], dim=1)
        return bias_2SK[0], bias_2SK[1].view(torch.float32)

    def _places_of(self, request: Request) -> tuple[int, torch.Tensor | None]:
        """Returns how many places a request's bias has, and ids and values as int32 [2, K]; uploaded once, and again
        when its end tokens are free."""
        waits = request.must_go_on
        if not waits and not request.params.logit_bias:
            return 0, None
        known = self._places.get(request)
        if known is None or known[0] != waits:
            biases = dict(request.params.logit_bias)
            if waits:
                barred = request.params.ending_ids(self._end_token_ids)
                biases |= dict.fromkeys((one for one in barred if one < self._num_vocab), BARRED)
            known = self._places[request] = waits, len(biases), self._upload_places(biases)
        return known[1:]

    def _upload_places(self, biases: dict[int, float]) -> torch.Tensor:
        ids = sorted(biases)
        places = np.zeros((2, NUM_PLACES), np.int32)
        places[0, : len(ids)] = ids
        places[1].view(np.float32)[: len(ids)] = [biases[token_id] for token_id in ids]
        return to_device(places, self._device)
