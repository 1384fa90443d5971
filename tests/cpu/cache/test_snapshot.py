"""Snapshots: a sequence that goes on from one gives the bits of the sequence that it was taken of.

Every ring that a snapshot goes into was full of NaN before, so whatever it lacks would be seen.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import SMALL, random_checkpoint

from ownpath.bench.published import FLASH
from ownpath.cache.layout import NAN_BYTE, STATE, WINDOW, CacheLayout
from ownpath.cache.pools import CachePool, CacheSpec, SequenceCache
from ownpath.cache.snapshot import SnapshotStore, held_rows, snapshot_bytes, tail_bytes
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

LAYERS = {"num_hidden_layers": 2, "compress_ratios": [4, 128]}
WIDE = LAYERS | {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""Sizes for which caches have pages."""
FLASH_CONFIG = ModelConfig.from_dict(dict(FLASH))
"""DeepSeek-V4-Flash: 2 sliding layers, 21 CSA, 20 HCA."""


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Model, cache: SequenceCache, ids: list[int]) -> torch.Tensor:
    return model.forward(ForwardBatch.of([(ids, cache)], model.cache_spec.device, all_logits=True))


def poison(pool: CachePool, slot: int, but: tuple[int, ...]) -> None:
    """Fills a slot, and every block but these, with NaN."""
    for member, tensor in pool.tensors.items():
        num_rows = 1 if member.page_bytes else member.num_rows
        count = len(tensor) // num_rows
        numbers = [one for one in range(count) if one not in but] if member.group.is_paged else [slot]
        for number in numbers:
            tensor[number * num_rows : (number + 1) * num_rows].view(torch.uint8).fill_(NAN_BYTE)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LAYERS, {"dtype": torch.float64}),
    (LAYERS, {"dtype": torch.float32, "rows_per_request": 4}),
    (WIDE, {"dtype": torch.float32, "cache_format": CacheFormat.FP8}),
    (WIDE, {"dtype": torch.float32, "cache_format": CacheFormat.FP4_INDEX}),
]


