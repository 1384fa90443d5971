"""Damaged files: an inspection always ends, in problems or in a checkpoint that others read the same way.

``OWNPATH_FUZZ=60 pytest tests/cpu/inspect/test_inspect_fuzz.py`` runs sixty times as many examples, each time others.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.chat.small_tokenizer import NUM_TOKENS, tokenizer_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.broken import change_header, shard_bytes
from support.checkpoints import random_checkpoint
from support.pages import inspection_text

from ownpath.checkpoint.header import read_header
from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.inspect.inspection import inspect_folder
from ownpath.inspect.report import inspection_dict
from ownpath.loading import plan_model

TIMES = int(os.environ.get("OWNPATH_FUZZ", "1"))
SHAPE = {"num_hidden_layers": 2, "compress_ratios": [0, 4], "n_routed_experts": 3, "vocab_size": NUM_TOKENS}

JSON_FILES = (INDEX_NAME, "config.json", "hf_quant_config.json", "tokenizer_config.json", "tokenizer.json")


def examples(number: int) -> settings:
    return settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A few bytes changed, removed, doubled or inserted, or the end cut off; mostly in the first few hundred."""
    for _ in range(draw(st.integers(1, 3))):
        limit = draw(st.sampled_from((16, 400, len(content))))
        at = draw(st.integers(0, max(0, min(limit, len(content)) - 1)))
        kind = draw(st.sampled_from(("flip", "set", "remove", "double", "insert", "cut")))
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "set":
            token = draw(st.sampled_from((b'"', b"0", b"-", b"9" * 30, b"{", b"]", b",", b"null", b"\xff", b"\\u")))
            content = content[:at] + token + content[at + 1 :]
        elif kind == "remove":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        elif kind == "double":
            content = content[:at] + content[at : at + draw(st.integers(1, 200))] + content[at:]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
        else:
            content = content[:at]
        content = content or b"\0"
    return content


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 10**400]),
    st.floats(),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    random_checkpoint(folder, "modelopt-experts-only", seed=5, **SHAPE)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}', encoding="utf-8")
    layers = {"layers.0.ffn.experts": {"quant_algo": "NVFP4"}, "layers.1.ffn.experts": {"quant_algo": "NVFP4"}}
    quantization = {"quantized_layers": layers, "exclude_modules": ["*.attn.*", "head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    assert inspect_folder(folder).problems == ()
    return folder


class Broken:
    """A copy of the model with one file replaced, for the length of one example."""

    def __init__(self, model: Path) -> None:
        self.folder = model.with_name("broken")

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.folder.with_name("model"), self.folder)
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def check(folder: Path) -> None:
    """An inspection ends, can be shown, and finds something wherever a plan is refused."""
    inspection = inspect_folder(folder)
    assert inspection.seconds < 20
    text = inspection_text(inspection)
    assert all(line.isprintable() for line in text.splitlines())
    text.encode("utf-8")
    assert len(json.loads(json.dumps(inspection_dict(inspection)))["problems"]) == len(inspection.problems)
    assert inspection.contents is not None or inspection.problems
    if not inspection.problems:
        plan_model(folder, "cpu")  # raises where it is refused


TENSORS = {
    "a": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "b.c": torch.ones(3, dtype=torch.bfloat16),
    "d": torch.tensor(1.5),
    "e": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def as_safetensors_reads_it(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """The public reader's view; ``None`` where it refuses the file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError):
        return None


def compare_readers(path: Path) -> None:
    """The public reader opens every file in which we find no problem, and finds the same tensors."""
    header = read_header(path)
    if not header.problems:
        expected = as_safetensors_reads_it(path)
        assert expected is not None, path.read_bytes()
        assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == expected
        assert all(0 <= entry.start <= entry.stop <= path.stat().st_size for entry in header.entries)


@examples(700)
@given(data=st.data())
def test_a_damaged_shard_is_refused_or_read_as_others_do(shard: Path, data: st.DataObject) -> None:
    path = shard.with_name("damaged.safetensors")
    path.write_bytes(data.draw(damage(shard.read_bytes())))
    compare_readers(path)


@examples(700)
@given(
    name=st.sampled_from(["a", "b.c", "d", "e"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=VALUES
    | st.lists(st.integers(0, 20), max_size=3)
    | st.sampled_from(["F8_E8M0", "F4", "F6_E2M3", "U16", "U64", "C64", "I16", "BOOL", "F64", "F16", "F8_E5M2"]),
)
def test_a_header_of_strange_values_is_refused_or_read_as_others_do(
    shard: Path, name: str, field: str, value: Any
) -> None:
    path = shard.with_name("strange.safetensors")
    shutil.copy(shard, path)
    change_header(path, lambda header: header[name].update({field: value}))
    compare_readers(path)


def test_each_dtype_has_the_size_that_the_public_reader_gives_it(tmp_path: Path) -> None:
    """Every dtype name that either reader knows, with 24 elements of 1 to 128 bits."""
    from ownpath.checkpoint.header import DTYPE_BITS

    names = {*DTYPE_BITS, "F4", "F6_E2M3", "F8_E4M3FNUZ", "C64", "U64", "I4", "F32X", "BF8"}
    for name in sorted(names):
        for bits in (1, 2, 4, 6, 8, 16, 32, 64, 128):
            entry = {"t": {"dtype": name, "shape": [24], "data_offsets": [0, 3 * bits]}}
            path = tmp_path / "t.safetensors"
            path.write_bytes(shard_bytes(json.dumps(entry).encode(), bytes(3 * bits)))
            if as_safetensors_reads_it(path) is None:
                assert read_header(path).problems, (name, bits)
            elif name in DTYPE_BITS:
                assert DTYPE_BITS[name] == bits


@examples(35)
@given(data=st.data(), name=st.sampled_from(JSON_FILES))
def test_a_damaged_json_file(model: Path, data: st.DataObject, name: str) -> None:
    with Broken(model) as folder:
        (folder / name).write_bytes(data.draw(damage((folder / name).read_bytes())))
        check(folder)


@examples(35)
@given(data=st.data())
def test_a_damaged_shard_of_a_model(model: Path, data: st.DataObject) -> None:
    with Broken(model) as folder:
        shards = sorted(folder.glob("*.safetensors"))
        shard = data.draw(st.sampled_from(shards))
        shard.write_bytes(data.draw(damage(shard.read_bytes())))
        check(folder)


@examples(25)
@given(data=st.data(), value=VALUES)
def test_a_config_of_strange_values(model: Path, data: st.DataObject, value: Any) -> None:
    with Broken(model) as folder:
        fields = json.loads((folder / "config.json").read_text())
        field = data.draw(st.sampled_from(sorted(fields)))
        (folder / "config.json").write_text(json.dumps(fields | {field: value}))
        check(folder)


@examples(25)
@given(data=st.data(), value=VALUES | st.sampled_from(["../x", "config.json", "\ud800", "a\nb", "\x1b[2J"]))
def test_an_index_of_strange_values(model: Path, data: st.DataObject, value: Any) -> None:
    with Broken(model) as folder:
        index = json.loads((folder / INDEX_NAME).read_text())
        index["weight_map"][data.draw(st.sampled_from(sorted(index["weight_map"])))] = value
        (folder / INDEX_NAME).write_text(json.dumps(index))
        check(folder)


@examples(30)
@given(
    data=st.data(),
    key=st.text(max_size=20) | st.sampled_from(["layers.99999999999.x", "layers.1.ffn.experts.", "\x1b[2J"]),
)
def test_a_renamed_tensor(model: Path, data: st.DataObject, key: str) -> None:
    with Broken(model) as folder:
        shard = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))

        def rename(header: dict[str, Any]) -> None:
            name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
            header[key] = header.pop(name)

        change_header(shard, rename)
        check(folder)
