"""Checks the hash layers' tables of expert ids."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ownpath.checkpoint.dtypes import TABLES, TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.schema import ParamSpec
from ownpath.finding import Finding
from ownpath.inspect.tensor_bytes import read_values


def table_problems(
    params: Iterable[ParamSpec], num_experts: int, index: CheckpointIndex, broken: frozenset[Path]
) -> Iterator[Finding]:
    """Yields tables that name experts which do not exist. Every id is read: 6 MB a layer of V4-Flash."""
    unreadable: list[Finding] = []
    tables = [index[param.key] for param in params if index[param.key].dtype in TABLES]
    for info, data in read_values(tables, broken, unreadable):
        ids = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).long()
        outside = (ids < 0) | (ids >= num_experts)
        if outside.any():
            first = int(outside.nonzero()[0])
            where = f"{int(outside.sum())} of {len(ids)} ids are outside 0..{num_experts - 1}"
            row, column = divmod(first, info.shape[1])
            message = f"tensor {info}: {where}, the first ({int(ids[first])}) at {[row, column]}"
            yield make_problem("expert-ids", info.name, message)
    yield from unreadable
