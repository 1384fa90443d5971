"""Products of FP8 weights from inputs in E4M3: what engines compute that multiply FP8 by FP8.

Rounding a product's input is an engine's choice, and moves the product further than a bound of BF16 allows. So such a
module is held against each of three references, with its input as it is and rounded in two ways, and judged by the
nearest. A factor, another scale or another matrix is near none of them.
"""

from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor

from ownpath.config import Layer
from ownpath.formats import FP8_BLOCK
from ownpath.integrations.vllm.proof.reference import DENSE, SUMMED, TapValues, attention_rows, modules_in
from ownpath.integrations.vllm.proof.shares import LayerShare
from ownpath.oracle.arithmetic import OracleRun
from ownpath.oracle.attention import project_groups
from ownpath.oracle.formats import fp8

ROUNDINGS = MappingProxyType({"E4M3 inputs": False, "E4M3 inputs, powers of two": True})
"""Names in a report -> whether scales are powers of two; else they are amax / 448."""
_BLOCK = 128


def rounded_values(
    layer: Layer, run: OracleRun, v: TapValues, share: LayerShare, is_power_of_two: bool
) -> dict[str, Tensor]:
    """Computes the products of a layer's FP8 weights, each from its own input in E4M3 with a scale for 128 values."""
    wide = {name: value.to(run.stored.dtype) if value.is_floating_point() else value for name, value in v.items()}
    return dict(_products(layer, run, wide, share, is_power_of_two))


def _products(
    layer: Layer, run: OracleRun, v: TapValues, share: LayerShare, is_power_of_two: bool
) -> Iterator[tuple[str, Tensor]]:
    for slot in DENSE:
        modules = modules_in(layer, slot)
        if f"{slot}.in" in v and all(_is_fp8(run, module) for module in modules):
            x = _rounded(v[f"{slot}.in"], is_power_of_two)
            yield slot, run.linear(f"{layer.name}.{slot}", share.only(x) if slot in SUMMED else x, *modules)
    rows = attention_rows(layer, run, v)
    if rows is not None and _is_fp8(run, f"{layer.name}.attn.wo_a"):
        yield "attn.wo_a", project_groups(run, f"{layer.name}.attn", _rounded(rows, is_power_of_two)).flatten(1)


def _is_fp8(run: OracleRun, module: str) -> bool:
    return module in run.encodings and run.encodings[module].format is FP8_BLOCK


def _rounded(x: Tensor, is_power_of_two: bool) -> Tensor:
    """Rounds rows to E4M3; rows that are not finite stay as they are."""
    rounded = fp8(x.nan_to_num(0.0, 0.0, 0.0), _BLOCK, is_power_of_two).to(x.dtype)
    return torch.where(x.isfinite(), rounded, x)
