"""Loaded layers with a wrong part: rotations, choices, caches, mixes. The weights arrived as they are in the file."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.attention.reference import ReferenceAttention, ReferenceStep
from ownpath.attention.rope import Rope, Rotation
from ownpath.attention.select import EntrySelector
from ownpath.formats import CacheFormat
from ownpath.runners import SwigluMlp
from ownpath.verify.layer import LoadedLayer
from support.layer_faults import FAULTS, in_operand, with_attn, with_core, with_product, with_step
from support.mutations.mutation import LAYERS, LOAD_AND_KERNELS, Mutation, around, on_layer

LAYER = "layers.1"
IN_LAYERS = (".indexer", *(f"layers.{layer_idx}" for layer_idx in range(3)))
"""Places that no kernel alone is called in."""
Change = Callable[[LoadedLayer], LoadedLayer]


def known(name: str, what: str, check: str, where: str) -> Mutation:
    """A fault that the layers stage alone is tested with; here every stage runs, and an earlier one may find it."""
    fault = FAULTS[name]
    return changed(what, check, f"layers.{fault.layer_idx}.{where}".rstrip("."), fault.change)


def changed(what: str, check: str, where: str, change: Change) -> Mutation:
    """where: with its layer."""
    layer_idx = int(where.split(".")[1])
    stages = LOAD_AND_KERNELS if check.startswith("K") else LAYERS if where.endswith(IN_LAYERS) else ()
    return Mutation(what, check, where, None, on_layer(layer_idx, change), layer_idx, stages)


def with_block(loaded: LoadedLayer, **parts: Any) -> LoadedLayer:
    return replace(loaded, block=replace(loaded.block, **parts))


def without_yarn(loaded: LoadedLayer) -> LoadedLayer:
    config = replace(loaded.plan.config, yarn=None)
    return replace(loaded, rope=Rope.for_layer(config, compressing=True, device=loaded.rope.freqs_F.device))


@dataclass(frozen=True)
class HalfSplit(Rotation):
    """Turns channel i with channel i + R/2 instead of its neighbour."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return _half_split(super().apply, x, 2 * self.cos_TF.shape[1])

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        return _half_split(super().invert, x, 2 * self.cos_TF.shape[1])


def _half_split(turn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_rotary: int) -> torch.Tensor:
    head, tail = x[..., :-num_rotary], x[..., -num_rotary:]
    paired = tail.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned = turn(torch.cat((head, paired), -1))[..., -num_rotary:]
    return torch.cat((head, turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)), -1)


@dataclass(frozen=True)
class HalfSplitRope(Rope):
    def at(self, positions_T: torch.Tensor) -> Rotation:
        return HalfSplit(*super().at(positions_T).angles)


def half_split(loaded: LoadedLayer) -> LoadedLayer:
    return replace(loaded, rope=HalfSplitRope(loaded.rope.freqs_F))