@pytest.mark.parametrize(("sizes", "engine"), CASES, ids=["float64", "spare rows", "fp8", "fp4-index"])
def test_a_sequence_goes_on_from_a_snapshot(
    sizes: dict[str, Any], engine: dict[str, Any], tmp_path: Path, device: torch.device
) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=5, **sizes)
    model = load_model(tmp_path, EngineConfig(str(device), max_model_len=1024, max_num_seqs=3, **engine))
    pool, store = model.caches, SnapshotStore(model.caches, 2)
    ids = tokens(700, seed=2)
    first = model.new_cache()
    run(model, first, ids[:256])
    store.save(first.slot, 1)
    run(model, first, ids[256:512])
    store.save(first.slot, 0)
    expected = run(model, first, ids[512:])
    ends = {0: 512, 1: 256}
    for place, end in ends.items():
        other = pool.new_sequence(1024, shared=first.blocks[: end // 256])
        poison(pool, other.slot, first.blocks)
        store.load(place, other.slot)
        assert other.num_tokens == end
        found = [run(model, other, ids[start:stop]) for start, stop in ((256, 512), (512, 700)) if start >= end]
        assert torch.equal(found[-1], expected), f"from {end} tokens"
        assert pool.slots.faults() == []
        other.release()


@pytest.mark.parametrize(("sizes", "engine"), CASES[1:], ids=["spare rows", "fp8", "fp4-index"])
def test_a_sequence_goes_on_from_a_tail(
    sizes: dict[str, Any], engine: dict[str, Any], tmp_path: Path, device: torch.device
) -> None:
    """Taken a row late, anywhere in a window of CSA's and HCA's and of a block; the next row, and more behind it. The
    row that was written too early was another token's."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=5, **sizes)
    model = load_model(tmp_path, EngineConfig(str(device), max_model_len=512, max_num_seqs=2, **engine))
    pool, store, ids = model.caches, SnapshotStore(model.caches, 1, num_tails=2), tokens(400, seed=2)
    for length in (37, 254, 391):
        first, shared = model.new_cache(), length // 256
        run(model, first, ids[:length])
        run(model, first, [ids[length] ^ 1])
        store.save_tail(first.slot, first.blocks[shared], 1)
        first.num_tokens = length
        parts = ids[length : length + 1], ids[length + 1 : length + 9]
        expected = [run(model, first, part) for part in parts]
        other = pool.new_sequence(512, shared=first.blocks[:shared])
        poison(pool, other.slot, first.blocks[:shared])
        store.load_tail(1, other.slot, other.blocks[shared])
        other.num_tokens = length
        for part, wanted in zip(parts, expected, strict=True):
            assert torch.equal(run(model, other, part), wanted), f"from {length} tokens"
        assert pool.slots.faults() == []
        first.release()
        other.release()


def test_a_window_without_its_ring_is_seen(tmp_path: Path, device: torch.device) -> None:
    """Blocks alone are no prefix cache: without the snapshot the same run gives no number at all."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=5, **LAYERS)
    model = load_model(tmp_path, EngineConfig(str(device), torch.float32, max_model_len=512, max_num_seqs=2))
    first, ids = model.new_cache(), tokens(300, seed=2)
    run(model, first, ids[:256])
    other = model.caches.new_sequence(512, shared=first.blocks[:1])
    poison(model.caches, other.slot, first.blocks)
    assert run(model, other, ids[256:]).isnan().any()


def test_drafts_go_on_too(tmp_path: Path, device: torch.device) -> None:
    """A draft's window is a ring like any other; its last row depends on the token behind the block, which is why names
    of blocks look ahead."""
    random_checkpoint(tmp_path, "bf16", seed=1, draft="bf16", **LAYERS)
    config = EngineConfig(str(device), torch.float64, 512, max_num_seqs=2, loads_draft=True)
    model = load_model(tmp_path, config)
    store, ids = SnapshotStore(model.caches, 1), tokens(301, seed=4)

    def step(cache: SequenceCache, start: int, stop: int) -> torch.Tensor:
        batch = ForwardBatch.of([(ids[start:stop], cache)], device, all_logits=True)
        next_ids = torch.tensor(ids[start + 1 : stop + 1], device=device)
        drafted = model.drafts[0].hidden(model.hidden(batch), next_ids, batch)
        return model.logits(drafted, batch.logits_ids)

    first = model.new_cache()
    step(first, 0, 256)
    store.save(first.slot, 0)
    expected = step(first, 256, 300)
    other = model.caches.new_sequence(512, shared=first.blocks[:1])
    poison(model.caches, other.slot, first.blocks)
    store.load(0, other.slot)
    assert torch.equal(step(other, 256, 300), expected)


def test_a_snapshot_holds_what_windows_and_csa_need() -> None:
    """V4-Flash in FP8 pages: 43 windows of 128 keys of 584 bytes, and of 21 CSA layers the last four raw rows, of 2,048
    floats and, for the index, 512. HCA's raw rows, two thirds of a slot, are not needed at a block's end."""
    spec = CacheSpec(FLASH_CONFIG, 4096, torch.bfloat16, torch.device("meta"), cache_format=CacheFormat.FP8)
    assert snapshot_bytes(spec) == 43 * 128 * 584 + 21 * 4 * (2048 + 512) * 4
    assert round(snapshot_bytes(spec) / 1e6, 2) == 4.07
    assert snapshot_bytes(spec) < 0.3 * spec.slot_bytes


def test_a_tail_holds_a_slot_and_a_block() -> None:
    """V4-Flash in FP8 pages: with HCA's raw rows, 128 of 1,024 floats in 20 layers, CSA's, 8, and a block: 64 keys and
    index keys in 21 layers and 2 keys in 20."""
    spec = CacheSpec(FLASH_CONFIG, 4096, torch.bfloat16, torch.device("meta"), cache_format=CacheFormat.FP8)
    rings = 43 * 128 * 584 + 21 * 8 * (2048 + 512) * 4 + 20 * 128 * 1024 * 4
    assert tail_bytes(spec) == rings + 21 * 64 * (584 + 132) + 20 * 2 * 584
    assert round(tail_bytes(spec) / 1e6, 1) == 16.4


def test_memory_of_tails_is_told_beside_that_of_snapshots() -> None:
    small = ModelConfig.from_dict(SMALL | LAYERS)
    pool = CachePool(CacheSpec(small, 512, torch.float32, torch.device("cpu")))
    store = SnapshotStore(pool, 3, num_tails=2)
    assert store.num_tail_bytes == 2 * tail_bytes(pool.spec)
    assert re.fullmatch(r"3 snapshots of \S+ \S+, \S+ \S+ together; 2 tails of \S+ \S+, \S+ \S+ together", str(store))
    assert "tail" not in str(SnapshotStore(pool, 3))


@pytest.mark.parametrize("rows_per_request", [1, 2, 9])
def test_held_rows_are_those_before_a_block_end(rows_per_request: int) -> None:
    """By definition: the rows of the last 128 positions of a window, of the last four of a CSA state, for any block."""
    layout = CacheLayout.of(FLASH_CONFIG, FLASH_CONFIG.compress_ratios, rows_per_request=rows_per_request)
    for member in layout.members:
        needed = {WINDOW: 128, STATE: 4 if member.ratio == 4 else 0}.get(member.group, 0)
        held = {*range(*held_rows(member).indices(member.num_rows))}
        for end in range(256, 256 * 40, 256):
            rows = {position % member.num_rows for position in range(end - needed, end)}
            assert rows <= held, (member, end)
        assert len(held) == needed + (member.num_rows - 128 if member.group is WINDOW else 0)
