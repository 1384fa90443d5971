"""Headers made to fill memory or time, and shards that shrink while they are read.

Measured once in full, in a process of its own (LOG.md has the numbers): every header and index within the limits is
inspected below 1 GB. Here each bound is tested with a small number in the place of the limit.
"""

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.broken import shard_bytes
from support.checkpoints import random_checkpoint
from support.hopper_layouts import subject_on

from ownpath.checkpoint import header as header_module
from ownpath.checkpoint import index as index_module
from ownpath.checkpoint.chunks import ChunkReader
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.header import MAX_NAME_CHARS, MAX_PROBLEMS, MAX_TENSORS, HeaderBudget, read_header
from ownpath.checkpoint.index import CheckpointIndex, scan_checkpoint
from ownpath.checkpoint.reader import TensorReader, stream
from ownpath.checkpoint.writer import INDEX_NAME, write_checkpoint
from ownpath.inspect import inspection as inspection_module
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import plan_model
from ownpath.oracle.weights import StoredWeights
from ownpath.verify.file_tensors import FileTensors
from ownpath.weights.load import load_weights

CPU = torch.device("cpu")


def entries(number: int, first: int = 0) -> bytes:
    """A header of tensors without elements."""
    made = {str(first + idx): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for idx in range(number)}
    return json.dumps(made, separators=(",", ":")).encode()


def problem_of(path: Path, budget: HeaderBudget | None = None) -> tuple[str, str]:
    (found,) = read_header(path, budget).problems
    return found.id, found.message


def test_a_header_of_too_many_bytes_tensors_or_values_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes(entries(1000)))
    assert len(read_header(path, HeaderBudget(num_tensors=1000)).entries) == 1000
    assert problem_of(path, HeaderBudget(num_tensors=999))[0] == "header-bomb"
    assert problem_of(path, HeaderBudget(num_bytes=1000))[0] == "header-bomb"
    monkeypatch.setattr("ownpath.files.MAX_JSON_VALUES", 6999)
    check, message = problem_of(path)
    assert check == "shard"
    assert "7000 values; at most 6999" in message
    monkeypatch.setattr("ownpath.files.MAX_JSON_VALUES", 7000)
    monkeypatch.setattr("ownpath.files.MAX_JSON_KEYS", 3999)
    assert "4000 keys; at most 3999" in problem_of(path)[1]


def test_all_shards_of_a_checkpoint_share_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small bombs are one large one."""
    monkeypatch.setattr(HeaderBudget, "__init__", lambda self: self.__dict__.update(num_bytes=10**6, num_tensors=250))
    weight_map = {}
    for shard in range(5):
        (tmp_path / f"{shard}.safetensors").write_bytes(shard_bytes(entries(100, 100 * shard)))
        weight_map |= {str(100 * shard + idx): f"{shard}.safetensors" for idx in range(100)}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    scan = scan_checkpoint(tmp_path)
    assert len(scan.index.tensors) == 200
    assert {path.name for path in scan.broken} == {f"{shard}.safetensors" for shard in (2, 3, 4)}
    assert {problem.id for problem in scan.problems} == {"header-bomb"}


@pytest.mark.parametrize(
    ("name", "limit", "text"),
    [("MAX_SHARDS", 3, "names 5 shards; at most 3"), ("MAX_TENSORS", 4, "lists 5 tensors; at most 4")],
)
def test_an_index_of_too_many_is_refused(
    name: str, limit: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, name, limit)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {str(idx): f"{idx}.st" for idx in range(5)}}))
    assert text in scan_checkpoint(tmp_path).problems[0].message


def test_problems_without_end_are_counted(tmp_path: Path) -> None:
    number = MAX_PROBLEMS + 5
    (tmp_path / "x.safetensors").write_bytes(
        shard_bytes(json.dumps(dict.fromkeys(map(str, range(number)), 0)).encode())
    )
    found = read_header(tmp_path / "x.safetensors").problems
    assert len(found) == MAX_PROBLEMS + 1
    assert "5 more problems" in found[-1].message
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {str(idx): f"../{idx}" for idx in range(number)}}))
    found = scan_checkpoint(tmp_path).problems
    assert len(found) == MAX_PROBLEMS + 1
    assert "5 more problems" in found[-1].message


BAD_SHARDS = ["../x.st", "/etc/passwd", "a\nb", "\x1b[2J", "a\0b", "\ud800", "x" * 300, ".", "..", "", "con/x"]


@pytest.mark.parametrize("shard", BAD_SHARDS)
def test_an_index_that_points_elsewhere(shard: str, tmp_path: Path) -> None:
    (tmp_path.parent / "x.st").write_bytes(shard_bytes(entries(1)))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"0": shard}}))
    scan = scan_checkpoint(tmp_path)
    assert not scan.index.tensors
    assert {problem.id for problem in scan.problems} <= {"escaping-shard", "missing-shard", "index"}
    assert scan.problems


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["model.safetensors", "x.safetensors"])
def test_a_shard_that_is_no_file(make: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    if name == "x.safetensors":
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"0": name}}))
    found = [problem.id for problem in scan_checkpoint(tmp_path).problems]
    assert found in (["shard"], ["escaping-shard"])


@pytest.mark.parametrize(
    "header",
    [
        {"a": [0, 4], "b": [2, 6]},
        {"a": [0, 4], "b": [0, 4]},
        {"a": [4, 8]},
        {"a": [0, 4], "b": [5, 9]},
        {"a": [-4, 0]},
        {"a": [4, 0]},
        {"a": [0, 2**62]},
        {"a": [2**63, 2**63 + 4]},
        {"a": [0, 10**30]},
        {"a": [0.0, 4.0]},
        {"a": [0, 4, 8]},
        {"a": "0-4"},
        {"a": [True, 4]},
    ],
    ids=str,
)
def test_offsets_that_lie(header: dict[str, object], tmp_path: Path) -> None:
    fields = {name: {"dtype": "U8", "shape": [4], "data_offsets": offsets} for name, offsets in header.items()}
    path = tmp_path / "x.safetensors"
    path.write_bytes(shard_bytes(json.dumps(fields).encode(), bytes(4)))
    assert read_header(path).problems


def test_names_and_values_are_cut_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for fields in (
        {"n" * (MAX_NAME_CHARS + 1): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "D" * 10**6, "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": [[[["x"] * 1000] * 10] * 10], "shape": [0], "data_offsets": [0, 0]}},
    ):
        path.write_bytes(shard_bytes(json.dumps(fields).encode()))
        assert len(problem_of(path)[1]) < 300 + len(str(path))


def test_the_memory_of_a_large_header_is_bounded(tmp_path: Path) -> None:
    """Peak and rest for each tensor, times the limit, stay below 1 GB with 250 MB for the libraries."""
    number = 20_000
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(entries(number)))
    tracemalloc.start()
    scan = scan_checkpoint(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(scan.index.tensors) == number
    assert peak / number * MAX_TENSORS < 750e6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrinking") / "whole"
    random_checkpoint(folder, "full-nvfp4", num_hidden_layers=2, compress_ratios=[0, 4], n_routed_experts=3)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """One shard of one checkpoint, which the tests cut."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = {name: data for shard in whole.glob("*.safetensors") for name, data in load_file(shard).items()}
    write_checkpoint(folder, tensors.items(), max_shard_bytes=10**9)
    return folder


