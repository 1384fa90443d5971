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
from dataclasses import dataclass

import torch

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, NVFP4, Format
from ownpath.qtensor import QuantTensor

ShapeRule = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class PartSpec:
    """One stored tensor of a module: its key suffix, the dtypes it may have, its shape for a weight [N, K].

    dtypes: the first is the one that is written.
    is_divisor: the stored number is the reciprocal of the multiplier.
    other_shapes: further shapes that are read; ``shape`` is the one that is written.
    """

    role: str
    suffix: str
    dtypes: tuple[str, ...]
    shape: ShapeRule
    is_divisor: bool = False
    other_shapes: tuple[tuple[int, ...], ...] = ()

    def meant(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the stored tensor, or for a divisor the multiplier [], by one float32 division."""
        return self.meant_each(stored).reshape(()) if self.is_divisor else stored

    def meant_each(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the stored tensor, or for divisors the multipliers in the same shape."""
        return 1 / stored.float() if self.is_divisor else stored

    def stored(self, meant: torch.Tensor) -> torch.Tensor:
        """Returns the tensor to write: itself, or for a multiplier [] its reciprocal in the part's shape."""
        if self.is_divisor:
            return (1 / meant.float()).reshape(self.shape(0, 0))
        return meant.view(torch.int8) if self.dtypes[0] == "I8" else meant


@dataclass(frozen=True)
class Encoding:
    """One way to store a module; ``format`` is the number format of the weight once read.

    quant_method: the name in config.json of exports of this kind; empty where they have none.
    """

    name: str
    format: Format
    parts: tuple[PartSpec, ...]
    quant_method: str = ""

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

        Errors: CheckpointError when the weight has another format or a part is not given.
        """
        if weight.format != self.format:
            raise CheckpointError(f"{module}: a {weight.format} weight cannot be stored as {self.name}")
        parts = {"qdata": weight.qdata, "scale": weight.scale, "global_scale": weight.global_scale}
        parts["input_scale"] = input_scale
        for part in self.parts:
            tensor = parts[part.role]
            if tensor is None:
                raise CheckpointError(f"{module}.{part.suffix}: {self.name} needs it and none was given")
            yield f"{module}.{part.suffix}", part.stored(tensor)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _scalar(_n: int, _k: int) -> tuple[int, ...]:
    return ()


def _one(_n: int, _k: int) -> tuple[int, ...]:
    return (1,)


def _fp8_blocks(n: int, k: int) -> tuple[int, ...]:
    return _ceil_div(n, 128), _ceil_div(k, 128)


# ModelOpt writes U8; DeepSeek's own packed tensors are I8. The bytes are the same; both are viewed as uint8.
MODELOPT_NVFP4 = Encoding(
    "modelopt-nvfp4",
    NVFP4,
    (
        PartSpec("qdata", "weight", ("U8", "I8"), lambda n, k: (n, k // 2)),
        PartSpec("scale", "weight_scale", ("F8_E4M3",), lambda n, k: (n, k // 16)),
        PartSpec("global_scale", "weight_scale_2", ("F32",), _scalar),
        PartSpec("input_scale", "input_scale", ("F32",), _scalar),
    ),
    "modelopt",
)
NATIVE_FP8 = Encoding(
    "native-fp8-block",
    FP8_BLOCK,
    (
        PartSpec("qdata", "weight", ("F8_E4M3",), lambda n, k: (n, k)),
        PartSpec("scale", "scale", ("F8_E8M0", "F32"), _fp8_blocks),
    ),
    "fp8",
)
NATIVE_MXFP4 = Encoding(
    "native-mxfp4",
    MXFP4,
    (
        PartSpec("qdata", "weight", ("I8", "U8"), lambda n, k: (n, k // 2)),
        PartSpec("scale", "scale", ("F8_E8M0",), lambda n, k: (n, k // 32)),
    ),
)
# Global scales are written as 2688 / amax, [1] by the library and [] by tools that squeeze it.
COMPRESSED_NVFP4 = Encoding(
    "compressed-tensors-nvfp4",
    NVFP4,
    (
        PartSpec("qdata", "weight_packed", ("U8",), lambda n, k: (n, k // 2)),
        PartSpec("scale", "weight_scale", ("F8_E4M3",), lambda n, k: (n, k // 16)),
        PartSpec("global_scale", "weight_global_scale", ("F32",), _one, is_divisor=True, other_shapes=((),)),
        PartSpec("input_scale", "input_global_scale", ("F32",), _one, is_divisor=True, other_shapes=((),)),
    ),
    "compressed-tensors",
)
COMPRESSED_FP8 = Encoding(
    "compressed-tensors-fp8-block",
    FP8_BLOCK,
    (
        PartSpec("qdata", "weight", ("F8_E4M3",), lambda n, k: (n, k)),
        PartSpec("scale", "weight_scale", ("BF16", "F32"), _fp8_blocks),
    ),
    "compressed-tensors",
)
PLAIN_BF16 = Encoding("bf16", BF16, (PartSpec("qdata", "weight", ("BF16",), lambda n, k: (n, k)),))
PLAIN_FP32 = Encoding("fp32", FP32, (PartSpec("qdata", "weight", ("F32",), lambda n, k: (n, k)),))

ENCODINGS = (MODELOPT_NVFP4, NATIVE_MXFP4, NATIVE_FP8, COMPRESSED_NVFP4, COMPRESSED_FP8, PLAIN_BF16, PLAIN_FP32)

QUANTIZATION_FIELD = "quantization_config"
"""The field of config.json that describes the weights' storage. Not read here; ``plan.claims`` checks it."""


@dataclass(frozen=True)
class ModuleSpec:
    """A module: the name and logical shape [out, in] of a weight matrix."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter, used as it is stored: its full key, shape and the dtypes it may have."""

    key: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def detect(index: CheckpointIndex, module: ModuleSpec) -> Encoding:
    """Decides the encoding of ``module`` from its tensors' names, dtypes and shapes.

    Errors: CheckpointError naming the tensor that is missing, or has a dtype or shape no known encoding has.
    """
    encoding = _closest_encoding(index, module)
    block = encoding.format.block
    if block is not None and block[0] == 1 and module.shape[1] % block[1]:
        key = encoding.key(module.name, "qdata")
        raise CheckpointError(f"tensor {key!r}: {encoding.format} cannot hold a width of {module.shape[1]}: "
                              f"its blocks are {block[1]} wide")  # fmt: skip
    for part in encoding.parts:
        key = f"{module.name}.{part.suffix}"
        if key not in index:
            raise CheckpointError(f"{index.folder}: tensor {key!r} is missing ({encoding.name} stores it)")
        info = index[key]
        if info.dtype not in part.dtypes:
            raise CheckpointError(f"tensor {info}: {encoding.name} stores {' or '.join(part.dtypes)}")
        expected = part.shape(*module.shape)
        if info.shape != expected and info.shape not in part.other_shapes:
            raise CheckpointError(f"tensor {info}: a weight {list(module.shape)} needs shape {list(expected)}")
    return encoding


def _closest_encoding(index: CheckpointIndex, module: ModuleSpec) -> Encoding:
    """Returns the encoding whose weight tensor is there with its dtype and which misses the fewest other parts."""
    candidates = []
    found = []
    for encoding in ENCODINGS:
        weight = encoding.part("qdata")
        info = index.tensors.get(f"{module.name}.{weight.suffix}")
        if info is not None:
            found.append(info)
            if info.dtype in weight.dtypes:
                candidates.append(encoding)
    for encoding in candidates:
        if not _num_missing(index, encoding, module) and not num_unlike(index, encoding, module):
            return encoding
    if not candidates and found:
        known = ", ".join(f"{encoding.name} {'/'.join(encoding.part('qdata').dtypes)}" for encoding in ENCODINGS)
        raise CheckpointError(f"tensor {found[0]}: no known encoding has this dtype (known: {known})")
    # Without a weight tensor, the scales tell which encoding was meant.
    return min(candidates or ENCODINGS, key=lambda e: (_num_missing(index, e, module), num_unlike(index, e, module)))


def _num_missing(index: CheckpointIndex, encoding: Encoding, module: ModuleSpec) -> int:
    return sum(key not in index for key in encoding.keys(module.name))


def num_unlike(index: CheckpointIndex, encoding: Encoding, module: ModuleSpec) -> int:
    """Counts an encoding's tensors that are there with another dtype or shape than it stores."""
    found = [(part, index.tensors.get(f"{module.name}.{part.suffix}")) for part in encoding.parts]
    return sum(
        info.dtype not in part.dtypes or info.shape not in (part.shape(*module.shape), *part.other_shapes)
        for part, info in found
        if info is not None
    )


def check_param(index: CheckpointIndex, spec: ParamSpec) -> None:
    """Checks a parameter. Errors: CheckpointError when the tensor is missing or has another dtype or shape."""
    info = index[spec.key]
    if info.dtype not in spec.dtypes:
        raise CheckpointError(f"tensor {info}: expected {' or '.join(spec.dtypes)}")
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
