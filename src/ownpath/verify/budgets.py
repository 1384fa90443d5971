"""Budgets: how far a right engine may be from the oracle, as a multiple of measured noise, for every kind of sub-block.

``budgets.json`` is written by ``tools/measure_budgets.py`` and by nothing else. It holds the effect of rounding alone
on the oracle: relative L2 distances between one layer computed in float64 and the same layer, from the same streams and
with the same choices, rounded as an engine of a dtype rounds. Where that engine's kernels quantise their inputs, both
sides do. docs/verify.md says what was measured and why.

A kind is a slot's name without its layer: ``attn.wq_b``, ``ffn.experts``, ``hc_ffn.h``, ``out``.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("budgets.json")

NOISE_FACTOR = 4.0
"""An engine rounds at the places where the measured oracle did, but sums in another order, with other exponentials, and
has other weights than those that were measured. In bfloat16, the noisiest of 63 cases is 1.1 to 1.3 times the median
for most kinds, 3 for experts and 7 for routing weights. The engine on a CPU, on checkpoints that were not measured,
takes a quarter of the budget."""

FEW_POSITIONS = 1e-3
"""The least share of positions whose best token may differ: float32 changed none of 11,000, but a tie is possible."""

FLOAT64_ROUNDINGS = 2**16
"""Nothing rounds before float64 does, so there is no noise but the order of sums, as in the tests of the forward."""

_LAYER = re.compile(r"^(layers|mtp)\.\d+\.")


class UnknownKind(ValueError):
    """A sub-block without a measured budget."""


@dataclass(frozen=True)
class LogitBudget:
    """Bounds for a whole model's logits over a text of at least a hundred tokens.

    kl: divergence of the engine's distribution from the oracle's at each position, in nats. top1_changed: share of
    positions whose best token differs. nll: difference of the text's mean negative log-likelihood, in nats.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_changed: float
    nll: float


def kind_of(slot: str) -> str:
    """Returns a slot's kind: its name without ``layers.3.`` or ``mtp.0.``."""
    return _LAYER.sub("", slot)


def mode_of(dtype: torch.dtype, is_w4a4: bool = False, is_w8a8: bool = False, is_official: bool = False) -> str:
    """Names the measured arithmetic that is closest to an engine's.

    Where inputs are quantised there is one for all dtypes: a value next to a boundary of E4M3 or E2M1 may be rounded to
    different neighbours on the two sides. In float32 that is rarer than in bfloat16, and as large when it happens.
    """
    if is_official:
        return "bfloat16+official"
    if is_w4a4:
        return "bfloat16+w4a4"
    return "bfloat16+w8a8" if is_w8a8 else str(dtype).removeprefix("torch.")


def budget(
    kind: str, dtype: torch.dtype, is_w4a4: bool = False, is_w8a8: bool = False, is_official: bool = False
) -> float:
    """Returns the largest relative L2 distance from the oracle that noise explains, for an engine of ``dtype``.

    is_w4a4, is_w8a8, is_official: engine and oracle (``Arithmetic``) quantise inputs so.
    Errors: UnknownKind naming a kind or arithmetic that was not measured.
    """
    if dtype is torch.float64:
        return FLOAT64_ROUNDINGS * torch.finfo(dtype).eps
    largest: float = _read_measured("blocks", mode_of(dtype, is_w4a4, is_w8a8, is_official), kind)["largest"]
    return max(NOISE_FACTOR * largest, _one_rounding(dtype))


def logit_budget(
    dtype: torch.dtype, is_w4a4: bool = False, is_w8a8: bool = False, is_official: bool = False
) -> LogitBudget:
    """Returns the bounds of a whole model on its own choices, which differ at near ties: most of the divergence there
    is.

    Errors: UnknownKind naming an arithmetic that was not measured.
    """
    mode = "float32" if dtype is torch.float64 else mode_of(dtype, is_w4a4, is_w8a8, is_official)
    smallest = _one_rounding(torch.float32)
    least = {field.name: smallest for field in fields(LogitBudget)} | {"top1_changed": FEW_POSITIONS}
    return LogitBudget(
        **{
            name: max(NOISE_FACTOR * _read_measured("logits", mode, name)["largest"], floor)
            for name, floor in least.items()
        }
    )


def _one_rounding(dtype: torch.dtype) -> float:
    """Returns the most that one rounding moves a value: the budget where the measured noise is zero."""
    return torch.finfo(dtype).eps / 2


def _read_measured(part: str, mode: str, kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] | None = _file()[part].get(mode, {}).get(kind)
    if found is None:
        raise UnknownKind(f"{kind} in {mode}: no noise was measured ({PATH.name})")
    return found


@lru_cache(maxsize=1)
def _file() -> Mapping[str, Any]:
    read: Mapping[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return read
