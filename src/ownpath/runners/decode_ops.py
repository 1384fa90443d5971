"""Registers the calls of a decode step's runners as torch operations, as ``runners.ops`` does for the others.

The arguments of their kernels are named tuples of tensors; an operation takes the tensors one by one, in that order.

Legend: T rows, C columns of the scores, K entries that a row attends to at most.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ownpath.kernels.angles.types import KINDS
from ownpath.kernels.attend.types import DecodeKeys, DecodeRows
from ownpath.kernels.chunk_entries.types import ChunkPlaces, EndingRows
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows
from ownpath.kernels.entries.types import EntryAngles, LayerPools, RawRows, RowPlaces
from ownpath.kernels.scores.types import IndexQuery, PagedRows
from ownpath.numerics import wide_dtype
from ownpath.runners.ops import register

if TYPE_CHECKING:
    from ownpath.runners.decode import IndexScores, RotaryAngles, Select

NUM_RAW, NUM_ANGLES, NUM_PLACES = len(RawRows._fields), len(EntryAngles._fields), len(RowPlaces._fields)
NUM_ENDS, NUM_CHUNK_PLACES = len(EndingRows._fields), len(ChunkPlaces._fields)


def step_angles(positions: Tensor, runner: "RotaryAngles") -> Tensor:
    """Computes float32 [KINDS, T, F]."""
    return runner.run(positions)


def cache_entries(*given: Any) -> None:
    """Writes to the pools: the fields of ``RawRows``, ``EntryAngles``, ``RowPlaces`` and ``LayerPools``, the runner."""
    *tensors, runner = given
    raw, tensors = RawRows(*tensors[:NUM_RAW]), tensors[NUM_RAW:]
    angles, tensors = EntryAngles(*tensors[:NUM_ANGLES]), tensors[NUM_ANGLES:]
    runner.run(raw, angles, RowPlaces(*tensors[:NUM_PLACES]), LayerPools(*tensors[NUM_PLACES:]))


def chunk_entries(*given: Any) -> Tensor:
    """Writes entries and returns near keys: the fields of ``RawRows``, ``EndingRows``, ``ChunkPlaces`` and
    ``LayerPools``, the runner."""
    *tensors, runner = given
    raw, tensors = RawRows(*tensors[:NUM_RAW]), tensors[NUM_RAW:]
    ends, tensors = EndingRows(*tensors[:NUM_ENDS]), tensors[NUM_ENDS:]
    places, pools = ChunkPlaces(*tensors[:NUM_CHUNK_PLACES]), LayerPools(*tensors[NUM_CHUNK_PLACES:])
    near_WH: Tensor = runner.run(raw, ends, places, pools)
    return near_WH


def chunk_rings(*given: Any) -> None:
    """Writes to the rings: the fields of ``RawRows``, ``ChunkPlaces`` and ``LayerPools``, the runner."""
    *tensors, runner = given
    raw, tensors = RawRows(*tensors[:NUM_RAW]), tensors[NUM_RAW:]
    runner.run(raw, ChunkPlaces(*tensors[:NUM_CHUNK_PLACES]), LayerPools(*tensors[NUM_CHUNK_PLACES:]))


def index_scores(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, positions: Tensor, blocks: Tensor,
    runner: "IndexScores",
) -> Tensor:  # fmt: skip
    """Computes scores [T, C], at least float32."""
    return runner.run(IndexQuery(q, weights, cos, sin), keys, PagedRows(positions, blocks))


def select(
    scores: Tensor, positions: Tensor, blocks: Tensor, flags: Tensor, runner: "Select"
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns the rows of the pool [T, K] and their number [T]; writes the flag of scores that are not finite [T]."""
    return runner.run(scores, PagedRows(positions, blocks), flags)[:2]


def decode_attention(*given: Any) -> Tensor:
    """Computes o [T, N, H]: q, cos, sin, the fields of ``DecodeKeys`` and of ``DecodeRows``, the runner."""
    q, cos, sin, window, entries, per_block, ratio, *rows, runner = given
    found: Tensor = runner.run(q, cos, sin, DecodeKeys(window, entries, per_block, ratio), DecodeRows(*rows))
    return found


