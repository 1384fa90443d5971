"""Reads what a file says about the format of each module: config.json's quantisation section, or ModelOpt's own file.

Three writers have three forms. ModelOpt lists quantised layers and patterns of excluded modules; compressed-tensors has
groups of targets and patterns to ignore; DeepSeek's names FP8 for all projections and the experts' dtype beside it. A
field that no writer is known to write says nothing.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from ownpath.formats import BF16, FP8_BLOCK, FP32, MXFP4, NVFP4

_PLAIN = frozenset({BF16.name, FP32.name})
_MXFP8 = "MXFP8"
_FP8 = frozenset({FP8_BLOCK.name, _MXFP8})
_NOT_NVFP4 = _PLAIN | _FP8 | {MXFP4.name}
ALGORITHMS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "NVFP4": frozenset({NVFP4.name}),
        "FP8_PB_WO": frozenset({FP8_BLOCK.name}),
        "MXFP4": frozenset({MXFP4.name}),
        "MXFP8": frozenset({_MXFP8}),
    }
)
"""ModelOpt's name of an algorithm -> the formats of a module stored with it."""
EXPERT_DTYPES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "fp4": frozenset({MXFP4.name, NVFP4.name}),
        "fp8": _FP8,
        "bf16": frozenset({BF16.name}),
        "bfloat16": frozenset({BF16.name}),
        "float32": frozenset({FP32.name}),
    }
)
_MODELOPT_FIELDS = ("quant_algo", "moe_quant_algo", "quantized_layers", "producer")
_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.w[123]")
_PROJECTION = re.compile(
    r"(layers|mtp)\.\d+\.(attn\.(wq_a|wkv|wq_b|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj)"
)
"""Modules that DeepSeek's releases store in FP8 blocks. ``wo_a`` is too, but converters turn it into BF16."""
_MAX_PATTERN = 300
_SLOW = re.compile(r"\(\?|\\[1-9]|[)}][*+{?]|[*+?}][*+{]|(?:(?<!\\d)[*+{].*){3}|(?:[*+{].*){5}")
"""Forms of a regular expression that can take exponential time, or nearly: such a target says nothing."""


@dataclass(frozen=True)
class Said:
    """A statement of a file about one module. text: the field and its value. formats: names of those that fit it."""

    text: str
    formats: frozenset[str]


