"""A stored form is read by what it can only mean; what could mean two things is refused, and inspect says the same."""

from pathlib import Path
from types import MappingProxyType

import pytest

from ownpath.checkpoint.detect import detect, examine
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ModuleSpec
from ownpath.checkpoint.spelling import plainly_spelled
from ownpath.checkpoint.tensor_info import TensorInfo

MODULE = ModuleSpec("m", (256, 384))
FP4_CODES, PER_16, PER_32, GRID = (256, 192), (256, 24), (256, 12), (2, 3)
Stored = dict[str, tuple[str, tuple[int, ...]]]


def index_of(stored: Stored) -> CheckpointIndex:
    infos = {f"m.{name}": TensorInfo(f"m.{name}", dtype, shape, Path("s")) for name, (dtype, shape) in stored.items()}
    return CheckpointIndex(Path("model"), MappingProxyType(plainly_spelled(infos)))


READ: list[tuple[str, Stored]] = [
    ("native-mxfp4", {"weight": ("F4", (256, 384)), "scale": ("F8_E8M0", PER_32)}),
    ("native-mxfp4", {"weight": ("I8", FP4_CODES), "scale": ("U8", PER_32)}),
    ("native-mxfp4", {"weight": ("U8", FP4_CODES), "scale": ("I8", (256 * 12,))}),
    ("modelopt-mxfp4", {"weight": ("U8", FP4_CODES), "weight_scale": ("U8", (1, 256, 12))}),
    ("compressed-tensors-mxfp4", {"weight_packed": ("F4", (256, 384)), "weight_scale": ("U8", (256, 12, 1))}),
    ("compressed-tensors-mxfp8", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("U8", PER_32)}),
    ("native-mxfp8", {"weight": ("F8_E4M3", (256, 384)), "scale": ("F8_E8M0", PER_32)}),
    ("native-fp8-block", {"weight": ("F8_E4M3", (256, 384)), "scale": ("U8", GRID)}),
    ("native-fp8-block", {"weight": ("F8_E4M3", (256, 384)), "scale": ("F16", (6,))}),
    ("compressed-tensors-fp8-block", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("BF16", (2, 3, 1))}),
    ("compressed-tensors-fp8-block", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("U8", GRID)}),
    (
        "modelopt-nvfp4",
        {"weight": ("F4", (256, 384)), "weight_scale": ("U8", PER_16), "weight_scale_2": ("BF16", (1, 1))},
    ),
    (
        "compressed-tensors-nvfp4",
        {
            "weight_packed": ("U8", FP4_CODES),
            "weight_scale": ("F8_E4M3", (256, 24, 1)),
            "weight_global_scale": ("F32", ()),
        },
    ),
    ("fp16", {"weight": ("F16", (256, 384))}),
]


@pytest.mark.parametrize(("name", "stored"), READ)
def test_one_reading(name: str, stored: Stored) -> None:
    assert detect(index_of(stored), MODULE).name == name


REFUSED: list[tuple[str, str, Stored]] = [
    ("a transposed grid", "needs shape", {"weight": ("U8", FP4_CODES), "scale": ("U8", (12, 256))}),
    ("a scale per 64", "needs shape", {"weight": ("U8", FP4_CODES), "scale": ("U8", (256, 6))}),
    ("E8M0 per 16", "stores F8_E4M3", {"weight": ("U8", FP4_CODES), "weight_scale": ("F8_E8M0", PER_16),
                                       "weight_scale_2": ("F32", ())}),
    ("E4M3 codes as bytes", "no known encoding has this dtype and shape",
     {"weight": ("U8", (256, 384)), "weight_scale": ("F32", GRID)}),
    ("a scale per row", "needs shape", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", (256, 1))}),
    ("a scale per tensor", "needs shape", {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", ())}),
    ("INT4 of compressed-tensors", r"'m\.weight_packed' \(I32 .*no known encoding has this dtype",
     {"weight_packed": ("I32", (256, 48)), "weight_scale": ("BF16", (256, 3)), "weight_shape": ("I64", (2,))}),
    ("MLX", r"'m\.weight' \(U32 .*no known encoding has this dtype",
     {"weight": ("U32", (256, 48)), "scales": ("BF16", (256, 6)), "biases": ("BF16", (256, 6))}),
    ("INT8 with offsets", r"module 'm' is stored as weight \(I8 .*no known encoding has 'weight_offset'",
     {"weight": ("I8", (256, 384)), "weight_scale": ("F32", (256, 1)), "weight_offset": ("F32", (256, 1))}),
    ("INT8", r"'m\.weight' \(I8 .*no known encoding has this dtype and shape",
     {"weight": ("I8", (256, 384)), "weight_scale": ("F32", (256, 1))}),
    ("GPTQ", r"module 'm' is stored as .*no known encoding has 'qweight' and",
     {"qweight": ("I32", (48, 384)), "qzeros": ("I32", (3, 48)), "scales": ("F16", (3, 384))}),
    ("FP8 of another kind", "no known encoding has this dtype",
     {"weight": ("F8_E5M2", (256, 384)), "scale": ("F32", GRID)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "stored"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_no_reading_or_two(message: str, stored: Stored) -> None:
    """One fault that says what is there, and never that a tensor should be downloaded."""
    index = index_of(stored)
    with pytest.raises(CheckpointError, match=message):
        detect(index, MODULE)
    faults = examine(index, MODULE).faults
    assert faults
    assert "missing-tensor" not in {fault.check for fault in faults}


def test_the_form_on_disk_is_in_every_message() -> None:
    index = index_of({"weight": ("F4", (256, 384)), "scale": ("I8", (1, 256, 12))})
    assert str(index["m.weight"]) == "'m.weight' (U8 [256, 192] in s, there F4 [256, 384])"
    assert str(index["m.scale"]) == "'m.scale' (F8_E8M0 [256, 12] in s, there I8 [1, 256, 12])"