@dataclass(frozen=True)
class IndexRope(Rope):
    """Compressed entries turned by their place in the cache instead of their window's first position."""

    def at(self, positions_T: torch.Tensor) -> Rotation:
        return super().at(positions_T // 4)


def pool_positions(loaded: LoadedLayer) -> LoadedLayer:
    def change(layer: AttentionLayer) -> AttentionLayer:
        assert layer.compressor is not None
        return replace(layer, compressor=replace(layer.compressor, rope=IndexRope(layer.compressor.rope.freqs_F)))

    return with_core(loaded, change)


def window_moved(by: int) -> Change:
    return lambda loaded: with_attn(loaded, backend=ReferenceAttention(loaded.plan.config.sliding_window + by))


def softmax_scaled(loaded: LoadedLayer) -> LoadedLayer:
    """YaRN's mscale, 0.1 ln(factor) + 1, which V4 does not apply, in the softmax scale."""
    core: Any = loaded.block.attn.core
    softmax = core.runner.layer.softmax
    in_operand(softmax, softmax_scale=1.277 * softmax.softmax_scale)
    return loaded


def scaling_lost(loaded: LoadedLayer) -> LoadedLayer:
    router: Any = loaded.block.ffn.router
    in_operand(router.runner, routed_scaling_factor=1.0)
    return loaded


def reads_token_0(loaded: LoadedLayer) -> LoadedLayer:
    ffn = loaded.block.ffn
    router = around(ffn.router, lambda run, x, ids: run(x, torch.zeros_like(ids)))
    return with_block(loaded, ffn=replace(ffn, router=router))


def no_clamp_in_shared(loaded: LoadedLayer) -> LoadedLayer:
    mlp: Any = loaded.block.ffn.shared_experts
    mlp._activation.runner.operand = 1e30
    return loaded


def no_clamp_in_routed(loaded: LoadedLayer) -> LoadedLayer:
    experts: Any = loaded.block.ffn.experts
    in_operand(experts.runner, swiglu_limit=1e30)
    return loaded


def no_shared_expert(loaded: LoadedLayer) -> LoadedLayer:
    """The layer's output without it; the expert itself is right."""

    class Silent:
        __module__ = SwigluMlp.__module__  # slots are looked for in the package's own objects

        def __init__(self, mlp: Any) -> None:
            self.w13, self.w2, self._activation = mlp.w13, mlp.w2, mlp._activation
            self._mlp = mlp

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * self._mlp(x)

    ffn: Any = loaded.block.ffn
    return with_block(loaded, ffn=replace(ffn, shared_experts=Silent(ffn.shared_experts)))


def one_sinkhorn_round(loaded: LoadedLayer) -> LoadedLayer:
    boundary: Any = loaded.block.hc_ffn
    in_operand(boundary.runner, num_iters=1)
    return loaded


def narrow_mix(loaded: LoadedLayer) -> LoadedLayer:
    def rounded(run: Any, *args: Any) -> Any:
        out = run(*args)
        return out._replace(mix=out.mix._replace(comb_TSS=out.mix.comb_TSS.bfloat16().float()))

    return with_block(loaded, hc_attn=around(loaded.block.hc_attn, rounded))


def comb_in_bfloat16(loaded: LoadedLayer) -> LoadedLayer:
    def rounded(run: Any, *args: Any) -> Any:
        out = run(*args)
        return out._replace(mix=out.mix._replace(comb_TSS=out.mix.comb_TSS.bfloat16()))

    return with_block(loaded, hc_attn=around(loaded.block.hc_attn, rounded))


def comb_read_transposed(loaded: LoadedLayer) -> LoadedLayer:
    def transposed(run: Any, x: Any, y: Any, mix: Any) -> Any:
        return run(x, y, mix and mix._replace(comb_TSS=mix.comb_TSS.mT))

    return with_block(loaded, hc_attn=around(loaded.block.hc_attn, transposed))


def hidden_keys_seen(loaded: LoadedLayer) -> LoadedLayer:
    softmax: Any = loaded.block.attn.core.runner.layer.softmax  # type: ignore[attr-defined]
    run = softmax.run
    softmax.run = lambda q, keys, visible: run(q, keys, torch.ones_like(visible))
    return loaded


def narrow_streams(loaded: LoadedLayer) -> LoadedLayer:
    def rounded(run: Any, *args: Any) -> Any:
        out = run(*args)
        return out._replace(x_TSD=out.x_TSD.bfloat16().float())

    return with_block(loaded, hc_ffn=around(loaded.block.hc_ffn, rounded))


def without(norm: str) -> Change:
    return lambda loaded: with_attn(loaded, **{norm: around(getattr(loaded.block.attn, norm), lambda run, x: x)})


def wrong_eps(loaded: LoadedLayer) -> LoadedLayer:
    norm: Any = loaded.block.attn.q_norm
    in_operand(norm.runner, eps=1e-2)
    return loaded


@dataclass(frozen=True)
class Selector(EntrySelector):
    """One that selects as ``chosen`` says."""

    chosen: Callable[..., torch.Tensor]

    def select(self, *args: Any) -> torch.Tensor:
        return self.chosen(EntrySelector(self.topk), *args[:4])


def selecting(chosen: Callable[..., torch.Tensor]) -> Change:
    def change(loaded: LoadedLayer) -> LoadedLayer:
        selector = Selector(loaded.plan.config.index_topk, chosen)
        return with_core(loaded, lambda layer: replace(layer, selector=selector))

    return change


def one_too_few(right: EntrySelector, q: Any, weights: Any, keys: Any, visible: torch.Tensor) -> torch.Tensor:
    if len(keys) <= right.topk:
        return visible
    return EntrySelector(right.topk - 1).select(q, weights, keys, visible)


def without_relu(
    right: EntrySelector, q: torch.Tensor, weights: torch.Tensor, keys: Any, visible: torch.Tensor
) -> torch.Tensor:
    if len(keys) <= right.topk:
        return visible
    scores = ((q @ keys.T) * weights[..., None]).sum(1).masked_fill(~visible, -torch.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : right.topk]
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible


def overlap_reversed(loaded: LoadedLayer) -> LoadedLayer:
    """The halves of each token's channels exchanged: this window's serve the next one's entry."""

    def swapped(run: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = run(x).unflatten(-1, (4, -1))[..., [1, 0, 3, 2], :].flatten(-2)
        return y

    return with_product(loaded, "compressor.wkv_wgate", lambda watched: around(watched, swapped))


class UnkeptStep(ReferenceStep):
    """A step of one token does not write its key: the ring keeps the one of a window ago."""

    def write_rows(self, layer: AttentionLayer, rows: Projected) -> None:
        window = self.tables.pool.layers[layer.layer_idx].window
        before = window.clone()
        super().write_rows(layer, rows)
        if len(rows.kv_TH) == 1:
            window.copy_(before)


class UnroundedStep(ReferenceStep):
    """A step attends to its own keys as they are computed, not as the caches keep them."""

    def attend(self, layer: AttentionLayer, rows: Projected) -> torch.Tensor:
        return self._attend_to(layer, rows)


def on_pages(mutation: Mutation) -> Mutation:
    """The same on the embedded model, whose keys fit FP8 pages."""
    return replace(mutation, model="embedded", cache_format=CacheFormat.FP8, stages=("kernels",))


MUTATIONS = {
    "another theta in a CSA layer": known("wrong theta in a CSA layer", "its rotation", "K07", "attn rotation"),
    "another theta in a sliding layer": known("wrong theta in a sliding layer", "its rotation", "K07", "attn rotation"),
    "another theta in a compressor": known(
        "wrong theta in a compressor", "HCA entries' rotation", "K07", "attn.compressor rotation"
    ),
    "another theta in the indexer": known(
        "wrong theta in the indexer's compressor", "index keys' rotation", "K07", "attn.indexer.compressor rotation"
    ),
    "YaRN left out": changed("a CSA layer's rotation", "K07", f"{LAYER}.attn rotation", without_yarn),
    "mscale in the softmax scale": changed(
        "YaRN's 1.277, which V4 has not", "K09", f"{LAYER}.attn.core", softmax_scaled
    ),
    "half-split rotation": changed("channels i and i + R/2 as pairs", "K07", f"{LAYER}.attn rotation", half_split),
    "entries turned by their index": changed(
        "compressed entries' positions", "K07", f"{LAYER}.attn.compressor rotation", pool_positions
    ),
    "no inverse rotation": known("no inverse rotation", "what wo_a undoes", "K07", "attn.wo_a"),
    "gate.bias dropped in the router": known("gate.bias dropped", "the selection", "K05", "ffn.router"),
    "gate.bias in the weights": known("gate.bias in the weights", "the weights", "K05", "ffn.router"),
    "routed_scaling_factor is 1": changed("the router's weights", "K05", f"{LAYER}.ffn.router", scaling_lost),
    "hash layer reads token 0": changed("the table's row", "K05", "layers.0.ffn.router", reads_token_0),
    "no clamp in the shared expert": changed("swiglu_limit", "K06", f"{LAYER}.ffn.shared_experts", no_clamp_in_shared),
    "no clamp in the routed experts": changed("swiglu_limit", "K06", f"{LAYER}.ffn.experts.0", no_clamp_in_routed),
    "shared gate and up exchanged": known(
        "shared gate and up swapped", "halves of w13's output", "K01", "ffn.shared_experts.w13"
    ),
    "shared expert not added": changed("the layer's output", "K06", f"{LAYER}.ffn.shared_experts", no_shared_expert),
    "transposed Sinkhorn before attention": known("transposed Sinkhorn before attention", "comb", "K08", "hc_attn"),
    "transposed Sinkhorn before the experts": known("transposed Sinkhorn before the experts", "comb", "K08", "hc_ffn"),
    "one round of Sinkhorn": changed("hc_sinkhorn_iters", "K08", f"{LAYER}.hc_ffn", one_sinkhorn_round),
    "mix rounded to BF16": changed("comb", "K08", f"{LAYER}.hc_attn", narrow_mix),
    "mix in BF16": changed("comb's dtype", "K08", f"{LAYER}.hc_attn", comb_in_bfloat16),
    "streams mixed the wrong way": changed(
        "comb, as streams are written", "K08", f"{LAYER}.hc_attn", comb_read_transposed
    ),
    "streams rounded to BF16": changed("the residual streams", "K08", f"{LAYER}.hc_ffn", narrow_streams),
    "key norm left out": changed("kv_norm", "V01", f"{LAYER}.attn.kv_norm", without("kv_norm")),
    "query head norm left out": changed("q_head_norm", "V01", f"{LAYER}.attn.q_head_norm", without("q_head_norm")),
    "another eps": changed("q_norm's, 1e-2 for 1e-6", "K01", f"{LAYER}.attn.q_norm", wrong_eps),
    "sink dropped": known("sink dropped", "the softmax's sum", "K09", "attn.core"),
    "hidden keys seen": changed("the mask", "K09", f"{LAYER}.attn.core", hidden_keys_seen),
    "window one too long": changed("sliding_window", "K09", f"{LAYER}.attn.core", window_moved(1)),
    "window one too short": changed("sliding_window", "K09", f"{LAYER}.attn.core", window_moved(-1)),
    "incomplete windows seen": known("incomplete windows seen", "HCA's mask", "V01", "attn.core"),
    "indexer off by one": known("indexer off by one", "picked entries", "V01", "attn.indexer"),
    "indexer picks one too few": changed("index_topk", "V01", f"{LAYER}.attn.indexer", selecting(one_too_few)),
    "indexer without its ReLU": changed("index scores", "V01", f"{LAYER}.attn.indexer", selecting(without_relu)),
    "overlapping windows reversed": changed(
        "halves of a compressor's rows", "K01", f"{LAYER}.attn.compressor.wkv_wgate", overlap_reversed
    ),
    "stale key row": known("a stale row in the window's cache", "the ring's newest row", "K09", "attn.core"),
    "decoded keys not kept": changed("the ring, in steps of one token", "V05", LAYER, with_step(UnkeptStep)),
    "prompt's keys not rounded to FP8": on_pages(
        changed("a step's own keys", "K09", "layers.1.attn.core", with_step(UnroundedStep))
    ),
    "unwritten cache rows take part": known("unwritten cache rows take part", "the window's buffer", "V08", ""),
    "sequences of a step mixed up": known("sequences of a step mixed up", "later sequences' queries", "V09", ""),
}