class QuantSection:
    """The statements of one file. prefix: what stands before a field's name. fields: the section.

    expert_dtype: of the whole file, where it lies outside the section.
    """

    def __init__(self, prefix: str, fields: Mapping[str, object], expert_dtype: object = None) -> None:
        self._prefix = prefix
        self._fields = fields
        self._outer_dtype = expert_dtype
        self._method = fields.get("quant_method")
        self._is_compressed = self._method == "compressed-tensors"
        self._is_modelopt = any(field in fields for field in _MODELOPT_FIELDS)
        layers = fields.get("quantized_layers")
        self._layers = {_native(key): entry for key, entry in layers.items()} if isinstance(layers, dict) else {}
        self._excluded = [
            (field, pattern)
            for field in ("exclude_modules", "ignore", "modules_to_not_convert", "ignored_layers")
            for pattern in _texts(fields.get(field))
        ]
        self._groups = list(_groups(fields.get("config_groups"))) if self._is_compressed else []

    def said_of(self, name: str) -> Iterator[Said]:
        """Yields every statement that covers the module ``name``."""
        excluded = next(((f, p) for f, p in self._excluded if _matches(p, name, self._is_compressed)), None)
        is_expert = _EXPERT.fullmatch(name) is not None
        yield from self._listed(name, excluded)
        if is_expert:
            yield from self._of_experts()
        if excluded is None:
            yield from self._of_groups(name)
            yield from self._of_method(name, is_expert)

    def _listed(self, name: str, excluded: tuple[str, str] | None) -> Iterator[Said]:
        """Yields what ModelOpt's list, or a pattern of what is left out, says."""
        entry = self._layers.get(name, self._layers.get(f"{name.split('.experts.')[0]}.experts"))
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        if entry is not None:
            if isinstance(algorithm, str) and algorithm in ALGORITHMS:
                yield Said(f"{self._prefix}quantized_layers says {algorithm}", ALGORITHMS[algorithm])
        elif excluded is not None:
            is_of_fp8 = self._method == "fp8" and not self._is_modelopt
            formats = _PLAIN if self._is_compressed or is_of_fp8 else _NOT_NVFP4
            yield Said(f"{self._prefix}{excluded[0]} has {excluded[1]!r}", formats)
        elif self._layers and not (_EXPERT.fullmatch(name) and self._known("moe_quant_algo", ALGORITHMS)):
            yield Said(f"{self._prefix}quantized_layers lists others only", _NOT_NVFP4)
        else:
            uniform = self._known("quant_algo", ALGORITHMS)
            if uniform and name.rpartition(".")[2] not in ("gate", "head"):
                yield uniform

    def _of_experts(self) -> Iterator[Said]:
        found = (self._known("moe_quant_algo", ALGORITHMS), self._known("expert_dtype", EXPERT_DTYPES))
        yield from (said for said in found if said is not None)
        if isinstance(self._outer_dtype, str) and self._outer_dtype in EXPERT_DTYPES:
            yield Said(f"expert_dtype is {self._outer_dtype!r}", EXPERT_DTYPES[self._outer_dtype])

    def _of_groups(self, name: str) -> Iterator[Said]:
        """Yields what compressed-tensors' groups say; those of ModelOpt repeat its list."""
        for group, targets, formats in self._groups:
            target = next((target for target in targets if _matches(target, name, is_compressed=True)), None)
            if target is not None:
                yield Said(f"{self._prefix}config_groups.{group} has the target {target!r}", formats)

    def _of_method(self, name: str, is_expert: bool) -> Iterator[Said]:
        """Yields what "fp8" says: projections in FP8 blocks, experts in FP8 blocks or MXFP4.

        ModelOpt leaves the word beside its own fields, where it concerns what those do not name.
        """
        if self._method == "fp8" and not self._is_modelopt:
            text = f"{self._prefix}quant_method is 'fp8'"
            if is_expert:
                yield Said(text, _FP8 | {MXFP4.name})
            elif _PROJECTION.fullmatch(name):
                yield Said(text, _FP8)

    def _known(self, field: str, meanings: Mapping[str, frozenset[str]]) -> Said | None:
        value = self._fields.get(field)
        if isinstance(value, str) and value in meanings:
            return Said(f"{self._prefix}{field} is {value!r}", meanings[value])
        return None


def _groups(groups: object) -> Iterator[tuple[str, list[str], frozenset[str]]]:
    """Yields compressed-tensors' groups whose number format is known: name, targets and formats."""
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        formats = _group_formats(weights) if isinstance(weights, dict) else None
        if formats is not None:
            yield str(name), _texts(group.get("targets")), formats


def _group_formats(weights: Mapping[str, object]) -> frozenset[str] | None:
    if weights.get("type") != "float":
        return None
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if bits == 4:
        known = {16: NVFP4.name, 32: MXFP4.name}
        return frozenset({known[size]}) if isinstance(size, int) and size in known else None
    if bits != 8:
        return None
    if size == 32:
        return frozenset({_MXFP8})
    return frozenset({FP8_BLOCK.name}) if weights.get("strategy") == "block" else None


def _matches(pattern: str, name: str, is_compressed: bool) -> bool:
    """Tells whether an entry means a module: compressed-tensors' class, name or regular expression; ModelOpt's
    wildcard."""
    if not is_compressed:
        return fnmatchcase(name, _native(pattern)) or name.startswith(f"{_native(pattern)}.")
    if pattern == "Linear":
        return not name.endswith("ffn.gate")  # a parameter of the router's own class
    if not pattern.startswith("re:"):
        return _native(pattern) == name
    expression = pattern.removeprefix("re:")
    if len(expression) > _MAX_PATTERN or _SLOW.search(expression):
        return False
    try:
        return any(re.match(expression, spelled) for spelled in (name, f"model.{name}"))
    except re.error:
        return False


def _native(name: object) -> str:
    return str(name).removeprefix("model.")


def _texts(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
