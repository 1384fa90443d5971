"""Every tensor of a checkpoint held against its config: how each module is stored, and all that does not fit.

The plan stops at the first tensor that is wrong; the census asks the same questions (``detect``, ``check_param``,
``unread_reason``) of every module and collects the answers.
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
    """A weight matrix, the slot it is part of, and how it is stored."""

    spec: ModuleSpec
    slot: str
    encoding: Encoding

    def info(self, index: CheckpointIndex, role: str) -> TensorInfo:
        return index[self.encoding.key(self.spec.name, role)]

    def num_bytes(self, index: CheckpointIndex) -> int:
        return sum(index[key].num_bytes for key in self.encoding.keys(self.spec.name))


@dataclass(frozen=True)
class Census:
    """What fits: modules and params. ignored: key -> reason. problems: all that does not fit."""

    modules: tuple[StoredModule, ...]
    params: tuple[ParamSpec, ...]
    ignored: MappingProxyType[str, str]
    problems: tuple[Finding, ...]


def take_census(config: ModelConfig, index: CheckpointIndex, draft: Draft) -> Census:
    """Asks of every module, those of a draft that is read among them, how it is stored, and of every tensor who reads
    it."""
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
    """One problem for each part that is wrong: each is asked for alone, among parts that are as they should be."""
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
    """How much a module looks like ``encoding``: by its weight's dtype, by which parts are there, by what they are."""
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
