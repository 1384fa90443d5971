"""The values that each module of a layer should have given, computed from what that module got inside vLLM.

Every value starts from the engine's own inputs of that one module, so an error shows where it is made and nowhere else.
The formulas are the oracle's. Where a hyper-connection is a function that nobody can tap, it is judged by what it is
given and what the next part gets.

Legend: T rows of all steps, D hidden, S streams, N heads, H head dim, K experts a token, C entries, I index heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ownpath.config import CSA_RATIO, Layer
from ownpath.integrations.vllm.proof.shares import WHOLE, LayerShare
from ownpath.oracle.arithmetic import OracleRun
from ownpath.oracle.attention import attend, entries_of, in_cache, norm_heads, project_groups
from ownpath.oracle.experts import route, routed_experts
from ownpath.oracle.formulas import Mixing, rotate_to, swiglu, write_streams

TapValues = Mapping[str, Tensor]
ORDER = (
    "hc_attn.h",
    "attn.wqa_wkv",
    "attn.q_norm",
    "attn.kv_norm",
    "attn.wq_b",
    "attn.q",
    "attn.compressor.wkv_wgate",
    "attn.indexer.wq_b",
    "attn.indexer.weights_proj",
    "attn.indexer.compressor.wkv_wgate",
    "attn.core",
    "attn.wo_a",
    "attn.wo_b",
    "attn.wo_b.sum",
    "hc_ffn.x",
    "hc_ffn.h",
    "ffn.gate",
    "ffn.router.weights",
    "ffn.experts",
    "ffn.shared_experts.w13",
    "ffn.shared_experts.swiglu",
    "ffn.shared_experts.w2",
    "ffn.sum",
    "out",
)
"""A layer's values in the order in which they are made; ``attn.wo_b.sum`` is the sum over ranks, where there are
several."""
DENSE = MappingProxyType(
    {
        "attn.wqa_wkv": ("wq_a", "wkv"),
        "attn.wq_b": ("wq_b",),
        "attn.wo_b": ("wo_b",),
        "attn.indexer.wq_b": ("wq_b",),
        "ffn.shared_experts.w13": ("w1", "w3"),
        "ffn.shared_experts.w2": ("w2",),
    }
)
"""Products of rows -> the matrices side by side, by their names beside each other."""
SUMMED = ("attn.wo_b", "ffn.shared_experts.w2")
"""Products of which each rank computes a part of the sum."""


@dataclass(frozen=True)
class SequencePart:
    """Rows of one sequence in one step. rows: their places among all rows of all steps. history: the places of all rows
    of that sequence from position 0 to the last of these, by position."""

    rows: Tensor
    history: Tensor


def found_values(layer: Layer, run: OracleRun, v: TapValues) -> dict[str, Tensor]:
    """Returns the engine's values of a layer, by our names, as far as they were tapped."""
    config, found = run.config, {name: v[name] for name in ORDER if name in v}
    heads = config.num_attention_heads
    for name in ("attn.q", "attn.core"):
        if name in found:  # vLLM pads the heads
            found[name] = found[name][:, :heads]
    renamed = {
        "hc_attn.h": "attn.in",
        "attn.q_norm": "attn.wq_b.in",
        "attn.wo_a": "attn.wo_b.in",
        "hc_ffn.h": "ffn.in",
        "ffn.shared_experts.swiglu": "ffn.shared_experts.w2.in",
        "ffn.sum": "ffn.out",
    }
    found |= {name: v[key] for name, key in renamed.items() if key in v}
    if "leave.residual" in v:
        found["hc_ffn.x"] = v["leave.residual"]
    if "attn.wo_b.part" in v and "attn.wo_b.sum.parts" in v:
        found |= {"attn.wo_b": v["attn.wo_b.part"], "attn.wo_b.sum": v["attn.wo_b"]}
    if "leave.x" in v:
        found["out"] = _streams(v, "leave", config.hc_mult)
    return found


def reference_values(
    layer: Layer, run: OracleRun, v: TapValues, segments: Sequence[SequencePart] | None, share: LayerShare = WHOLE
) -> dict[str, Tensor]:
    """Computes the values that can be computed from what was tapped. segments: ``None``: no sequence is whole, so that
    nothing can be said of attention. share: of the rank; what it adds to a sum is its part alone."""
    wide = {name: value.to(run.stored.dtype) if value.is_floating_point() else value for name, value in v.items()}
    made: dict[str, Tensor] = {}
    for part in (_boundaries, _projections, _attention, _feed_forward):
        made |= dict(part(layer, run, wide, segments, share))
    return made


Made = Iterator[tuple[str, Tensor]]


def _streams(v: TapValues, side: str, num_streams: int) -> Tensor:
    """Returns the streams that enter or leave a layer; mixes the last output in where the engine has not done it."""
    x = v[f"{side}.x"]
    if f"{side}.residual" in v:
        x_TD, residual_TSD, post, comb = (v[f"{side}.{name}"].double() for name in ("x", "residual", "post", "comb"))
        return write_streams(residual_TSD, x_TD, post.flatten(1), comb)
    return x[:, None].repeat(1, num_streams, 1) if x.ndim == 2 else x


