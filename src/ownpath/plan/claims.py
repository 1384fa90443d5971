"""Compares what files claim about formats with the tensors: contradictions are reported, and the tensors win.

Exports differ in what they write there, and third parties copy a config from one export to another. An absent or null
field claims nothing, and neither does a value that no export is known to write.
"""

from collections.abc import Iterable, Iterator, Mapping

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.schema import ENCODINGS, QUANTIZATION_FIELD, Encoding, ModuleSpec
from ownpath.formats import FP8_BLOCK
from ownpath.plan.sections import QuantSection

EncodedModule = tuple[ModuleSpec, Encoding]

EXPERT_DTYPE = "expert_dtype"
COMPARED_FIELDS = frozenset({QUANTIZATION_FIELD, EXPERT_DTYPE})
"""Fields of config.json that decide nothing and are compared with the tensors."""


def config_section(claims: Mapping[str, object]) -> QuantSection:
    """Returns what config.json says of formats. claims: its fields."""
    return QuantSection(f"{QUANTIZATION_FIELD}.", _section(claims), claims.get(EXPERT_DTYPE))


def find_contradictions(
    claims: Mapping[str, object], modules: Iterable[EncodedModule], index: CheckpointIndex
) -> tuple[str, ...]:
    """Returns a line for each claim of config.json that contradicts tensors; it names the field and the first of them.

    claims: the fields of config.json. modules: every module with its encoding.
    """
    listed = tuple(modules)
    section = _section(claims)
    found = [
        *_method(section, listed),
        *section_contradictions(config_section(claims), listed),
        *_fp8(section, [module for module in listed if module[1].format is FP8_BLOCK], index),
    ]
    return tuple(f"config.json: {line}" for line in found)


def section_contradictions(section: QuantSection, modules: Iterable[EncodedModule]) -> Iterator[str]:
    """Yields a line for each statement that does not fit the tensors, with how many modules it does not fit."""
    found: dict[tuple[str, str], list[EncodedModule]] = {}
    for module, encoding in modules:
        for said in section.said_of(module.name):
            if encoding.format.name not in said.formats:
                found.setdefault((said.text, encoding.name), []).append((module, encoding))
    for (text, _), unlike in found.items():
        module, encoding = unlike[0]
        stored = f"{module.name!r} is stored as {encoding.format} ({encoding.name})"
        yield f"{text}, but {stored}{_and_more(len(unlike))}"


def differing_sections(ours: QuantSection, theirs: QuantSection, names: Iterable[str]) -> Iterator[str]:
    """Yields a line for each two statements that no format fits; the first is of ``ours``."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for one in ours.said_of(name):
            for other in theirs.said_of(name):
                if not one.formats & other.formats:
                    found.setdefault((one.text, other.text), []).append(name)
    for (one_text, other_text), unlike in found.items():
        yield f"config.json: {one_text}, but {other_text}, of {unlike[0]!r}{_and_more(len(unlike))}"


def _and_more(count: int) -> str:
    return "" if count == 1 else f" and {count - 1} more alike"


def _section(claims: Mapping[str, object]) -> Mapping[str, object]:
    nested = claims.get(QUANTIZATION_FIELD)
    return nested if isinstance(nested, dict) else {}


def _method(quantization: Mapping[str, object], modules: tuple[EncodedModule, ...]) -> Iterator[str]:
    """Yields a method of which nothing is there; "fp8" is compared module by module."""
    method = quantization.get("quant_method")
    expected = [encoding for encoding in ENCODINGS if encoding.quant_method and encoding.quant_method == method]
    if method != "fp8" and expected and not any(encoding.quant_method == method for _, encoding in modules):
        names = " or ".join(encoding.name for encoding in expected)
        yield f"{QUANTIZATION_FIELD}.quant_method is {method!r}, but no tensor is stored as {names}"


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
