"""Checks every tensor of a checkpoint against its config and collects each module's encoding and all problems.

The plan stops at the first wrong tensor; the census runs the same checks (``detect``, ``check_param``,
``unread_reason``) on every module and parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.drafts import Draft
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex, TensorInfo
from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.schema import (
    ENCODINGS,
    Encoding,
    ModuleSpec,
    ParamSpec,
    PartSpec,
    check_param,
    detect,
    num_unlike,
)
from ownpath.config import ModelConfig
from ownpath.finding import Finding
from ownpath.plan.opspec import draft_ops, model_ops


@dataclass(frozen=True)
class StoredModule:
    """A module, its slot and its encoding."""

    spec: ModuleSpec
    slot: str
    encoding: Encoding

    def info(self, index: CheckpointIndex, role: str) -> TensorInfo:
        return index[self.encoding.key(self.spec.name, role)]

    def num_bytes(self, index: CheckpointIndex) -> int:
        return sum(index[key].num_bytes for key in self.encoding.keys(self.spec.name))


@dataclass(frozen=True)
class Census:
    """modules, params: those that are stored correctly. ignored: key -> reason. problems: all that were found."""

    modules: tuple[StoredModule, ...]
    params: tuple[ParamSpec, ...]
    ignored: MappingProxyType[str, str]
    problems: tuple[Finding, ...]


def take_census(config: ModelConfig, index: CheckpointIndex, draft: Draft) -> Census:
    """Detects every module's encoding and finds the reader of every tensor; includes a draft that is read."""
    modules, params, problems = [], [], []
    claimed: set[str] = set()
    ops = chain(model_ops(config), draft_ops(config) if draft.num_modules else ())
    for spec, slot in ((module, op.slot) for op in ops for module in op.modules):
        try:
            stored = StoredModule(spec, slot, detect(index, spec))
        except CheckpointError as error:
            claimed.update(key for encoding in ENCODINGS for key in encoding.keys(spec.name))
            problems += list(_module_problems(index, spec)) or [make_problem("wrong-dtype", spec.name, str(error))]
        else:
            modules.append(stored)
            claimed.update(stored.encoding.keys(spec.name))
    for param in chain(model_params(config), draft_params(config) if draft.num_modules else ()):
        claimed.add(param.key)
        try:
            check_param(index, param)
        except CheckpointError as error:
            problems.append(make_problem(_kind(index, param.key, param.dtypes), param.key, str(error)))
        else:
            params.append(param)
    ignored = {}
    for key, info in index.tensors.items():
        if key in claimed:
            continue
        reason = draft.unread_reason(key)
        if reason is None:
            message = f"tensor {info}: nothing in this model reads it"
            problems.append(make_problem("unexpected-tensor", key, message))
        else:
            ignored[key] = reason
    return Census(tuple(modules), tuple(params), MappingProxyType(ignored), tuple(problems))


def _module_problems(index: CheckpointIndex, spec: ModuleSpec) -> Iterator[Finding]:
    """Yields a problem for each wrong part. Each part is checked alone, with all others replaced by correct ones."""
    encoding = max(ENCODINGS, key=lambda encoding: _likeness(index, encoding, spec))
    for part in encoding.parts:
        key = encoding.key(spec.name, part.role)
        tensors = {info.name: info for info in _perfect_parts(encoding, spec, part)}
        if key in index:
            tensors[key] = index[key]
        try:
            detect(CheckpointIndex(index.folder, MappingProxyType(tensors)), spec)
        except CheckpointError as error:
            yield make_problem(_kind(index, key, part.dtypes), key, str(error))


def _likeness(index: CheckpointIndex, encoding: Encoding, spec: ModuleSpec) -> tuple[bool, int, int]:
    """Scores a module's likeness to ``encoding``: weight dtype first, then the parts present, then their dtypes."""
    weight = index.tensors.get(encoding.key(spec.name, "qdata"))
    keys = encoding.keys(spec.name)
    num_missing = sum(key not in index for key in keys)
    if weight is None:
        return False, len(keys) - 2 * num_missing, -num_unlike(index, encoding, spec)
    is_dtype = weight.dtype in encoding.part("qdata").dtypes
    return is_dtype, len(keys) - 2 * num_missing, -num_unlike(index, encoding, spec)


def _perfect_parts(encoding: Encoding, spec: ModuleSpec, missing: PartSpec) -> Iterator[TensorInfo]:
    for part in encoding.parts:
        if part is not missing:
            key = encoding.key(spec.name, part.role)
            yield TensorInfo(key, part.dtypes[0], part.shape(*spec.shape), Path())


def _kind(index: CheckpointIndex, key: str, dtypes: tuple[str, ...]) -> str:
    if key not in index:
        return "missing-tensor"
    return "wrong-shape" if index[key].dtype in dtypes else "wrong-dtype"
