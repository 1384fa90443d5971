"""Each thing that can be wrong with shards, their headers and the index is one problem, with the file named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cpu.inspect.found import found
from safetensors.torch import load_file, save_file
from support.broken import change_header, shard_bytes

from ownpath.checkpoint.header import MAX_HEADER_BYTES
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.inspect.inspection import inspect_folder


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_truncated_shard(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-7])
    assert found(folder) == {("truncated-shard", shard.name)}


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100])
def test_a_shard_that_ends_in_its_header(num_bytes: int, folder: Path) -> None:
    shard = first_shard(folder)
    names = list(load_file(shard))
    shard.write_bytes(shard.read_bytes()[:num_bytes])
    problems = found(folder)
    assert ("truncated-shard", shard.name) in problems
    assert all(check == "missing-tensor" for check, _ in problems - {("truncated-shard", shard.name)})
    assert {where for check, where in problems if check == "missing-tensor"} <= set(names)


def test_an_over_long_shard(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert found(folder) == {("over-long-shard", shard.name)}


def test_overlapping_tensors(folder: Path) -> None:
    shard = first_shard(folder)

    def change(header: dict[str, Any]) -> None:
        """The second tensor's bytes are declared where the first one's are; so many are then nobody's."""
        first, second = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[:2]
        length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        start = header[first]["data_offsets"][0]
        header[second]["data_offsets"] = [start, start + length]

    change_header(shard, change)
    assert ("overlapping-tensors", shard.name) in found(folder)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_bomb_is_not_read(length: int, folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])
    with shard.open("ab") as file:
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: the size that is claimed is there
    assert ("header-bomb", shard.name) in found(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b"{}x",
        b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":null}}',
        b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}',
        b'{"a":7}',
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F64","shape":[' + b",".join([b"9223372036854775807"] * 32) + b'],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    ],
    ids=range(17),
)
def test_a_header_that_is_none(header: bytes, folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard_bytes(header, b"\0"))
    assert ("shard", shard.name) in found(folder)


def test_a_shape_that_overflows_though_it_is_empty(folder: Path) -> None:
    """2^32 * 2^32 * 0 elements are none, but the public reader multiplies in 64 bits from the left."""
    shard = first_shard(folder)
    shard.write_bytes(shard_bytes(b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', b""))
    assert ("shard", shard.name) in found(folder)


def test_a_tensor_named_twice_in_a_header(folder: Path) -> None:
    shard = first_shard(folder)
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    shard.write_bytes(shard_bytes(b"{" + entry + b"," + entry + b"}", b"\0"))
    assert ("duplicated-tensor", shard.name) in found(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    assert found(folder) == {("duplicated-tensor", name)}


def test_a_missing_shard_is_one_problem_besides_its_tensors(folder: Path) -> None:
    shard = first_shard(folder)
    names = set(load_file(shard))
    shard.unlink()
    problems = found(folder)
    assert ("missing-shard", shard.name) in problems
    assert {where for check, where in problems if check == "missing-tensor"} == names


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/passwd", "..", "", "sub/x", "a\\b", "a\0"])
def test_an_index_that_escapes_the_folder(target: str, folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["embed.weight"] = target
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert ("escaping-shard", target) in found(folder)


def test_a_shard_that_is_a_link_out(folder: Path, tmp_path: Path) -> None:
    shard = first_shard(folder)
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    assert ("escaping-shard", shard.name) in found(folder)


def test_a_hub_cache_of_links_is_clean(folder: Path, tmp_path: Path) -> None:
    """models--x/snapshots/<revision>/ holds links into models--x/blobs/."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    assert found(snapshot) == set()


@pytest.mark.parametrize("name", [INDEX_NAME, "config.json", "tokenizer.json", "hf_quant_config.json"])
def test_a_pipe_does_not_hang(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert any(where == name for _, where in found(folder))


def test_a_pipe_for_a_shard_does_not_hang(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)
    assert ("shard", shard.name) in found(folder)


def test_a_tensor_that_the_index_does_not_list_or_lists_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(file for file in files if file != index["weight_map"]["norm.weight"])
    index["weight_map"]["norm.weight"] = moved
    del index["weight_map"]["embed.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert found(folder) == {("index", "norm.weight"), ("unlisted-tensor", "embed.weight")}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": 1}}', "9" * 9999]
)
def test_an_unreadable_index(text: str, folder: Path) -> None:
    (folder / INDEX_NAME).write_text(text)
    inspection = inspect_folder(folder)
    assert inspection.contents is None
    assert {problem.id for problem in inspection.problems} == {"index"}


def test_a_key_twice_in_the_index(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text().replace('"weight_map": {', '"weight_map": {"norm.weight": "x",')
    (folder / INDEX_NAME).write_text(text)
    assert found(folder) == {("duplicated-tensor", "norm.weight")}


def test_a_shard_name_that_no_file_can_have(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["norm.weight"] = "x" * 5000
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert ("missing-shard", "x" * 5000) in found(folder)
