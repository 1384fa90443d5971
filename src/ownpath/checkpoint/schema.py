"""The encodings of V4 checkpoints: names, dtypes and shapes of stored weights. A format is decided here and only here.

A checkpoint stores each weight matrix (a *module*, ``layers.3.attn.wq_b``) as one or more tensors (*parts*). An
``Encoding`` says which: it maps roles (``qdata``, ``scale``, ``global_scale``, ``input_scale``) to key suffixes, dtypes
and shapes, in both directions. Another export is one more entry in ``ENCODINGS``.

Some exports store a global scale as its reciprocal, a divisor. ``PartSpec.is_divisor`` marks it; it is converted when
read and when written, and nothing beyond the schema sees a divisor.

The format of a module is decided from its own tensors, not from ``config.json``: exports differ in what they write
there, and one checkpoint mixes formats. ``plan.claims`` compares the config with the tensors afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ownpath.checkpoint.dtypes import FLOATS, TABLES
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4, Format
from ownpath.qtensor import QuantTensor

ShapeRule = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class PartSpec:
    """One stored tensor of a module: its key suffix, the dtypes it may have, its shape for a weight [N, K].

    dtypes: the first is the one that is written.
    is_divisor: the stored number is the reciprocal of the multiplier; it is written as [1].
    """

    role: str
    suffix: str
    dtypes: tuple[str, ...]
    shape: ShapeRule
    is_divisor: bool = False

    def meant(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the stored tensor, or for a divisor the multiplier [], by one float32 division."""
        return self.meant_each(stored).reshape(()) if self.is_divisor else stored

    def meant_each(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the stored tensor, or for divisors the multipliers in the same shape."""
        return 1 / stored.float() if self.is_divisor else stored

    def stored(self, meant: torch.Tensor) -> torch.Tensor:
        """Returns the tensor to write: itself, or for a multiplier [] its reciprocal in the part's shape."""
        if self.is_divisor:
            return (1 / meant.float()).reshape(1)
        return meant.view(torch.int8) if self.dtypes[0] == "I8" else meant


@dataclass(frozen=True)
class Encoding:
    """One way to store a module; ``format`` is the number format of the weight once read.

    The scale of the input is part of an encoding only where kernels that quantise activations may read it. A module
    without one has ``without_input_scale`` of its encoding.
    quant_method: the name in config.json of exports of this kind; empty where they have none.
    """

    name: str
    format: Format
    parts: tuple[PartSpec, ...]
    quant_method: str = ""

    @cached_property
    def without_input_scale(self) -> "Encoding":
        """The same encoding of a module whose input has no scale, or one that nothing reads."""
        parts = tuple(part for part in self.parts if part.role != INPUT_SCALE)
        return self if len(parts) == len(self.parts) else replace(self, parts=parts)

    @cached_property
    def weight(self) -> PartSpec:
        """The part that holds the numbers themselves."""
        return self.part("qdata")

    @cached_property
    def has_input_scale(self) -> bool:
        return any(part.role == INPUT_SCALE for part in self.parts)

    def part(self, role: str) -> PartSpec:
        return next(part for part in self.parts if part.role == role)

    def key(self, module: str, role: str) -> str:
        return f"{module}.{self.part(role).suffix}"

    def keys(self, module: str) -> tuple[str, ...]:
        return tuple(f"{module}.{part.suffix}" for part in self.parts)

    def encode(
        self, module: str, weight: QuantTensor, input_scale: torch.Tensor | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors that store ``weight`` [N, K]; the inverse of reading them through this encoding.

        input_scale: ``None`` leaves it out, as weight-only exports do.

        Errors: CheckpointError when the weight has another format or a part is not given.
        """
        if weight.format != self.format:
            raise CheckpointError(f"{module}: a {weight.format} weight cannot be stored as {self.name}")
        parts = {"qdata": weight.qdata, "scale": weight.scale, "global_scale": weight.global_scale}
        parts["input_scale"] = input_scale
        for part in self.parts:
            tensor = parts[part.role]
            if tensor is None and part.role == INPUT_SCALE:
                continue
            if tensor is None:
                raise CheckpointError(f"{module}.{part.suffix}: {self.name} needs it and none was given")
            yield f"{module}.{part.suffix}", part.stored(tensor)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _scalar(_n: int, _k: int) -> tuple[int, ...]:
    return ()


def _weight(n: int, k: int) -> tuple[int, ...]:
    return n, k


def _packed(n: int, k: int) -> tuple[int, ...]:
    return n, k // 2


def _per_16(n: int, k: int) -> tuple[int, ...]:
    return n, k // 16


def _per_32(n: int, k: int) -> tuple[int, ...]:
    return n, k // 32


def _fp8_blocks(n: int, k: int) -> tuple[int, ...]:
    return _ceil_div(n, 128), _ceil_div(k, 128)


def _mxfp4(name: str, codes: PartSpec, scale: str, quant_method: str = "") -> Encoding:
    return Encoding(name, MXFP4, (codes, PartSpec("scale", scale, ("F8_E8M0",), _per_32)), quant_method)


def _fp8(name: str, scale: str, dtypes: tuple[str, ...], quant_method: str) -> Encoding:
    return Encoding(name, FP8_BLOCK, (_E4M3, PartSpec("scale", scale, dtypes, _fp8_blocks)), quant_method)


def _mxfp8(name: str, scale: str, quant_method: str = "") -> Encoding:
    return Encoding(name, MXFP8, (_E4M3, PartSpec("scale", scale, ("F8_E8M0",), _per_32)), quant_method)


def _plain(name: str, fmt: Format, dtype: str) -> Encoding:
    return Encoding(name, fmt, (PartSpec("qdata", "weight", (dtype,), _weight),))


INPUT_SCALE = "input_scale"
# ModelOpt writes U8; DeepSeek's own packed tensors are I8. The bytes are the same; both are viewed as uint8.
_U8_CODES = PartSpec("qdata", "weight", ("U8", "I8"), _packed)
_I8_CODES = PartSpec("qdata", "weight", ("I8", "U8"), _packed)
_PACKED_CODES = PartSpec("qdata", "weight_packed", ("U8", "I8"), _packed)
_E4M3 = PartSpec("qdata", "weight", ("F8_E4M3",), _weight)
_MODELOPT, _COMPRESSED = "modelopt", "compressed-tensors"

MODELOPT_NVFP4 = Encoding(
    "modelopt-nvfp4",
    NVFP4,
    (
        _U8_CODES,
        PartSpec("scale", "weight_scale", ("F8_E4M3",), _per_16),
        PartSpec("global_scale", "weight_scale_2", FLOATS, _scalar),
        PartSpec(INPUT_SCALE, "input_scale", FLOATS, _scalar),
    ),
    _MODELOPT,
)
# Global scales are written as 2688 / amax, [1] by the library and [] by tools that squeeze it.
COMPRESSED_NVFP4 = Encoding(
    "compressed-tensors-nvfp4",
    NVFP4,
    (
        _PACKED_CODES,
        PartSpec("scale", "weight_scale", ("F8_E4M3",), _per_16),
        PartSpec("global_scale", "weight_global_scale", FLOATS, _scalar, is_divisor=True),
        PartSpec(INPUT_SCALE, "input_global_scale", FLOATS, _scalar, is_divisor=True),
    ),
    _COMPRESSED,
)
NATIVE_FP8 = _fp8("native-fp8-block", "scale", ("F8_E8M0", *FLOATS), "fp8")
COMPRESSED_FP8 = _fp8("compressed-tensors-fp8-block", "weight_scale", ("BF16", "F32", "F16", "F8_E8M0"), _COMPRESSED)
NATIVE_MXFP4 = _mxfp4("native-mxfp4", _I8_CODES, "scale")
COMPRESSED_MXFP4 = _mxfp4("compressed-tensors-mxfp4", _PACKED_CODES, "weight_scale", _COMPRESSED)
MODELOPT_MXFP4 = _mxfp4("modelopt-mxfp4", _U8_CODES, "weight_scale", _MODELOPT)
NATIVE_MXFP8 = _mxfp8("native-mxfp8", "scale")
COMPRESSED_MXFP8 = _mxfp8("compressed-tensors-mxfp8", "weight_scale", _COMPRESSED)
PLAIN_BF16 = _plain("bf16", BF16, "BF16")
PLAIN_FP32 = _plain("fp32", FP32, "F32")
PLAIN_FP16 = _plain("fp16", FP32, "F16")

ENCODINGS = (
    MODELOPT_NVFP4,
    NATIVE_MXFP4,
    NATIVE_FP8,
    COMPRESSED_NVFP4,
    COMPRESSED_FP8,
    COMPRESSED_MXFP4,
    COMPRESSED_MXFP8,
    MODELOPT_MXFP4,
    NATIVE_MXFP8,
    PLAIN_BF16,
    PLAIN_FP32,
    PLAIN_FP16,
)

QUANTIZATION_FIELD = "quantization_config"
"""The field of config.json that describes the weights' storage. Not read here; ``plan.claims`` checks it."""


@dataclass(frozen=True)
class ModuleSpec:
    """A module: the name and logical shape [out, in] of a weight matrix."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter: its full key, shape and the dtypes that it may have in memory.

    dtypes: one of them is F32 or I64, to which every other stored float or integer is widened, without loss.
    """

    key: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """The dtypes that it may have on disk."""
        return TABLES if "I64" in self.dtypes else FLOATS

    def memory_dtype(self, stored: str) -> str:
        """Returns the dtype in memory of a tensor of this dtype on disk."""
        return stored if stored in self.dtypes else self.dtypes[-1]


def check_param(index: CheckpointIndex, spec: ParamSpec) -> None:
    """Checks a parameter. Errors: CheckpointError when the tensor is missing or has another dtype or shape."""
    info = index[spec.key]
    if info.dtype not in spec.stored_dtypes:
        what = "no integer that int64 holds" if "I64" in spec.dtypes else "no float that float32 holds without loss"
        raise CheckpointError(f"tensor {info}: expected {' or '.join(spec.stored_dtypes)}; {info.dtype} is {what}")
    if info.shape != spec.shape:
        raise CheckpointError(f"tensor {info}: expected shape {list(spec.shape)}")


def check_census(
    index: CheckpointIndex, consumed: set[str], unread_reason: Callable[[str], str | None]
) -> dict[str, str]:
    """Checks that every key is consumed or has a reason to be ignored; returns the ignored keys with their reasons.

    unread_reason: gives the reason why a key may stay unread, or ``None`` when there is none.
    Errors: CheckpointError naming a tensor that nothing reads.
    """
    ignored = {}
    for key, info in index.tensors.items():
        if key in consumed:
            continue
        reason = unread_reason(key)
        if reason is None:
            raise CheckpointError(f"tensor {info}: nothing in this model reads it")
        ignored[key] = reason
    return ignored