def _boundaries(layer: Layer, run: OracleRun, v: TapValues, *_: object) -> Made:
    if "enter.x" not in v:
        return
    streams = run.config.hc_mult
    x_TSD = run.arithmetic.round(_streams(v, "enter", streams).to(run.stored.dtype))
    mixing, logits = _mixing(run, f"{layer.name}.hc_attn", x_TSD)
    norm = f"{layer.name}.attn_norm.weight"
    yield "hc_attn.h", run.read_streams(f"{layer.name}.hc_attn", norm, x_TSD, mixing.pre(logits, streams))
    if "attn.out" not in v:
        return
    middle = write_streams(x_TSD, v["attn.out"], mixing.post(logits, streams), mixing.comb(logits, streams))
    middle = run.arithmetic.round(middle)
    yield "hc_ffn.x", middle
    tapped = v.get("hc_ffn.x", v.get("leave.residual"))
    middle = middle if tapped is None else tapped.to(run.stored.dtype)
    mixing, logits = _mixing(run, f"{layer.name}.hc_ffn", middle)
    norm = f"{layer.name}.ffn_norm.weight"
    yield "hc_ffn.h", run.read_streams(f"{layer.name}.hc_ffn", norm, middle, mixing.pre(logits, streams))
    if "ffn.out" in v:
        out = write_streams(middle, v["ffn.out"], mixing.post(logits, streams), mixing.comb(logits, streams))
        yield "out", run.arithmetic.round(out)


def _mixing(run: OracleRun, slot: str, x_TSD: Tensor) -> tuple[Mixing, Tensor]:
    mixing = run.mixing(slot)
    return mixing, mixing.logits(x_TSD)


def _projections(
    layer: Layer, run: OracleRun, v: TapValues, _: Sequence[SequencePart] | None, share: LayerShare
) -> Made:
    """Products, and the norms between them; the products of compressors read what the attention gets."""
    name = f"{layer.name}.attn"
    for slot in DENSE:
        if f"{slot}.in" in v:
            x = v[f"{slot}.in"]
            x = share.only(x) if slot in SUMMED else x
            yield slot, run.linear(f"{layer.name}.{slot}", x, *modules_in(layer, slot))
    if "attn.wo_b.sum.parts" in v:
        yield "attn.wo_b.sum", run.arithmetic.round(v["attn.wo_b.sum.parts"])
    if "attn.indexer.weights_proj.in" in v:
        slot = f"{name}.indexer.weights_proj"
        yield "attn.indexer.weights_proj", run.linear(slot, v["attn.indexer.weights_proj.in"], slot)
    for compressor in ("compressor", "indexer.compressor"):
        if f"{name}.{compressor}.wkv" in run.encodings and "attn.in" in v:
            modules = (f"{name}.{compressor}.wkv", f"{name}.{compressor}.wgate")
            slot = f"attn.{compressor}.wkv_wgate"
            yield slot, run.linear(f"{layer.name}.{slot}", v["attn.in"], *modules)
    if "attn.wqa_wkv" in v:
        qr, kv = v["attn.wqa_wkv"].split((run.config.q_lora_rank, run.config.head_dim), -1)
        yield "attn.q_norm", run.norm(f"{name}.q_norm", qr, f"{name}.q_norm.weight")
        yield "attn.kv_norm", run.norm(f"{name}.kv_norm", kv, f"{name}.kv_norm.weight")


def _attention(
    layer: Layer, run: OracleRun, v: TapValues, segments: Sequence[SequencePart] | None, _: LayerShare
) -> Made:
    config, name = run.config, f"{layer.name}.attn"
    heads = (config.num_attention_heads, config.head_dim)
    if "attn.wq_b" in v and "positions" in v:
        q = norm_heads(run, f"{name}.q_head_norm", v["attn.wq_b"].unflatten(-1, heads))
        yield "attn.q", run.arithmetic.round(rotate_to(q, v["positions"], config, layer.ratio))
    needed = {"attn.q", "attn.kv_norm", "positions"} | ({"attn.compressor.wkv_wgate"} if layer.ratio else set())
    needed |= {"attn.entry_ids"} if layer.ratio == CSA_RATIO else set()
    if segments is not None and needed <= v.keys():
        yield "attn.core", _core(layer, run, v, segments)
    rows = attention_rows(layer, run, v)
    if rows is not None:
        yield "attn.wo_a", project_groups(run, name, rows).flatten(1)


def modules_in(layer: Layer, slot: str) -> tuple[str, ...]:
    """Returns the matrices of one of ``DENSE``."""
    return tuple(f"{layer.name}.{slot.rpartition('.')[0]}.{matrix}" for matrix in DENSE[slot])


def attention_rows(layer: Layer, run: OracleRun, v: TapValues) -> Tensor | None:
    """Returns what ``wo_a`` multiplies, [T, N, H]: attention's output, rotated back; ``None``: it is not tapped."""
    o = v.get("attn.o", v.get("attn.core"))
    if o is None or "positions" not in v:
        return None
    o = o[:, : run.config.num_attention_heads]
    return run.arithmetic.round(rotate_to(o, v["positions"], run.config, layer.ratio, inverse=True))


