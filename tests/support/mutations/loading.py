"""Weights that did not arrive as the file has them: what a loader, or what puts weights into layouts, can get wrong."""

import torch

from ownpath.assembly import LoadedPart
from ownpath.kernels.fp8.layout import COLS, ROWS, pack_blocks, row_order, unpack_blocks
from ownpath.weights.load import LoadedWeights
from ownpath.weights.operands import sentinel
from support.mutations.interference import Interference
from support.mutations.mutation import Mutation, on_part, on_slot, on_weights

LAYER = "layers.1"
EXPERTS = f"{LAYER}.ffn.experts"
STAGES = ("load",)


def unwritten(key: str) -> Interference:
    """As if nothing had filled the slot."""

    def refill(weights: LoadedWeights) -> None:
        for operand in weights.operands:
            for slot in operand.destinations:
                if slot.key == key:
                    target = slot.target
                    target.copy_(sentinel(tuple(target.shape), target.dtype, target.device))

    return on_weights(refill)


def experts_shifted(name: str) -> Interference:
    """Expert e holds the matrix of expert e - 1."""

    def shift(weights: LoadedWeights) -> None:
        for operand in weights.operands:
            for buffer in operand.buffers.get(name, ()):
                data = buffer.view(torch.uint8)
                data.copy_(data.roll(1, dims=0))

    return on_weights(shift)


def gate_and_up_exchanged(expert: int) -> Interference:
    def exchange(weights: LoadedWeights) -> None:
        for operand in weights.operands:
            for name in ("w13", "w13_scale"):
                for buffer in operand.buffers.get(name, ()):
                    data = buffer.view(torch.uint8)[expert]
                    data.copy_(torch.cat(data.chunk(2)[::-1]))

    return on_weights(exchange)


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """Rows of scales interleaved as tensor cores take them (32 x 4), where the kernel reads them in order."""
    num_rows = len(scale) // 32 * 32
    inside = scale[:num_rows].unflatten(0, (-1, 32)).transpose(0, 1).flatten(0, 1)
    return torch.cat((inside, scale[num_rows:]))


def blocks_exchanged(part: LoadedPart) -> None:
    """Two pieces of 128 bytes of an expert's packed codes change places, as another swizzle would put them."""
    runner = part.runners.get(EXPERTS)
    if runner is not None:
        pieces = runner.operand.w13.codes.view(8, -1)[5].view(-1, 128)  # type: ignore[attr-defined]
        pieces[:2] = pieces[:2].flip(0)


def dirty_padding(part: LoadedPart) -> None:
    """0x7F, E4M3's NaN, in the rows that only fill a tile up."""
    runner = part.runners.get(f"{LAYER}.attn.wqa_wkv")
    if runner is not None:
        packed = runner.operand.weight  # type: ignore[attr-defined]
        tiles, num_cols = len(packed.blocks), packed.blocks.shape[1] * COLS
        whole = unpack_blocks(packed.blocks, row_order(), tiles * ROWS, num_cols)
        is_outside = (torch.arange(ROWS) >= packed.rows[:, 1, None]).flatten()
        packed.blocks.copy_(pack_blocks(whole.masked_fill(is_outside[:, None], 0x7F), row_order()))


def row_scaled(part: LoadedPart) -> None:
    runner = part.runners.get(f"{LAYER}.attn.wq_b")
    if runner is not None:
        runner.operand.shards[0].global_scale[17] *= 1.001  # type: ignore[attr-defined]


def norm_poisoned(part: LoadedPart) -> None:
    norm = part.weights.params.get(f"{LAYER}.attn_norm.weight")
    if norm is not None:
        norm[9] = torch.nan


def at_load(what: str, check: str, where: str, interference: Interference, **how: object) -> Mutation:
    layer_idx = int(where.split(".")[1]) if where.startswith("layers.") else None
    return Mutation(what, check, where, None, interference, layer_idx, STAGES, **how)  # type: ignore[arg-type]


def slot(what: str, check: str, key: str, change: object, where: str = "", **how: object) -> Mutation:
    return at_load(what, check, where or key, on_slot(key, change), **how)  # type: ignore[arg-type]


def other_nibble_first(codes: torch.Tensor) -> torch.Tensor:
    return codes << 4 | codes >> 4


def one_bit(codes: torch.Tensor) -> torch.Tensor:
    codes[9, 4] ^= 1
    return codes


def matrix(expert: int, name: str, part: str = "weight") -> str:
    return f"{EXPERTS}.{expert}.{name}.{part}"


def zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


MUTATIONS = {
    "half of a fused pair unwritten": at_load(
        "wkv of wqa_wkv", "L01", f"{LAYER}.attn.wkv.weight", unwritten(f"{LAYER}.attn.wkv.weight")
    ),
    "an expert's codes unwritten": at_load("w3", "L01", matrix(2, "w3"), unwritten(matrix(2, "w3"))),
    "an expert's scales unwritten": at_load(
        "w2", "L01", matrix(6, "w2", "weight_scale"), unwritten(matrix(6, "w2", "weight_scale"))
    ),
    "an input scale unwritten": at_load(
        "w1", "L01", matrix(0, "w1", "input_scale"), unwritten(matrix(0, "w1", "input_scale")), is_official=True
    ),
    "expert zeroed": slot("w2's codes", "L02", matrix(6, "w2"), zeros, f"{EXPERTS}.6.w2"),
    "experts shifted by one": at_load("w2 of all experts", "L02", f"{EXPERTS}.4.w2", experts_shifted("w2")),
    "gate and up exchanged": at_load("rows of w13", "L02", f"{EXPERTS}.5.w1", gate_and_up_exchanged(5)),
    "other nibble first": slot("w2's codes", "L02", matrix(1, "w2"), other_nibble_first, f"{EXPERTS}.1.w2"),
    "block scales moved by one": slot(
        "w2's scales", "L02", matrix(2, "w2", "weight_scale"), lambda s: s.roll(1, dims=1), f"{EXPERTS}.2.w2"
    ),
    "scales swizzled for another kernel": slot(
        "w2's scales", "L02", matrix(2, "w2", "weight_scale"), swizzled, f"{EXPERTS}.2.w2"
    ),
    "one bit of one weight": slot("w1's codes", "L02", matrix(7, "w1"), one_bit, f"{EXPERTS}.7.w1"),
    "global scale as a divisor": slot(
        "w2's", "L03", matrix(7, "w2", "weight_scale_2"), lambda g: 1 / g, f"{EXPERTS}.7.w2"
    ),
    "global scale applied twice": slot(
        "w1's", "L03", matrix(3, "w1", "weight_scale_2"), lambda g: g * g, f"{EXPERTS}.3.w1"
    ),
    "one row's factor": at_load("wq_b's in the kernel", "L03", f"{LAYER}.attn.wq_b", on_part(row_scaled)),
    "NaN in a norm, behind the loader": at_load(
        "one weight", "L02", f"{LAYER}.attn_norm.weight", on_part(norm_poisoned)
    ),
    "global scale left out": slot(
        "wq_b's", "L03", f"{LAYER}.attn.wq_b.weight_scale_2", torch.ones_like, f"{LAYER}.attn.wq_b"
    ),
    "gate.bias dropped by the loader": slot("a router's bias", "L02", f"{LAYER}.ffn.gate.bias", zeros),
    "MXFP4 scales copied by value into bytes": slot(
        "w2's E8M0", "L02", matrix(2, "w2", "scale"), zeros, f"{EXPERTS}.2.w2", model="native"
    ),
    "tid2eid moved by one": slot("a table", "L02", "layers.0.ffn.gate.tid2eid", lambda t: t.roll(1, 0)),
    "sinks zeroed": slot("attn_sink", "L02", f"{LAYER}.attn.attn_sink", zeros),
    "hyper-connection's rows reversed": slot("hc_attn_fn", "L02", f"{LAYER}.hc_attn_fn", lambda f: f.flip(0)),
    "ape left out": slot("a compressor's ape", "L02", f"{LAYER}.attn.compressor.ape", zeros),
    "NaN in a norm": slot(
        "one weight", "L01", f"{LAYER}.attn_norm.weight", lambda w: w.index_fill_(0, torch.tensor([9]), torch.nan)
    ),
    "embedding one row off": slot("embed.weight", "L02", "embed.weight", lambda w: w.roll(1, 0)),
    "head negated": slot("head.weight", "L02", "head.weight", lambda w: -w, "head"),
    "wrong swizzle": at_load(
        "packed w13, planned for sm_90",
        "L02",
        f"{EXPERTS}.5.w1",
        on_part(blocks_exchanged),
        device="sm_90",
        model="embedded",
    ),
    "NaN in padding": at_load(
        "wqa_wkv, planned for sm_90",
        "L04",
        f"{LAYER}.attn.wqa_wkv",
        on_part(dirty_padding),
        device="sm_90",
        model="native",
    ),
}
