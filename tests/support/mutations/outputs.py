"""Kernels whose weights are right and whose outputs, inputs or memory are not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ownpath.assembly import LoadedPart
from ownpath.runners import PlainLinear
from ownpath.verify.layer import LoadedLayer
from support.layer_faults import with_product
from support.mutations.interference import Interference
from support.mutations.mutation import LOAD_AND_KERNELS, Mutation, around, on_layer, on_part

LAYER = "layers.1"
KERNELS = ("kernels",)
"""For what the load stage would find too: what is told from an output alone."""


def attn(name: str, call: Callable[..., Any]) -> Interference:
    return on_layer(1, lambda loaded: with_product(loaded, name, lambda watched: around(watched, call)))


def experts(call: Callable[..., Any]) -> Interference:
    def change(loaded: LoadedLayer) -> LoadedLayer:
        ffn = loaded.block.ffn
        ffn = replace(ffn, experts=around(ffn.experts, call))
        return replace(loaded, block=replace(loaded.block, ffn=ffn))

    return on_layer(1, change)


def stale_input() -> Callable[..., Any]:
    """An input is copied into the buffer for its number of rows when that is made, and never again."""
    buffers: dict[int, torch.Tensor] = {}

    def call(run: Any, x: torch.Tensor) -> Any:
        kept = buffers.setdefault(len(x), x.clone())
        return run(kept if x.is_floating_point() and kept.shape == x.shape and kept.dtype == x.dtype else x)

    return call


def with_stale_input(loaded: LoadedLayer) -> LoadedLayer:
    return with_product(loaded, "wq_b", lambda watched: around(watched, stale_input()))


def last_row_unwritten(run: Any, x: torch.Tensor) -> torch.Tensor:
    """Of more than 64 rows that fill no tile of 64."""
    y: torch.Tensor = run(x)
    if x.ndim != 2 or len(x) <= 64 or len(x) % 64 == 0:
        return y
    found = torch.empty_like(y)
    found[:-1] = y[:-1]
    return found


def row_by_row(run: Any, x: torch.Tensor) -> torch.Tensor:
    """One row alone goes another way, which is a hundredth too small."""
    y: torch.Tensor = run(x)
    return 0.99 * y if len(x) == 1 else y


def a_nan(run: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = run(x).clone()
    y[-1, 0] = torch.nan
    return y


def groups_exchanged(run: Any, o: torch.Tensor, angles: Any) -> Any:
    return run(o, angles).flip(1)


def raises(run: Any, *args: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


def raises_for_many(run: Any, x: torch.Tensor) -> Any:
    if len(x) > 100:
        raise RuntimeError("no kernel image is available for execution on the device")
    return run(x)


def unrouted(expert: int) -> Callable[..., Any]:
    return lambda run, x, ids, weights: run(x, ids, torch.where(ids == expert, 0.0, weights))


def sent_elsewhere(expert: int, other: int) -> Callable[..., Any]:
    return lambda run, x, ids, weights: run(x, torch.where(ids == expert, other, ids), weights)


def last_row_lost(run: Any, x: torch.Tensor) -> torch.Tensor:
    """Of 33 rows, one more than a tile has."""
    y: torch.Tensor = run(x)
    if len(x) != 33:
        return y
    found = torch.empty_like(y)
    found[:-1] = y[:-1]
    return found


def row_behind_read(run: Any, x: torch.Tensor) -> torch.Tensor:
    """Nothing times the row behind the input, where there is one."""
    y: torch.Tensor = run(x)
    if x.untyped_storage().nbytes() <= x.nbytes:
        return y
    behind = x.as_strided((len(x) + 1, x.shape[1]), x.stride(), x.storage_offset())
    return y + 0 * behind[-1:].sum()


def one_output_negated(run: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = run(x).clone()
    y[..., -3] *= -1
    return y


def in_operand(change: Callable[[Any, Any], object]) -> Mutation:
    """Done to what the experts' kernel holds, of w13 and of w2: codes, block scales, global scales."""

    def changed(part: LoadedPart) -> None:
        runner: Any = part.runners.get(f"{LAYER}.ffn.experts")
        if runner is not None:
            sides = (runner.operand.gate_up, runner.operand.down)
            change(*((side.qdata, side.scale, side.global_scale) for side in sides))

    return Mutation(
        "expert 2 as the kernel holds it", "K01", f"{LAYER}.ffn.experts.2", None, on_part(changed), 1, KERNELS
    )