def _core(layer: Layer, run: OracleRun, v: TapValues, segments: Sequence[SequencePart]) -> Tensor:
    """Attends, row by row, to the sequence's keys as its own steps made them: [T, N, H]."""
    config, name, ratio = run.config, f"{layer.name}.attn", layer.ratio
    q = v["attn.q"][:, : config.num_attention_heads]
    out, sink = torch.zeros_like(q), run.stored.param(f"{name}.attn_sink")
    for segment in segments:
        positions, history = v["positions"][segment.rows], segment.history
        keys = rotate_to(v["attn.kv_norm"][history], v["positions"][history], config, ratio)
        keys = in_cache(run, run.arithmetic.round(keys))
        age = positions[:, None] - torch.arange(len(keys), device=q.device)
        visible = (age >= 0) & (age < config.sliding_window)
        if ratio:
            products = v["attn.compressor.wkv_wgate"][history]
            entries = in_cache(run, entries_of(run, f"{name}.compressor", products, ratio))
            seen = torch.arange(len(entries), device=q.device) < ((positions + 1) // ratio)[:, None]
            if ratio == CSA_RATIO:
                seen &= chosen_entries(v["attn.entry_ids"][segment.rows], len(entries))
            keys, visible = torch.cat((keys, entries)), torch.cat((visible, seen), 1)
        out[segment.rows] = attend(run, q[segment.rows], keys, visible, sink)
    return run.arithmetic.round(out)


def chosen_entries(ids_TK: Tensor, num_entries: int) -> Tensor:
    """Returns the entries that ids name, bool [T, C]; -1 names none."""
    ids_TK = ids_TK.long()
    ids_TK = torch.where((ids_TK >= 0) & (ids_TK < num_entries), ids_TK, num_entries)
    chosen = torch.zeros(len(ids_TK), num_entries + 1, dtype=torch.bool, device=ids_TK.device)
    return chosen.scatter_(1, ids_TK, True)[:, :num_entries]


def _feed_forward(
    layer: Layer, run: OracleRun, v: TapValues, _: Sequence[SequencePart] | None, share: LayerShare
) -> Made:
    name, config = f"{layer.name}.ffn", run.config
    if "ffn.gate.in" in v:
        yield "ffn.gate", run.linear(f"{name}.gate", v["ffn.gate.in"], f"{name}.gate")
    if "ffn.gate" in v and "token_ids" in v:
        ids_TK = v.get("ffn.router.ids")
        ids_TK, weights_TK = route(run, layer, v["ffn.gate"], v["token_ids"], ids_TK)
        yield "ffn.router.weights", weights_TK
        if "ffn.experts.in" in v:
            weights_TK = v.get("ffn.router.weights", weights_TK)
            if share.experts is not None:
                weights_TK = weights_TK * torch.isin(ids_TK, torch.tensor(sorted(share.experts), device=ids_TK.device))
            y_TD = routed_experts(run, name, v["ffn.experts.in"], ids_TK.long(), weights_TK, share.only_width)
            yield "ffn.experts", run.arithmetic.round(y_TD)
    if "ffn.shared_experts.w13" in v:
        gate, up = v["ffn.shared_experts.w13"].chunk(2, -1)
        yield "ffn.shared_experts.swiglu", run.arithmetic.round(swiglu(gate, up, config.swiglu_limit))
    if "ffn.sum.parts" in v:
        yield "ffn.sum", run.arithmetic.round(v["ffn.sum.parts"])
    elif "ffn.experts" in v and "ffn.shared_experts.w2" in v:
        yield "ffn.sum", run.arithmetic.round(v["ffn.experts"] + v["ffn.shared_experts.w2"])


def found_ends(v: TapValues) -> dict[str, Tensor]:
    """Returns the engine's values outside all layers."""
    names = {"embed": "embed", "hc_head": "norm", "head": "head"}
    return {name: v[key] for name, key in names.items() if key in v}


def reference_ends(run: OracleRun, v: TapValues, last: TapValues) -> dict[str, Tensor]:
    """Computes embedding and last boundary. last: the last layer's values, whose streams that boundary gets."""
    config, made = run.config, dict[str, Tensor]()
    if "token_ids" in v:
        made["embed"] = run.arithmetic.round(run.stored.rows("embed.weight", v["token_ids"].long()))
    if "leave.x" in last:
        x_TSD = run.arithmetic.round(_streams(last, "leave", config.hc_mult).to(run.stored.dtype))
        mixing, logits = _mixing(run, "hc_head", x_TSD)
        made["hc_head"] = run.read_streams("hc_head", "norm.weight", x_TSD, mixing.pre(logits, config.hc_mult))
    return made


def reference_logits(run: OracleRun, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Computes the head's product of each step's rows; its matrix, of 2 GB at V4's size, is decoded once."""
    rows = torch.cat(list(inputs)).to(run.stored.dtype)
    return list(run.linear("head", rows, "head").split([len(part) for part in inputs]))
