"""The twin of a decode step's cache writes against the attention reference, in the pools of several sequences.

One sequence is filled by a chunk of any length, so that steps begin at every residue of their positions; then both
write the same steps. Rows that nothing has written are NaN in both.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.checkpoints import SMALL
from torch import Tensor

from ownpath.attention.compress import Compressor
from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.attention.reference import ReferenceAttention
from ownpath.attention.rope import Rope
from ownpath.cache.pools import CachePool, CacheSpec, EntryCache, SequenceCache
from ownpath.cache.tables import StepTables
from ownpath.config import CSA_RATIO, ModelConfig
from ownpath.kernels.contract import NormWeights
from ownpath.kernels.entries.ref import write_entries
from ownpath.kernels.entries.types import (
    CompressorWeights,
    EntriesWeights,
    EntryAngles,
    LayerPools,
    RawRows,
    RowPlaces,
)
from ownpath.runners import RMSNorm, SharedKeyAttention

EPS = 1e-6
CONFIG = replace(ModelConfig.from_dict(SMALL), compress_ratios=(0, 4, 128), head_dim=64, index_head_dim=32)


class Sequence(NamedTuple):
    """A sequence's tokens, as projected rows: keys before the norm, main and index rows."""

    kv: Tensor
    main: Tensor
    index: Tensor


def draw_sequence(ratio: int, seed: int, dtype: torch.dtype, num_tokens: int = 300) -> Sequence:
    g, windows = torch.Generator().manual_seed(seed), 2 if ratio == CSA_RATIO else 1
    wide = torch.promote_types(dtype, torch.float32)
    widths = CONFIG.head_dim, 2 * windows * CONFIG.head_dim, 2 * windows * CONFIG.index_head_dim
    kv, main, index = (torch.randn(num_tokens, width, generator=g, dtype=wide) for width in widths)
    return Sequence(kv.to(dtype), main, index)


class Layer(NamedTuple):
    """One layer in the terms of the reference, and of the twin."""

    idx: int
    attention: AttentionLayer
    weights: EntriesWeights
    rope: Rope


def make_layer(idx: int) -> Layer:
    ratio, device = CONFIG.compress_ratios[idx], torch.device("cpu")
    g, rope = torch.Generator().manual_seed(idx), Rope.for_layer(CONFIG, ratio > 0, device)
    softmax = SharedKeyAttention(torch.zeros(1), 1.0)

    def parts(width: int) -> tuple[Compressor, CompressorWeights]:
        ape = torch.randn(ratio, width * (2 if ratio == CSA_RATIO else 1), generator=g)
        weight = 1 + 0.1 * torch.randn(width, generator=g)
        theirs = Compressor(ape, RMSNorm(weight, EPS), rope, ratio, lambda keys: keys)
        return theirs, CompressorWeights(ratio, ape, NormWeights(weight, EPS))

    main, index = (parts(width) if ratio else (None, None) for width in (CONFIG.head_dim, CONFIG.index_head_dim))
    index = index if ratio == CSA_RATIO else (None, None)
    norm = NormWeights(1 + 0.1 * torch.randn(CONFIG.head_dim, generator=g), EPS)
    weights = EntriesWeights(norm, main[1], index[1], window=CONFIG.sliding_window)
    return Layer(idx, AttentionLayer(idx, softmax, main[0], index[0]), weights, rope)


def make_pool(dtype: torch.dtype) -> CachePool:
    pool = CachePool(CacheSpec(CONFIG, 512, dtype, torch.device("cpu"), max_sequences=3))
    for tensor in pool.tensors.values():
        tensor.fill_(torch.nan)
    return pool


def reference_step(layer: Layer, pool: CachePool, caches: list[SequenceCache], rows: list[Sequence]) -> StepTables:
    """Writes chunks through the attention reference, as a model's layer does."""
    tables = StepTables.of(caches, [len(chunk.kv) for chunk in rows])
    step = ReferenceAttention(CONFIG.sliding_window).prepare(tables)
    kv, main, index = (torch.cat(part) for part in zip(*rows, strict=True))
    norm = layer.weights.kv_norm
    keys = layer.rope.at(tables.positions_T).apply(RMSNorm(norm.weight_D, norm.eps)(kv))
    has_main, has_index = layer.weights.main is not None, layer.weights.index is not None
    projected = Projected(keys[:, None], keys, main if has_main else None, index if has_index else None)
    step.write_entries(layer.attention, projected)
    step.write_rows(layer.attention, projected)
    return tables


