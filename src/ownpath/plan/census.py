"""Checks every tensor of a checkpoint against its config and collects each module's encoding and all problems.

The plan stops at the first wrong tensor; the census runs the same checks (``examine``, ``check_param``,
``unread_reason``) on every module and parameter.
"""

from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

from ownpath.checkpoint.detect import examine, tensors_of
from ownpath.checkpoint.drafts import Draft
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.names import draft_params, model_params
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.schema import Encoding, ModuleSpec, ParamSpec, check_param
from ownpath.checkpoint.tensor_info import TensorInfo
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
    """Detects every module's encoding and finds the reader of every tensor; includes a draft that is read.

    Every tensor of a module that is stored wrongly is accounted for by the module's own problems.
    """
    modules, params, problems = [], [], []
    claimed: set[str] = set()
    ops = chain(model_ops(config), draft_ops(config) if draft.num_modules else ())
    for spec, slot in ((module, op.slot) for op in ops for module in op.modules):
        examined = examine(index, spec)
        if examined.faults:
            problems += [make_problem(fault.check, fault.where, fault.message) for fault in examined.faults]
            claimed.update(info.name for info in tensors_of(index, spec.name))
        else:
            modules.append(StoredModule(spec, slot, examined.encoding))
            claimed.update(examined.encoding.keys(spec.name))
    for param in chain(model_params(config), draft_params(config) if draft.num_modules else ()):
        claimed.add(param.key)
        try:
            check_param(index, param)
        except CheckpointError as error:
            problems.append(make_problem(_kind(index, param), param.key, str(error)))
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


def _kind(index: CheckpointIndex, param: ParamSpec) -> str:
    if param.key not in index:
        return "missing-tensor"
    return "wrong-shape" if index[param.key].dtype in param.stored_dtypes else "wrong-dtype"