def halves_exchanged(w13: Any, _w2: Any) -> None:
    for tensor in w13:
        tensor[2] = torch.cat(tensor[2].chunk(2)[::-1])


def scaled(matrix: str) -> Callable[[Any, Any], object]:
    def change(w13: Any, w2: Any) -> None:
        scale = w2[2][2:3] if matrix == "w2" else w13[2][2, int(matrix == "w3")].view(1)
        scale *= 3.0

    return change


def swapped_after_planning(part: LoadedPart) -> None:
    """An unplanned dequantised product, which gives the right values."""
    slot = f"{LAYER}.attn.wq_b"
    if slot in part.runners and part.builder.runners is part.runners:
        part.runners[slot] = _dequantized(part.runners[slot])


def _dequantized(runner: Any) -> PlainLinear:
    plain = PlainLinear(runner(torch.eye(runner.in_features)).T.contiguous())
    plain.stored = runner.stored  # type: ignore[method-assign]
    return plain


def at(what: str, check: str, slot: str, interference: Interference) -> Mutation:
    stages = LOAD_AND_KERNELS if check.startswith("K") else ()
    return Mutation(what, check, f"{LAYER}.{slot}", None, interference, 1, stages)


MUTATIONS = {
    "output one percent too large": at("wq_b", "K01", "attn.wq_b", attn("wq_b", lambda run, x: 1.01 * run(x))),
    "output exactly zero": at(
        "the experts", "K01", "ffn.experts.0", experts(lambda run, *args: torch.zeros_like(run(*args)))
    ),
    "output NaN in one row": at("wo_b", "K01", "attn.wo_b", attn("wo_b", a_nan)),
    "last row unwritten from 65 rows on": at("wo_b", "K01", "attn.wo_b", attn("wo_b", last_row_unwritten)),
    "one row alone differs": at("wo_b, one row at a time", "K01", "attn.wo_b", attn("wo_b", row_by_row)),
    "stale input buffer": at("wq_b reads what came first", "K02", "attn.wq_b", on_layer(1, with_stale_input)),
    "output in BF16": at("wo_b", "K01", "attn.wo_b", attn("wo_b", lambda run, x: run(x).bfloat16().float())),
    "last of 33 rows unwritten": at("wo_b", "K02", "attn.wo_b", attn("wo_b", last_row_lost)),
    "row behind the input read": at("wo_b", "K02", "attn.wo_b", attn("wo_b", row_behind_read)),
    "one output of a fused pair": at("wqa_wkv", "K01", "attn.wkv", attn("wqa_wkv", one_output_negated)),
    "gate and up exchanged in the kernel": in_operand(halves_exchanged),
    "w1 scaled in the kernel": in_operand(scaled("w1")),
    "w3 scaled in the kernel": in_operand(scaled("w3")),
    "w2 scaled in the kernel": in_operand(scaled("w2")),
    "groups exchanged": at("wo_a", "K01", "attn.wo_a", attn("wo_a", groups_exchanged)),
    "expert's output lost": at("expert 5", "K01", "ffn.experts.5", experts(unrouted(5))),
    "tokens sent to another expert": at("expert 4's go to 6", "K01", "ffn.experts.4", experts(sent_elsewhere(4, 6))),
    "kernel raises": at("wo_b", "K01", "attn.wo_b", attn("wo_b", raises)),
    "kernel raises for many rows": at("wq_b", "K01", "attn.wq_b", attn("wq_b", raises_for_many)),
    "runner that refuses nothing": at("wq_b", "K10", "attn.wq_b", attn("wq_b", lambda run, x: run(x.float()))),
    "runner replaced after planning": at("wq_b, dequantised", "LG03", "attn.wq_b", on_part(swapped_after_planning)),
}
