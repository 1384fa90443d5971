"""The oracle's reading of every stored format, against Python numbers made from the bits one at a time."""

import math
from pathlib import Path

import pytest
import torch
from cpu.numerics.bit_oracles import e2m1_value, e4m3_value, e8m0_value
from safetensors.torch import save_file
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import (
    COMPRESSED_FP8,
    COMPRESSED_NVFP4,
    MODELOPT_NVFP4,
    NATIVE_FP8,
    NATIVE_MXFP4,
    PLAIN_BF16,
    PLAIN_FP32,
)
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.opspec import model_ops

CPU = torch.device("cpu")
MODULE = "layers.0.attn.wq_a"


def all_bytes(rows: int, columns: int) -> torch.Tensor:
    """Every byte, row by row, as often as they fit."""
    return (torch.arange(rows * columns) * 37 % 256).to(torch.uint8).view(rows, columns)


def stored(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> StoredWeights:
    save_file(tensors, folder / "model.safetensors")
    return StoredWeights(CheckpointIndex.open(folder), CPU, dtype)


def expected_fp4(
    packed: torch.Tensor, scales: list[list[float]], width: int, global_scale: float = 1.0
) -> torch.Tensor:
    rows = [
        [
            e2m1_value(byte & 15 if column % 2 == 0 else byte >> 4) * scale_row[column // width] * global_scale
            for column in range(2 * len(row))
            for byte in (row[column // 2],)
        ]
        for row, scale_row in zip(packed.tolist(), scales, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same numbers, NaN at the same places, zeros of the same sign."""
    same = torch.equal(found.nan_to_num(7e37), expected.nan_to_num(7e37))
    return same and torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int8])
def test_modelopt_nvfp4(code_dtype: torch.dtype, tmp_path: Path) -> None:
    packed, scale_bytes = all_bytes(8, 64), all_bytes(8, 8)
    global_scale = torch.tensor(0.000123)
    read = stored(
        tmp_path,
        {
            f"{MODULE}.weight": packed.view(code_dtype),
            f"{MODULE}.weight_scale": scale_bytes.view(torch.float8_e4m3fn),
            f"{MODULE}.weight_scale_2": global_scale,
            f"{MODULE}.input_scale": torch.tensor(0.5),
        },
    )
    scales = [[e4m3_value(byte) for byte in row] for row in scale_bytes.tolist()]
    assert equal(read.matrix(MODULE, MODELOPT_NVFP4), expected_fp4(packed, scales, 16, global_scale.item()))
    input_scale = read.input_scale(MODULE, MODELOPT_NVFP4)
    assert input_scale is not None
    assert input_scale.item() == 0.5


@pytest.mark.parametrize("shape", [(), (1,)])
def test_compressed_tensors_divides(shape: tuple[int, ...], tmp_path: Path) -> None:
    packed, scale_bytes = all_bytes(4, 64), all_bytes(4, 8) % 0x7F
    read = stored(
        tmp_path,
        {
            f"{MODULE}.weight_packed": packed,
            f"{MODULE}.weight_scale": scale_bytes.view(torch.float8_e4m3fn),
            f"{MODULE}.weight_global_scale": torch.full(shape, 21504.0),
            f"{MODULE}.input_global_scale": torch.full(shape, 256.0),
        },
    )
    scales = [[e4m3_value(byte) for byte in row] for row in scale_bytes.tolist()]
    multiplier = torch.tensor(1 / 21504).item()  # the nearest float32
    assert equal(read.matrix(MODULE, COMPRESSED_NVFP4), expected_fp4(packed, scales, 16, multiplier))
    input_scale = read.input_scale(MODULE, COMPRESSED_NVFP4)
    assert input_scale is not None
    assert input_scale.item() == 1 / 256


@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int8])
def test_mxfp4(code_dtype: torch.dtype, tmp_path: Path) -> None:
    packed, scale_bytes = all_bytes(64, 64), torch.arange(256, dtype=torch.uint8).view(64, 4)
    read = stored(
        tmp_path,
        {
            f"{MODULE}.weight": packed.view(code_dtype),
            f"{MODULE}.scale": scale_bytes.view(torch.float8_e8m0fnu),
        },
    )
    scales = [[e8m0_value(byte) for byte in row] for row in scale_bytes.tolist()]
    assert equal(read.matrix(MODULE, NATIVE_MXFP4), expected_fp4(packed, scales, 32))
    assert read.input_scale(MODULE, NATIVE_MXFP4) is None


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(130, 300), (128, 256), (5, 7)])
def test_fp8_blocks(shape: tuple[int, int], scale_dtype: torch.dtype, tmp_path: Path) -> None:
    codes = all_bytes(*shape)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    exponents = torch.arange(math.prod(grid)).view(grid) - 3
    scale = torch.exp2(exponents.float())
    if scale_dtype is torch.float8_e8m0fnu:
        as_stored = (exponents + 127).to(torch.uint8).view(scale_dtype)
    else:
        scale *= 1.25
        as_stored = scale.to(scale_dtype)
    encoding = COMPRESSED_FP8 if scale_dtype is torch.bfloat16 else NATIVE_FP8
    read = stored(
        tmp_path,
        {encoding.key(MODULE, "qdata"): codes.view(torch.float8_e4m3fn), encoding.key(MODULE, "scale"): as_stored},
    )
    rows = [
        [e4m3_value(byte) * scale[n // 128, k // 128].item() for k, byte in enumerate(row)]
        for n, row in enumerate(codes.tolist())
    ]
    assert equal(read.matrix(MODULE, encoding), torch.tensor(rows, dtype=torch.float64))


def test_plain_matrices_and_params(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.25], [0.0, 3e-3]])
    tensors = {
        "a.weight": values.bfloat16(),
        "b.weight": values.clone(),
        "c.gate.tid2eid": torch.tensor([[3, 1]], dtype=torch.int32),
    }
    read = stored(tmp_path, tensors)
    assert torch.equal(read.matrix("a", PLAIN_BF16), values.bfloat16().double())
    assert torch.equal(read.matrix("b", PLAIN_FP32), values.double())
    assert torch.equal(read.param("a.weight"), values.bfloat16().double())
    table = read.param("c.gate.tid2eid")
    assert table.dtype == torch.int64
    assert table.tolist() == [[3, 1]]


def test_float32_loses_the_global_scales_rounding_alone(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4", seed=3)
    index = CheckpointIndex.open(tmp_path)
    wide, narrow = StoredWeights(index, CPU), StoredWeights(index, CPU, torch.float32)
    codes = [read.factors(MODULE, MODELOPT_NVFP4)[0].double() for read in (wide, narrow)]
    assert torch.equal(*codes)
    exact, rounded = (read.matrix(MODULE, MODELOPT_NVFP4).double() for read in (wide, narrow))
    assert ((rounded - exact).abs() <= torch.finfo(torch.float32).eps / 2 * exact.abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_module_of_a_checkpoint(layout: str, tmp_path: Path) -> None:
    """Every matrix of every layout equals the values that the checkpoint was made to hold, to one float32 rounding."""
    checkpoint = random_checkpoint(tmp_path, layout, seed=2)
    read = StoredWeights(CheckpointIndex.open(tmp_path), CPU)
    num_seen = 0
    for op in model_ops(checkpoint.config):
        for module in op.modules:
            found = read.matrix(module.name, LAYOUTS[layout](module.name))
            expected = checkpoint.decoded[module.name].double()
            assert found.shape == module.shape
            assert ((found - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()).all(), module.name
            num_seen += 1
    assert num_seen > 5 * 8 * 3


def test_stacked_experts_under_transformers_names(tmp_path: Path) -> None:
    """One stored tensor holds all experts' gate and up rows; the oracle reads each expert's own."""
    num_experts, inter, dim = 3, 4, 6
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * inter, dim, generator=generator)
    down = torch.randn(num_experts, dim, inter, generator=generator)
    read = stored(
        tmp_path,
        {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": down},
    )
    for expert in range(num_experts):
        name = f"layers.0.ffn.experts.{expert}"
        assert torch.equal(read.matrix(f"{name}.w1", PLAIN_FP32), gate_up[expert, :inter].double())
        assert torch.equal(read.matrix(f"{name}.w3", PLAIN_FP32), gate_up[expert, inter:].double())
        assert torch.equal(read.matrix(f"{name}.w2", PLAIN_FP32), down[expert].double())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    read = stored(tmp_path, {f"{MODULE}.weight": torch.zeros(2, 8, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=rf"{MODULE}\.weight_scale"):
        read.matrix(MODULE, MODELOPT_NVFP4)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        read.param("norm.weight")