def shrink(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    os.truncate(shard, 8 + length + 100)


def read_one_by_one(index: CheckpointIndex) -> Iterator[object]:
    with TensorReader(index) as read:
        yield from map(read, index.tensors)


def read_rows(index: CheckpointIndex) -> Iterator[object]:
    read = TensorReader(index)
    yield read.rows("embed.weight", torch.tensor([0]))
    yield read.rows("embed.weight", torch.tensor([[5, 1], [1, 0]]))


def read_stream(index: CheckpointIndex) -> Iterator[object]:
    yield from stream(index, index.tensors, max_slice_bytes=1000)


def read_raw(index: CheckpointIndex) -> Iterator[object]:
    with FileTensors(index, CPU) as raw:
        yield from map(raw, index.tensors)


def read_oracle(index: CheckpointIndex) -> Iterator[object]:
    yield from map(StoredWeights(index, CPU).param, (name for name in index.tensors if name.endswith("norm.weight")))


@pytest.mark.parametrize("read", [read_one_by_one, read_rows, read_stream, read_raw, read_oracle])
def test_a_shard_that_shrinks_while_it_is_read(
    read: Callable[[CheckpointIndex], Iterator[object]], model: Path
) -> None:
    """It is open, some of it was read, and then it is cut: an error that names a tensor. A mapping would be SIGBUS."""
    index = CheckpointIndex.open(model)
    values = read(index)
    next(values)
    shrink(model)
    with pytest.raises(
        CheckpointError, match=r"tensor '.*' \(.* in model-00001-of-00001\.safetensors\): the file ends"
    ):
        list(values)


def test_a_shard_that_shrinks_before_it_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = plan_model(model, "cpu"), CheckpointIndex.open(model)
    real, calls = ChunkReader.read, list[int]()

    def read(self: ChunkReader, *given: object) -> None:
        if not calls:
            shrink(model)
        calls.append(1)
        real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ChunkReader, "read", read)
    with pytest.raises(CheckpointError, match=r"tensor '.*': the file ends inside it|tensor '.*\): the file ends"):
        load_weights(plan, index, CPU)


def test_a_shard_that_shrinks_while_it_is_inspected(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scanned(folder: Path) -> index_module.Scan:
        scan = scan_checkpoint(folder)
        shrink(folder)
        return scan

    monkeypatch.setattr(inspection_module, "scan_checkpoint", scanned)
    assert any("the file ends inside it" in problem.message for problem in inspect_folder(model).problems)


def test_a_shard_that_shrinks_while_it_is_verified(model: Path) -> None:
    from ownpath.finding import failed
    from ownpath.verify.load_stage import load_stage

    subject = subject_on(model)
    assert subject.plan
    shrink(model)
    found = failed(load_stage(subject, lambda *_: None))
    assert found
    assert all("the file ends inside it" in finding.message for finding in found)


def test_a_shard_that_becomes_a_pipe_is_not_waited_for(model: Path) -> None:
    index = CheckpointIndex.open(model)
    (shard,) = model.glob("*.safetensors")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match=r"tensor '.*' .*not a regular file but a pipe"):
        TensorReader(index)(next(iter(index.tensors)))


def test_every_dtype_is_read_as_the_public_reader_does(tmp_path: Path) -> None:
    from ownpath.checkpoint.dtypes import TORCH_DTYPES

    tensors = {
        name: torch.arange(64, dtype=torch.uint8).view(dtype).reshape(2, -1)
        for name, dtype in TORCH_DTYPES.items()
        if name != "BOOL"
    }
    tensors |= {"BOOL": torch.tensor([True, False]), "none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    write_checkpoint(tmp_path, tensors.items(), 10**6)
    (shard,) = tmp_path.glob("*.safetensors")
    public, read = load_file(shard), TensorReader(CheckpointIndex.open(tmp_path))
    for name, tensor in tensors.items():
        for found in (public[name], read(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
    assert header_module.DTYPE_BITS.keys() - TORCH_DTYPES.keys() == {"F4", "F6_E2M3", "F6_E3M2"}
