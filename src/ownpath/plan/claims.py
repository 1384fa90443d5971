"""Compares config.json's claims about formats with the tensors: contradictions are reported, and the tensors win.

Exports differ in what they write there, and third parties copy a config from one export to another. An absent or null
field claims nothing, and neither does a value that no export is known to write.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ENCODINGS, QUANTIZATION_FIELD, Encoding, ModuleSpec
from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, MXFP8, NVFP4, Format

EncodedModule = tuple[ModuleSpec, Encoding]

COMPARED_FIELDS = frozenset({QUANTIZATION_FIELD, "expert_dtype"})
"""Fields of config.json that decide nothing and are compared with the tensors."""

_EXPERT_DTYPES: Mapping[str, tuple[Format, ...]] = MappingProxyType(
    {"fp4": (MXFP4, NVFP4), "fp8": (FP8_BLOCK, MXFP8), "bf16": (BF16,), "bfloat16": (BF16,), "float32": (FP32,)}
)
_EXPERT_ALGORITHMS: Mapping[str, tuple[Format, ...]] = MappingProxyType({"NVFP4": (NVFP4,), "MXFP4": (MXFP4,)})


def find_contradictions(
    claims: Mapping[str, object],
    experts: Iterable[EncodedModule],
    others: Iterable[EncodedModule],
    index: CheckpointIndex,
) -> tuple[str, ...]:
    """Returns a line for each field of config.json that contradicts the tensors; it names both.

    claims: the fields of config.json. experts, others: routed experts' and all other modules with their encodings.
    """
    experts, others = tuple(experts), tuple(others)
    nested = claims.get(QUANTIZATION_FIELD)
    quantization = nested if isinstance(nested, dict) else {}
    found = [
        *_method(quantization, (*experts, *others)),
        *_experts(quantization, "moe_quant_algo", _EXPERT_ALGORITHMS, experts, prefix=f"{QUANTIZATION_FIELD}."),
        *_experts(quantization, "expert_dtype", _EXPERT_DTYPES, experts, prefix=f"{QUANTIZATION_FIELD}."),
        *_experts(claims, "expert_dtype", _EXPERT_DTYPES, experts),
        *_fp8(quantization, [module for module in (*experts, *others) if module[1].format is FP8_BLOCK], index),
    ]
    return tuple(f"config.json: {line}" for line in found)


def _method(quantization: Mapping[str, object], modules: tuple[EncodedModule, ...]) -> Iterator[str]:
    method = quantization.get("quant_method")
    expected = [encoding for encoding in ENCODINGS if encoding.quant_method and encoding.quant_method == method]
    if expected and not any(encoding.quant_method == method for _, encoding in modules):
        names = " or ".join(encoding.name for encoding in expected)
        yield f"{QUANTIZATION_FIELD}.quant_method is {method!r}, but no tensor is stored as {names}"


def _experts(
    fields: Mapping[str, object],
    field: str,
    known: Mapping[str, tuple[Format, ...]],
    experts: tuple[EncodedModule, ...],
    prefix: str = "",
) -> Iterator[str]:
    value = fields.get(field)
    expected = known.get(value) if isinstance(value, str) else None
    other = next((stored for stored in experts if expected and stored[1].format not in expected), None)
    if other is not None:
        module, encoding = other
        yield f"{prefix}{field} is {value!r}, but {module.name!r} is stored as {encoding.format} ({encoding.name})"


def _fp8(quantization: Mapping[str, object], fp8: list[EncodedModule], index: CheckpointIndex) -> Iterator[str]:
    block = quantization.get("weight_block_size")
    if fp8 and block is not None and block != [128, 128]:
        yield f"{QUANTIZATION_FIELD}.weight_block_size is {block!r}, but {fp8[0][0].name!r} has a scale per 128 x 128"
    if quantization.get("scale_fmt") != "ue8m0":
        return
    for module, encoding in fp8:
        info = index[encoding.key(module.name, "scale")]
        if info.dtype != "F8_E8M0":
            yield f"{QUANTIZATION_FIELD}.scale_fmt is 'ue8m0', but the scale {info.name!r} is {info.dtype}"
            return