def twin_step(layer: Layer, pool: CachePool, tables: StepTables, rows: list[Sequence]) -> None:
    """Writes one row of each request through the twin."""
    kv, main, index = (torch.cat(part) for part in zip(*rows, strict=True))
    has_main, has_index = layer.weights.main is not None, layer.weights.index is not None
    ratio = layer.weights.main.ratio if layer.weights.main else 1
    at, first = (layer.rope.at(tables.positions_T + shift) for shift in (0, 1 - ratio))
    found = pool.layers[layer.idx]

    def two(cache: EntryCache | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if cache is None else (cache.state, cache.entries)

    write_entries(
        RawRows(kv, main if has_main else None, index if has_index else None),
        EntryAngles(*at.angles, *first.angles),
        RowPlaces(tables.positions_T.int(), tables.slots_R.int(), tables.blocks_RB.int()),
        LayerPools(found.window, *two(found.compressor), *two(found.indexer)),
        layer.weights,
    )


def compare(expected: CachePool, found: CachePool, layer: Layer) -> None:
    for member, tensor in expected.tensors.items():
        if member.layer_idx == layer.idx:
            own = slice(member.num_rows, None)  # the first slot and block are nobody's
            torch.testing.assert_close(found.tensors[member][own], tensor[own], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("idx", [0, 1, 2])
def test_it_writes_what_the_reference_writes(idx: int, dtype: torch.dtype) -> None:
    """Three sequences, two of them behind: 135 steps pass every residue of 4 and 128, first windows and a new block."""
    layer, pool = make_layer(idx), make_pool(dtype)
    caches = [pool.new_sequence() for _ in range(3)]
    ratio, prompts = CONFIG.compress_ratios[idx], (0, 125, 150)
    sequences = [draw_sequence(ratio, seed, dtype) for seed in range(3)]
    chunks = [Sequence(*(part[:count] for part in one)) for one, count in zip(sequences, prompts, strict=True)]
    reference_step(layer, pool, caches[1:], chunks[1:]).extend()
    twin = make_pool(dtype)
    for member, tensor in pool.tensors.items():
        twin.tensors[member].copy_(tensor)
    for number in range(135):
        starts = [cache.num_tokens for cache in caches]
        rows = [Sequence(*(part[at : at + 1] for part in one)) for one, at in zip(sequences, starts, strict=True)]
        tables = reference_step(layer, pool, caches, rows)
        twin_step(layer, twin, tables, rows)
        tables.extend()
        if number % 32 == 0 or number == 134:
            compare(pool, twin, layer)


@pytest.mark.parametrize("idx", [1, 2])
def test_steps_and_chunks_write_the_same(idx: int) -> None:
    """However a sequence is cut into chunks and steps, in the end its pools hold the same."""
    layer, dtype = make_layer(idx), torch.float64
    tokens = draw_sequence(CONFIG.compress_ratios[idx], 7, dtype)
    whole, cut = make_pool(dtype), make_pool(dtype)
    reference_step(layer, whole, [whole.new_sequence()], [tokens])
    cache = cut.new_sequence()
    for start, stop in ((0, 0), (3, 10), (70, 126), (131, 200), (258, 297)):
        while cache.num_tokens < start:
            row = [Sequence(*(part[cache.num_tokens : cache.num_tokens + 1] for part in tokens))]
            tables = StepTables.of([cache], [1])
            twin_step(layer, cut, tables, row)
            tables.extend()
        if stop > start:
            reference_step(layer, cut, [cache], [Sequence(*(part[start:stop] for part in tokens))]).extend()
    while cache.num_tokens < len(tokens.kv):
        row = [Sequence(*(part[cache.num_tokens : cache.num_tokens + 1] for part in tokens))]
        tables = StepTables.of([cache], [1])
        twin_step(layer, cut, tables, row)
        tables.extend()
    for member, tensor in whole.tensors.items():
        if member.layer_idx == idx:
            own = slice(member.num_rows, None)
            torch.testing.assert_close(cut.tensors[member][own], tensor[own], rtol=1e-12, atol=1e-12, equal_nan=True)
