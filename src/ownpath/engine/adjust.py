"""Changes of logits before a token is chosen: penalties on tokens seen, bias, end tokens that must wait, grammars.

Most requests ask for none of it. Rows that do are drawn again, behind the step that has drawn for all rows alike.

Legend: S rows with changes, R tables, V vocabulary, K places of a row's bias.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ownpath.cache.layout import aligned_rows
from ownpath.engine.limits import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from ownpath.engine.masks import Masks
from ownpath.engine.request import Request, RequestError, SamplingParams
from ownpath.engine.transfer import to_device
from ownpath.kernels.sample.numbers import LARGEST
from ownpath.kernels.sample.types import IN_PROMPT, BiasRows, FilterRows, PenaltyRows, SampleRows

NUM_PLACES = 512
"""Tokens of a row that may have a bias: always so many, as each number of places is a kernel of its own."""
MAX_END_TOKENS = NUM_PLACES - MAX_LOGIT_BIAS - MAX_STOP_TOKENS
"""End tokens that certainly find a place beside everything else."""
LEAST_REPETITION = 1e-30
"""A smaller repetition penalty counts as this one: its inverse would not be a float32."""
BARRED = -LARGEST
"""The bias of a token that must not be chosen: the sampler's range ends there, so no other logit is lower."""


class AdjustedRows(NamedTuple):
    """Rows of a step that are drawn again.

    Shapes: where_S int64 [S], their places among the step's rows. rows: with filters, penalties and bias, all three.
    counts: the tables that are to count what is drawn; ``None``: no row has penalties. masks, turns: the masks that are
    being filled, and whose they are, row by row; ``None``: no row has a grammar.
    """

    where_S: torch.Tensor
    rows: SampleRows
    counts: PenaltyRows | None = None
    masks: Masks | None = None
    turns: Sequence[tuple[Request, int]] = ()

    def masked_rows(self) -> SampleRows:
        """Returns the rows with their masks, once these are filled."""
        return self.rows if self.masks is None else self.rows._replace(mask_TW=self.masks.of(self.turns))

    def count_drawn(self, token_S: torch.Tensor) -> None:
        """Counts the tokens that were drawn, int32 [S], in the tables of their rows."""
        if self.counts is not None:
            tables_RV, table_S = self.counts.tables_RV, self.counts.table_T
            place_S = table_S.clamp(min=0).long() * tables_RV.shape[1] + token_S
            tables_RV.view(-1).index_add_(0, place_S, (table_S >= 0).int())


class CountTables:
    """A table of counts for each request with penalties, on the device: made on demand, free again with the request.

    A table counts what its request draws where that is drawn (``AdjustedRows.count_drawn``), so a step need not wait
    for the host to read the one before. How many tokens it should have counted by then says whether it has counted
    others, of a step that failed or whose token nobody took: then it is made anew, from prompt and answer.
    """

    def __init__(self, num_vocab: int, device: torch.device) -> None:
        self.tables_RV = torch.zeros(1, num_vocab, dtype=torch.int32, device=device)
        self._free = [0]
        self._held: dict[Request, tuple[int, int]] = {}

    def prepare(self, asked: Iterable[tuple[Request, int]]) -> None:
        """Makes the tables ready for the next draw of these requests, which must be counted. asked: with the number of
        tokens drawn by then."""
        entries: list[tuple[int, Sequence[int] | np.ndarray[Any, Any], int]] = []
        for request, num_drawn in asked:
            table, num_counted = self._held.get(request, (None, 0))
            if table is None or num_counted != num_drawn:
                assert num_drawn == len(request.output_ids), "a table is made when all tokens are read"
                table = self._cleared(self._take() if table is None else table)
                entries.append((table, np.unique(request.prompt_ids), IN_PROMPT))
                entries.append((table, request.output_ids, 1))
            self._held[request] = table, num_drawn + 1
        if entries:
            num_vocab = self.tables_RV.shape[1]
            places = [np.asarray(ids, np.int64) + table * num_vocab for table, ids, _ in entries]
            amounts = np.repeat([amount for _, _, amount in entries], [len(some) for some in places])
            place_E, amount_E = to_device(np.stack((np.concatenate(places), amounts)), self.tables_RV.device)
            self.tables_RV.view(-1).index_add_(0, place_E, amount_E.int())

    def has(self, request: Request) -> bool:
        """True if a request has a table."""
        return request in self._held

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
        return self._free.pop()

    def _cleared(self, table: int) -> int:
        self.tables_RV[table].zero_()
        return table


