"""The published V4-Flash in NVIDIA's export, 160 GB of sparse files on disk, is inspected in seconds."""

import struct
import time
from pathlib import Path
from typing import Any

import pytest
from cpu.plan.test_published_shapes import FLASH, Header, model_headers, nvfp4
from support.broken import write_sparse_shard

from ownpath.checkpoint.writer import INDEX_NAME
from ownpath.inspect.blocks import SAMPLE_BYTES
from ownpath.inspect.inspection import inspect_folder
from ownpath.inspect.module_rows import module_rows, num_parameters

NUM_SHARDS = 46
DTYPE_ORDER = ("I64", "F32", "BF16", "F8_E4M3", "F8_E8M0", "U8", "I8")
"""safetensors' own writer puts wide dtypes first, so that scalars lie together."""


def shards_of(headers: list[Header]) -> list[list[Header]]:
    size = -(-len(headers) // NUM_SHARDS)
    parts = [headers[start : start + size] for start in range(0, len(headers), size)]
    return [sorted(part, key=lambda header: (DTYPE_ORDER.index(header[1]), header[0])) for part in parts]


def first_layers(number: int) -> dict[str, Any]:
    """V4-Flash cut off behind so many layers, of which four are of all kinds."""
    return FLASH | {"num_hidden_layers": number, "compress_ratios": FLASH["compress_ratios"][: number + 1]}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Weights are holes in the files; scales are there, as far as a sample reads them."""
    import json

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, part in enumerate(shards_of(list(model_headers(config, nvfp4))), start=1):
        name = f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        starts = write_sparse_shard(folder / name, part)
        with (folder / name).open("r+b") as file:
            for key, dtype, shape in part:
                weight_map[key] = name
                if key.endswith(("weight_scale_2", "input_scale")):
                    file.seek(starts[key])
                    file.write(struct.pack("<f", 2.0**-11))
                elif key.endswith("scale") and dtype in ("F8_E4M3", "F8_E8M0"):
                    file.seek(starts[key])
                    # 2^-2 in E4M3, 2^-3 in E8M0
                    bits = b"\x28" if dtype == "F8_E4M3" else b"\x7c"
                    file.write(bits * min(SAMPLE_BYTES, shape[0] * shape[1]))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(("num_layers", "most_seconds"), [(4, 10), pytest.param(43, 60, marks=pytest.mark.slow)])
def test_v4_flash_is_inspected_in_seconds(num_layers: int, most_seconds: int, tmp_path: Path) -> None:
    folder = tmp_path / "flash"
    write_model(folder, first_layers(num_layers))
    start = time.process_time()
    inspection = inspect_folder(folder)
    seconds = time.process_time() - start
    total = sum(info.num_bytes for info in inspection.index.tensors.values())
    print(f"{len(inspection.index.tensors)} tensors, {total / 1e9:.1f} GB inspected in {seconds:.1f} s")
    for file in folder.iterdir():
        file.unlink()  # 300 MB of scales are real
    assert [problem.id for problem in inspection.problems] == ["tokenizer"], "weights without a tokenizer"
    assert total > 160e9 / 43 * num_layers
    assert inspection.contents is not None
    assert seconds < most_seconds, "of one core: a tool that takes longer is one that nobody runs first"
    census, index = inspection.contents.census, inspection.index
    rows = {row.modules: row for row in module_rows(census, index)}
    experts = rows[f"layers.{{0-{num_layers - 1}}}.ffn.experts.{{0-255}}.w1"]
    assert (experts.format, experts.num_modules) == ("NVFP4", num_layers * 256)
    assert rows[f"layers.{{0-{num_layers - 1}}}.attn.wq_b"].format == "FP8_BLOCK"
    assert len(rows) < 30
    # The release is called 284B: routed experts alone are 43 * 256 * 3 * 4096 * 2048.
    assert 43 * 256 * 3 * 4096 * 2048 == 277_025_390_592
    if num_layers == 43:
        assert num_parameters(census, index) == pytest.approx(284e9, rel=0.01)
    findings = inspection.contents
    assert findings.gate_up.num_pairs == findings.gate_up.num_equal == num_layers * 256
    assert len(findings.blocks.lossless_casts) == num_layers
    assert {projection: c.num_shared for projection, c in findings.calibration.items()} == dict.fromkeys(
        ("w1", "w2", "w3"), num_layers * 256
    )
    assert [memory.device for memory in findings.memory] == ["CPU", "sm_90", "sm_100"]
    stored = total - sum(index[key].num_bytes for key in census.ignored)
    input_scales = sum(info.num_bytes for key, info in index.tensors.items() if key.endswith(".input_scale"))
    for memory in findings.memory:
        assert memory.refusal is None
        # One float32 per row of fused NVFP4 linears is all that the planned layout adds; this export has none. Input
        # scales are held where a kernel quantises its input.
        assert memory.weights_bytes == stored - (0 if memory.device == "sm_100" else input_scales)