def chunk_attention(*given: Any) -> Tensor:
    """Computes o [T, N, H]: q, cos, sin, the fields of ``ChunkKeys`` and of ``ChunkRows``, the runner."""
    q, cos, sin, near, entries, per_block, ratio, *rows, runner = given
    found: Tensor = runner.run(q, cos, sin, ChunkKeys(near, entries, per_block, ratio), ChunkRows(*rows))
    return found


def _fake_angles(positions: Tensor, runner: "RotaryAngles") -> Tensor:
    return positions.new_empty((KINDS, len(positions), runner.num_pairs), dtype=torch.float32)


def _fake_entries(*_: object) -> None:
    """Nothing is returned."""


def _fake_near(kv: Tensor, *given: Any) -> Tensor:
    sources = given[NUM_RAW - 1 + NUM_ENDS + NUM_CHUNK_PLACES - 1]
    return kv.new_empty((len(sources), kv.shape[1]))


def _fake_scores(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, positions: Tensor, blocks: Tensor,
    runner: "IndexScores",
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(wide_dtype(q.dtype), weights.dtype)
    return q.new_empty((len(blocks), blocks.shape[1] * runner.pages.per_block), dtype=dtype)


def _fake_select(
    scores: Tensor, positions: Tensor, blocks: Tensor, flags: Tensor, runner: "Select"
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (len(scores), runner.topk), (len(scores),)
    return tuple(scores.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _fake_attention(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


ROWS = "Tensor positions, Tensor slots, Tensor blocks"
DECODE_OPERATIONS = (
    ("step_angles(Tensor positions, int runner) -> Tensor", step_angles, _fake_angles),
    (
        "cache_entries(Tensor kv, Tensor? main, Tensor? index, Tensor cos, Tensor sin, Tensor? first_cos,"
        f" Tensor? first_sin, {ROWS}, Tensor(a!) window, Tensor(b!)? state, Tensor(c!)? entries,"
        " Tensor(d!)? index_state, Tensor(e!)? index_entries, int runner) -> ()",
        cache_entries,
        _fake_entries,
    ),
    (
        "chunk_entries(Tensor kv, Tensor? main, Tensor? index, Tensor? ends, Tensor? cos, Tensor? sin,"
        " Tensor positions, Tensor requests, Tensor slots, Tensor blocks, Tensor sources, Tensor window, Tensor? state,"
        " Tensor(a!)? entries, Tensor? index_state, Tensor(b!)? index_entries, int runner) -> Tensor",
        chunk_entries,
        _fake_near,
    ),
    (
        "chunk_rings(Tensor kv, Tensor? main, Tensor? index, Tensor positions, Tensor requests, Tensor slots,"
        " Tensor blocks, Tensor sources, Tensor(a!) window, Tensor(b!)? state, Tensor? entries,"
        " Tensor(c!)? index_state, Tensor? index_entries, int runner) -> ()",
        chunk_rings,
        _fake_entries,
    ),
    (
        "index_scores(Tensor q, Tensor weights, Tensor cos, Tensor sin, Tensor keys, Tensor positions, Tensor blocks,"
        " int runner) -> Tensor",
        index_scores,
        _fake_scores,
    ),
    (
        "select(Tensor scores, Tensor positions, Tensor blocks, Tensor(a!) flags, int runner) -> (Tensor, Tensor)",
        select,
        _fake_select,
    ),
    (
        "decode_attention(Tensor q, Tensor cos, Tensor sin, Tensor window, Tensor? entries, int per_block, int ratio,"
        f" {ROWS}, Tensor? selected, Tensor? num_selected, int runner) -> Tensor",
        decode_attention,
        _fake_attention,
    ),
    (
        "chunk_attention(Tensor q, Tensor cos, Tensor sin, Tensor near, Tensor? entries, int per_block, int ratio,"
        " Tensor positions, Tensor places, Tensor requests, Tensor blocks, Tensor? selected, Tensor? num_selected,"
        " int runner) -> Tensor",
        chunk_attention,
        _fake_attention,
    ),
)
"""(schema, implementation, fake implementation). Both take the runner itself as their last argument."""

for _schema, _function, _fake in DECODE_OPERATIONS:
    register(_schema, _function, _fake)
