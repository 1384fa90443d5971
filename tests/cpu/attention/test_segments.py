"""Rows that run over ends of blocks: the same bits as steps that end there, and the snapshots on the way are theirs.

Projections are given, so that what is compared is attention and the caches, not the order in which a library sums
products of more rows or fewer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint

from ownpath.attention.interface import Projected
from ownpath.cache.layout import NAN_BYTE, EntryKind
from ownpath.cache.pools import SequenceCache
from ownpath.cache.snapshot import PassedSnapshot, SnapshotStore
from ownpath.cache.tables import StepTables
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.model import Model

LAYERS = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128]}
WIDE = LAYERS | {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""Sizes for which caches have pages."""
LENGTH = 523
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LAYERS, {"dtype": torch.float32}),
    (LAYERS, {"dtype": torch.float64, "rows_per_request": 4}),
    (WIDE, {"dtype": torch.float32, "cache_format": CacheFormat.FP4_INDEX}),
]


def projected(model: Model, ratio: int, num_rows: int) -> Projected:
    """Random rows of a layer."""
    config, dtype, g = model.config, model.cache_spec.dtype, torch.Generator().manual_seed(ratio)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(num_rows, *shape, generator=g, dtype=dtype)

    heads, dim, index_dim = config.num_attention_heads, config.head_dim, config.index_head_dim
    if not ratio:
        return Projected(normal(heads, dim), normal(dim))
    if ratio == 128:
        return Projected(normal(heads, dim), normal(dim), normal(2 * dim))
    index = normal(4 * index_dim), normal(config.index_n_heads, index_dim), normal(config.index_n_heads)
    return Projected(normal(heads, dim), normal(dim), normal(4 * dim), *index)


def rows_of(whole: Projected, start: int, stop: int) -> Projected:
    return Projected(*(None if part is None else part[start:stop] for part in vars(whole).values()))  # type: ignore[arg-type]


def joined(parts: Sequence[Projected]) -> Projected:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Projected(*(None if column[0] is None else torch.cat(column) for column in columns))


def run(
    model: Model, chunks: Sequence[tuple[SequenceCache, int, int]], passed: Sequence[PassedSnapshot] = ()
) -> list[torch.Tensor]:
    """Runs a step's attention in all layers; returns the first chunk's output of each."""
    tables = StepTables.of([one[0] for one in chunks], [stop - start for _, start, stop in chunks], passed)
    assert not passed or tables.decode is None
    found = []
    with torch.inference_mode():
        step = model.blocks[0].attn.backend.reference.prepare(tables)
        for block, ratio in zip(model.blocks, model.config.compress_ratios, strict=True):
            whole = projected(model, ratio, LENGTH)
            rows = joined([rows_of(whole, start, stop) for _, start, stop in chunks])
            found.append(block.attn.core(rows, step)[: chunks[0][2] - chunks[0][1]])
    tables.extend()
    return found


@pytest.mark.parametrize(("sizes", "engine"), CASES, ids=["float32", "spare rows", "fp4-index"])
def test_a_step_over_ends_of_blocks_is_steps_that_end_there(
    sizes: dict[str, Any], engine: dict[str, Any], tmp_path: Path, device: torch.device
) -> None:
    """Begun within a window of the end, before and behind; another sequence's rows lie beside."""
    random_checkpoint(tmp_path, "bf16", seed=5, **sizes)
    model = load_model(tmp_path, EngineConfig(str(device), max_model_len=1024, max_num_seqs=4, **engine))
    pool, store = model.caches, SnapshotStore(model.caches, 4)
    for begun in (0, 130, 254):
        cut, whole, other = model.new_cache(), model.new_cache(), model.new_cache()
        for cache in (cut, whole):
            if begun:
                run(model, [(cache, 0, begun)])
        expected = []
        for start, stop in ((begun, 256), (256, 512), (512, LENGTH)):
            expected.append(run(model, [(cut, start, stop)]))
            if stop < LENGTH:
                store.save(cut.slot, stop // 512)
        passed = [PassedSnapshot(pool, whole.slot, end) for end in (256, 512)]
        found = run(model, [(whole, begun, LENGTH), (other, 0, 5)], passed)
        for layer, parts in zip(found, zip(*expected, strict=True), strict=True):
            assert torch.equal(layer, torch.cat(parts))
        assert all(map(torch.equal, held_by(whole), held_by(cut)))
        for place, taken in enumerate(passed):
            store.put(taken, 2 + place)
            assert all(map(torch.equal, loaded(model, store, place), loaded(model, store, 2 + place)))
        for cache in (cut, whole, other):
            cache.release()


def rings_of(cache: SequenceCache) -> list[torch.Tensor]:
    """Views of a sequence's rings, in bytes."""
    found = []
    for member, tensor in cache.pool.tensors.items():
        if not member.group.is_paged:
            num_rows = 1 if member.page_bytes else member.num_rows
            found.append(tensor[cache.slot * num_rows : (cache.slot + 1) * num_rows].view(torch.uint8))
    return found


def held_by(cache: SequenceCache) -> list[torch.Tensor]:
    """All that a sequence has written: its entries, index keys and rings."""
    entries = [cache.entries(idx, part) for idx in cache.pool.layers for part in EntryKind]
    return [*(found for found in entries if found is not None), *rings_of(cache)]


def loaded(model: Model, store: SnapshotStore, place: int) -> list[torch.Tensor]:
    """The rings of a slot full of NaN, once a snapshot went into it."""
    cache = model.new_cache()
    for ring in rings_of(cache):
        ring.fill_(NAN_BYTE)
    store.load(place, cache.slot)
    found = [ring.clone() for ring in rings_of(cache)]
    cache.release()
    return found