class Adjuster:
    """The running requests whose logits change. end_token_ids: the model's own."""

    def __init__(self, num_vocab: int, device: torch.device, end_token_ids: frozenset[int]) -> None:
        self._num_vocab, self._device, self._end_token_ids = num_vocab, device, end_token_ids
        self._asking: set[Request] = set()
        self._places: dict[Request, tuple[bool, int, torch.Tensor]] = {}
        self.counts = CountTables(num_vocab, device)
        self._masks = Masks(device, -(-num_vocab // 32))

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

    def start(self, requests: Iterable[Request]) -> None:
        """Begins to fill the masks of a step in which these requests draw. To be called before the forward, which
        then runs beside it."""
        if not self._asking:
            return
        asking = [(_turn(one), one.matcher, one.output_ids) for one in requests if one in self._asking]
        self._masks.start([(turn, matcher, ids) for turn, matcher, ids in asking if matcher is not None])

    def waits_for_tokens(self, requests: Iterable[Request]) -> bool:
        """Returns True if the rows of these requests cannot be made before the tokens of the step before are known:
        grammars go on from them, and a table of counts begins with them."""
        return bool(self._asking) and any(one in self._asking and self._waits(one) for one in requests)

    def _waits(self, request: Request) -> bool:
        if request.matcher is not None:
            return True
        # A prompt's rows draw nothing but for the last one, which comes next at the earliest.
        return request.params.has_penalties and request.num_pending <= 2 and not self.counts.has(request)

    def rows_of(
        self, requests: Sequence[Request], num_drawn: Sequence[int] | None = None, passing: Container[int] = ()
    ) -> AdjustedRows | None:
        """Returns the rows, among those of these requests, whose logits change in this step; ``None``: nobody's do.

        num_drawn: tokens that each has drawn, read or not; ``None``: all are read. passing: rows that draw none.
        """
        if not self._asking:
            return None
        numbers = [len(one.output_ids) for one in requests] if num_drawn is None else num_drawn
        picked = [
            (row, one, count)
            for row, (one, count) in enumerate(zip(requests, numbers, strict=True))
            if one in self._asking and row not in passing and one.adjusts_after(count)
        ]
        if not picked:
            return None
        where, chosen, drawn = (list(column) for column in zip(*picked, strict=True))
        punished = [(one, count) for _, one, count in picked if one.params.has_penalties]
        self.counts.prepare(punished)
        places = [self._places_of(one, count < one.params.min_tokens) for _, one, count in picked]
        bias_2SK = torch.stack([tensor for _, tensor in places], dim=1)
        whole, parts = self._columns(chosen, where, drawn, [count for count, _ in places])
        top_p, min_p, temperature, presence, frequency, repetition = parts[4:].view(torch.float32)
        index, top_k, table, num_places = parts[:4]
        penalties = PenaltyRows(self.counts.tables_RV, table, presence, frequency, repetition)
        rows = SampleRows(
            *(temperature, whole[1], index),
            FilterRows(top_k, top_p, min_p),
            penalties,
            BiasRows(bias_2SK[0], bias_2SK[1].view(torch.float32), num_places),
        )
        return AdjustedRows(whole[0], rows, penalties if punished else None, *self._masks_of(chosen))

    def _masks_of(self, chosen: Sequence[Request]) -> tuple[Masks | None, list[tuple[Request, int]]]:
        """Returns the masks of these rows, which ``start`` has begun, or which begin now."""
        if all(one.matcher is None for one in chosen):
            return None, []
        turns = [_turn(one) for one in chosen]
        if not all(one.matcher is None or self._masks.has(turn) for one, turn in zip(chosen, turns, strict=True)):
            self.start(chosen)
        return self._masks, turns

    def _columns(
        self, requests: Sequence[Request], where: list[int], drawn: list[int], num_places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Uploads the rows' numbers: places and seeds int64 [2, S]; 4 columns of int32, 6 of float32 as int32."""
        count, params = len(requests), [one.params for one in requests]
        whole = np.zeros((2, aligned_rows(count)), np.int64)
        parts = np.zeros((10, aligned_rows(count)), np.int32)
        whole[:, :count] = where, [one.seed for one in requests]
        tables = [self.counts.table_of(one) for one in requests]
        parts[:4, :count] = drawn, [one.top_k for one in params], tables, num_places
        repetitions = [max(one.repetition_penalty, LEAST_REPETITION) for one in params]
        filters = [(one.top_p, one.min_p, one.temperature) for one in params]
        penalties = [(one.presence_penalty, one.frequency_penalty) for one in params]
        parts[4:].view(np.float32)[:, :count] = np.column_stack((filters, penalties, repetitions)).T
        return to_device(whole, self._device)[:, :count], to_device(parts, self._device)[:, :count]

    def _places_of(self, request: Request, waits: bool) -> tuple[int, torch.Tensor]:
        """Returns how many places a request's bias has, and ids and values as int32 [2, K]; uploaded once, and again
        when its end tokens are free. waits: they must not be drawn yet."""
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


def _turn(request: Request) -> tuple[Request, int]:
    """Returns whose mask it is, and for which token of the answer."""
    return request, len(request.output_ids)
