"""Reading in bounded slices, writing atomically, and the ledger of slots."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.checkpoint.chunks import FileChunk
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import stream
from ownpath.checkpoint.tensor_info import TensorInfo
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.loading import plan_model
from ownpath.weights import load as load_module
from ownpath.weights.load import load_weights
from ownpath.weights.operands import make_operand, sentinel


@pytest.mark.parametrize("limit", [1, 100, 1000, 2**20])
def test_tensors_stream_in_slices_of_bounded_size(limit: int, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(60.0).view(20, 3),
        "codes": torch.arange(256, dtype=torch.uint8).view(16, 16),
        "scalar": torch.tensor(0.25),
    }
    write_checkpoint(tmp_path, tensors.items(), max_shard_bytes=300)
    index = CheckpointIndex.open(tmp_path)
    rebuilt: dict[str, list[torch.Tensor]] = {}
    for part in stream(index, tensors, max_slice_bytes=limit):
        row_bytes = part.info.num_bytes // max(1, part.info.shape[0] if part.info.shape else 1)
        assert part.data.nbytes <= max(limit, row_bytes)
        rebuilt.setdefault(part.info.name, []).append(part.data.clone())
    for name, value in tensors.items():
        parts = rebuilt[name]
        assert torch.equal(torch.cat(parts) if value.ndim else parts[0], value)


def test_the_index_knows_every_byte(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7, dtype=torch.float8_e8m0fnu)}
    write_checkpoint(tmp_path, tensors.items(), max_shard_bytes=2**20)
    infos = CheckpointIndex.open(tmp_path).tensors
    assert {name: (info.dtype, info.shape, info.num_bytes) for name, info in infos.items()} == {
        "a": ("BF16", (3, 5), 30),
        "b": ("F8_E8M0", (7,), 7),
    }
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"]["total_size"] == 37


def test_a_writer_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(100)
        yield "b", torch.zeros(100)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_checkpoint(tmp_path, failing(), max_shard_bytes=400)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_overwritten_and_names_are_unique(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' was given twice"):
        write_checkpoint(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))], 100)
    with pytest.raises(CheckpointError, match="no tensors"):
        write_checkpoint(tmp_path, [], 100)
    write_checkpoint(tmp_path, [("a", torch.zeros(1))], 100)
    with pytest.raises(CheckpointError, match="never overwritten"):
        write_checkpoint(tmp_path, [("a", torch.zeros(1))], 100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_tile_every_operand(layout: str, tmp_path: Path, device: torch.device) -> None:
    """The slots of an op cover each element of its buffers exactly once."""
    random_checkpoint(tmp_path, layout)
    stored = {name: info.dtype for name, info in CheckpointIndex.open(tmp_path).tensors.items()}
    for op in plan_model(tmp_path, str(device)).ops:
        operand = make_operand(op, stored, device)
        for buffers in operand.buffers.values():
            for buffer in buffers:
                buffer.view(torch.uint8).zero_()
        for slot in operand.destinations:
            raw = slot.target.unsqueeze(-1).view(torch.uint8)
            raw += 1
        for name, buffers in operand.buffers.items():
            for buffer in buffers:
                assert (buffer.view(torch.uint8) == 1).all(), (op.label, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_unwritten_memory_reads_as_nan(dtype: torch.dtype, device: torch.device) -> None:
    assert sentinel((4, 4), dtype, device).float().isnan().all()
    assert (sentinel((4,), torch.uint8, device) == 0xFF).all()


def test_a_slot_left_unwritten_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the reader to lose a slice, loading would fail by name instead of handing out half a tensor."""
    random_checkpoint(tmp_path, "full-nvfp4")
    key = "layers.2.attn.wq_b.weight"
    real = load_module.file_chunks

    def without_key(infos: Iterable[TensorInfo], max_bytes: int) -> Iterator[FileChunk]:
        for chunk in real(infos, max_bytes):
            yield chunk._replace(pieces=tuple(piece for piece in chunk.pieces if piece.info.name != key))

    monkeypatch.setattr(load_module, "file_chunks", without_key)
    with pytest.raises(CheckpointError, match=f"'{key}': .* rows were not written"):
        load_weights(plan_model(tmp_path, "cpu"), CheckpointIndex.open(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("layout", ["modelopt-experts-only", "deepseek-native"])
def test_e8m0_scales_are_copied_as_bytes(layout: str, tmp_path: Path, device: torch.device) -> None:
    """2^-7 copied as a number into bytes becomes 0: the loaded scales must hold the file's bits."""
    random_checkpoint(tmp_path, layout)
    plan = plan_model(tmp_path, str(device))
    loaded = load_weights(plan, CheckpointIndex.open(tmp_path), device)
    index = CheckpointIndex.open(tmp_path)
    for op, operand in zip(plan.ops, loaded.operands, strict=True):
        for slot in operand.destinations:
            if index[slot.key].dtype == "F8_E8M0":
                (part,) = stream(index, [slot.key])
                assert slot.target.dtype == torch.float8_e8m0fnu
                assert torch.equal(slot.target.view(torch.uint8).cpu(), part.data.view(torch.uint8)), op.label
