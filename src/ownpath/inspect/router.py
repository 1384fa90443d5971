"""Checks the inputs of expert choice: tables that name one expert twice, and biases that were lost."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ownpath.checkpoint.dtypes import TABLES, TORCH_DTYPES
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.problems import make_problem
from ownpath.checkpoint.schema import ParamSpec
from ownpath.finding import Finding
from ownpath.inspect.tensor_bytes import read_values

_BIAS = re.compile(r".+\.ffn\.gate\.bias")


@dataclass(frozen=True)
class RouterBias:
    """One layer's router bias. num_ties: experts whose bias equals another one's, bit by bit."""

    key: str
    num_experts: int
    largest: float
    num_ties: int
    is_constant: bool
    is_finite: bool


def read_biases(
    params: Iterable[ParamSpec], index: CheckpointIndex, broken: frozenset[Path], problems: list[Finding]
) -> tuple[RouterBias, ...]:
    """Reads every router bias; shards that cannot be read are added to ``problems``."""
    keys = [param.key for param in params if _BIAS.fullmatch(param.key)]
    biases = []
    for info, data in read_values((index[key] for key in keys), broken, problems):
        values = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).float()
        _, counts = values.unique(return_counts=True)
        num_ties = int(counts[counts > 1].sum())
        largest = float(values.abs().amax())
        is_finite = bool(torch.isfinite(values).all())
        biases.append(RouterBias(info.name, len(values), largest, num_ties, len(counts) == 1, is_finite))
    return tuple(biases)


def bias_problems(biases: Iterable[RouterBias]) -> Iterator[Finding]:
    """Yields biases that are not finite, and those that are constant while other layers' are not.

    Where every layer's is constant, the model was trained without one.
    """
    listed = list(biases)
    is_used = any(not bias.is_constant for bias in listed)
    for bias in listed:
        if not bias.is_finite:
            yield make_problem("router-bias", bias.key, f"tensor {bias.key!r} holds NaN or infinity")
        elif bias.is_constant and is_used and bias.num_experts > 1:
            yield make_problem(
                "router-bias", bias.key, f"tensor {bias.key!r} is the same for all experts; others are not"
            )


def repeated_ids(
    params: Iterable[ParamSpec], index: CheckpointIndex, broken: frozenset[Path], problems: list[Finding]
) -> Iterator[Finding]:
    """Yields tables of expert ids in which a token has one expert twice."""
    tables = [index[param.key] for param in params if index[param.key].dtype in TABLES]
    for info, data in read_values(tables, broken, problems):
        ids = (
            torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).long().view(info.shape).sort(dim=1).values
        )
        repeats = (ids[:, 1:] == ids[:, :-1]).any(dim=1)
        if repeats.any():
            where = f"{int(repeats.sum())} of {len(ids)} tokens have an expert twice, the first is token"
            yield make_problem("expert-ids", info.name, f"tensor {info}: {where} {int(repeats.nonzero()[0])}")
