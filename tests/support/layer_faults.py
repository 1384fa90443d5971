"""Faults of one loaded layer: each replaces a part of it, or what a runner does, and says what has to be named."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ownpath.attention.interface import AttentionLayer, Projected
from ownpath.attention.reference import ReferenceAttention, ReferenceStep, RequestRows
from ownpath.attention.rope import Rope
from ownpath.attention.select import EntrySelector
from ownpath.cache.keys import StoredKeys
from ownpath.cache.tables import StepTables
from ownpath.model.attention import AttentionCore
from ownpath.trace.observers import Watched
from ownpath.verify.layer import LoadedLayer

Change = Callable[[LoadedLayer], LoadedLayer]


@dataclass(frozen=True)
class Fault:
    """check, where: of the first failure; where is within the layer. ratio: kind of layer it needs, ``None``: any."""

    change: Change
    check: str
    where: str
    layer_idx: int = 1


def in_operand(runner: Any, **fields: Any) -> None:
    """Changes what a torch reference got from ``prepare``: its weights as they are."""
    runner.operand = replace(runner.operand, **fields)


def with_attn(loaded: LoadedLayer, **parts: Any) -> LoadedLayer:
    return replace(loaded, block=replace(loaded.block, attn=replace(loaded.block.attn, **parts)))


def with_core(loaded: LoadedLayer, change: Callable[[AttentionLayer], AttentionLayer]) -> LoadedLayer:
    watched: Any = loaded.block.attn.core
    return with_attn(loaded, core=replace(watched, runner=AttentionCore(change(watched.runner.layer))))


def with_step(kind: type[ReferenceStep]) -> Change:
    """Attention whose steps are of this kind."""

    @dataclass(frozen=True)
    class Backend(ReferenceAttention):
        def prepare(self, tables: StepTables) -> ReferenceStep:
            return kind(tables, super().prepare(tables).requests)

    return lambda loaded: with_attn(loaded, backend=Backend(loaded.plan.config.sliding_window))


def wrapped(watched: Any, change: Callable[..., Any]) -> Watched:
    """The same slot, whose runner is ``change(runner, *args)``."""
    inner = watched.runner
    found: Watched = replace(watched, runner=lambda *args: change(inner, *args))
    return found


def linear(name: str, change: Callable[..., Any]) -> Change:
    """A fault of one of attention's runners."""
    return lambda loaded: with_product(loaded, name, lambda watched: wrapped(watched, change))


def with_product(loaded: LoadedLayer, name: str, change: Callable[[Any], Any]) -> LoadedLayer:
    """One of attention's products changed: a field of it, or one of those that share an input."""
    attn: Any = loaded.block.attn
    if hasattr(attn, name):
        return with_attn(loaded, **{name: change(getattr(attn, name))})
    slot = f"layers.{loaded.layer_idx}.attn.{name}"
    for field in ("queries", "x_products"):
        joint: Any = getattr(attn, field)
        linears = () if joint is None else tuple(_with_part(loaded, one, slot, change) for one in joint.linears)
        if joint is not None and any(new is not old for new, old in zip(linears, joint.linears, strict=True)):
            return with_attn(loaded, **{field: replace(joint, linears=linears)})
    raise AssertionError(f"{slot} is no product")


def _with_part(loaded: LoadedLayer, watched: Any, slot: str, change: Callable[[Any], Any]) -> Any:
    """A slot changed if it is this one, or in the columns that are this one's."""
    if watched.slot == slot:
        return change(watched)
    columns = loaded.plan.ops_of(watched.slot)[0].spec.columns.get(slot)
    if columns is None:
        return watched
    own = change(replace(watched, slot=slot, runner=lambda x: watched.runner(x)[..., columns])).runner

    def changed(_: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = watched.runner(x).clone()
        y[..., columns] = own(x)
        return y

    return wrapped(watched, changed)


def in_ffn(name: str, change: Callable[..., Any]) -> Change:
    def apply(loaded: LoadedLayer) -> LoadedLayer:
        ffn = loaded.block.ffn
        return replace(
            loaded, block=replace(loaded.block, ffn=replace(ffn, **{name: wrapped(getattr(ffn, name), change)}))
        )

    return apply


def boundary(name: str) -> Change:
    """Streams mixed by the transposed matrix."""

    def transposed(runner: Any, *args: Any) -> Any:
        out = runner(*args)
        return out._replace(mix=out.mix._replace(comb_TSS=out.mix.comb_TSS.transpose(1, 2).contiguous()))

    return lambda loaded: replace(
        loaded, block=replace(loaded.block, **{name: wrapped(getattr(loaded.block, name), transposed)})
    )


def wrong_theta(loaded: LoadedLayer) -> LoadedLayer:
    config = loaded.plan.config
    is_compressing = config.compress_ratios[loaded.layer_idx] > 0
    device = loaded.rope.freqs_F.device
    return replace(loaded, rope=Rope.for_layer(config, compressing=not is_compressing, device=device))


def compressor_theta(loaded: LoadedLayer) -> LoadedLayer:
    plain = Rope.for_layer(loaded.plan.config, compressing=False, device=loaded.rope.freqs_F.device)

    def change(layer: AttentionLayer) -> AttentionLayer:
        assert layer.compressor is not None
        return replace(layer, compressor=replace(layer.compressor, rope=plain))

    return with_core(loaded, change)


def index_theta(loaded: LoadedLayer) -> LoadedLayer:
    plain = Rope.for_layer(loaded.plan.config, compressing=False, device=loaded.rope.freqs_F.device)

    def change(layer: AttentionLayer) -> AttentionLayer:
        assert layer.index_compressor is not None
        return replace(layer, index_compressor=replace(layer.index_compressor, rope=plain))

    return with_core(loaded, change)


def no_inverse_rope(runner: Any, o_TNH: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return runner(o_TNH, (torch.ones_like(angles[0]), torch.zeros_like(angles[1])))


def no_bias(loaded: LoadedLayer) -> LoadedLayer:
    router: Any = loaded.block.ffn.router
    in_operand(router.runner, bias_E=torch.zeros_like(router.runner.bias_E))
    return loaded


def bias_in_weights(runner: Any, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> Any:
    """Weights from scores that the bias is in."""
    ids_TK, _ = runner(x_TD, token_ids_T)
    scores = torch.nn.functional.softplus(runner.gate.runner(x_TD)).sqrt() + runner.bias_E
    weights_TK = scores.gather(1, ids_TK.long()).abs()
    return ids_TK, weights_TK / weights_TK.sum(1, keepdim=True) * runner.routed_scaling_factor


def swapped(runner: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = runner(x).chunk(2, dim=-1)
    return torch.cat((up, gate), dim=-1)


def shared_swapped(loaded: LoadedLayer) -> LoadedLayer:
    mlp: Any = loaded.block.ffn.shared_experts
    mlp.w13 = wrapped(mlp.w13, swapped)
    return loaded


def shared_clamp(loaded: LoadedLayer) -> LoadedLayer:
    """No clamp in the shared expert; its inputs made large enough that there is one to miss."""
    mlp: Any = loaded.block.ffn.shared_experts
    mlp._activation.runner.operand = 0.5
    return loaded


def routed_swapped(expert: int) -> Change:
    """Gate and up rows of one expert's stored matrix change places, scales with them."""

    def apply(loaded: LoadedLayer) -> LoadedLayer:
        experts = next(operand for operand in loaded.weights.operands if "w13" in operand.buffers)
        for name in ("w13", "w13_scale"):
            matrix = experts.buffers[name][0][expert].view(torch.uint8)
            matrix.copy_(torch.cat(matrix.chunk(2)[::-1]))
        return loaded

    return apply


def sink_dropped(loaded: LoadedLayer) -> LoadedLayer:
    watched: Any = loaded.block.attn.core
    softmax = watched.runner.layer.softmax
    in_operand(softmax, sink_N=torch.full_like(softmax.sink_N, -torch.inf))
    return loaded


@dataclass(frozen=True)
class ShiftedSelector(EntrySelector):
    """Selects the neighbours of the entries that it should."""

    def select(
        self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, *flags: Any
    ) -> torch.Tensor:
        mask = super().select(q, weights, keys, visible, *flags)
        return mask if len(keys) <= self.topk else mask.roll(1, dims=1)


def indexer_off_by_one(loaded: LoadedLayer) -> LoadedLayer:
    return with_core(loaded, lambda layer: replace(layer, selector=ShiftedSelector(loaded.plan.config.index_topk)))


class EarlyStep(ReferenceStep):
    """Sees entries whose windows are not complete."""

    def _select(self, layer: AttentionLayer, rows: Projected, request: RequestRows) -> torch.Tensor | None:
        if layer.compressor is None:
            return None
        ratio = layer.compressor.ratio
        positions_t1 = self.tables.positions_T[request.rows][:, None] + 3
        entries_C = torch.arange(len(request.entries[ratio].entry_rows), device=positions_t1.device)
        early = replace(request.entries[ratio], visible_tC=entries_C < (positions_t1 + 1) // ratio)
        return super()._select(layer, rows, replace(request, entries={ratio: early}))


class StaleStep(ReferenceStep):
    """Reads the window's oldest cached key in the place of the newest."""

    def _window_keys(self, window: StoredKeys, rows: Projected, request: RequestRows) -> torch.Tensor:
        keys = super()._window_keys(window, rows, request)
        if len(request.window_rows) > 1:
            keys[len(request.window_rows) - 1] = keys[0]
        return keys


class LeftoverStep(ReferenceStep):
    """Adds nothing times the whole window's buffer: rows that nothing has written take part."""

    def _attend(self, layer: AttentionLayer, rows: Projected, request: RequestRows, *mask: Any) -> torch.Tensor:
        pool, slot = self.tables.pool, self.tables.slots[request.request]
        leftover = 0 * pool.layers[layer.layer_idx].window.unflatten(0, (1 + pool.slots.num_slots, -1))[slot].sum()
        return super()._attend(layer, rows, request, *mask) + leftover


class FirstOnlyStep(ReferenceStep):
    """A step's later sequences read the first one's queries."""

    def _attend(self, layer: AttentionLayer, rows: Projected, request: RequestRows, *mask: Any) -> torch.Tensor:
        if request.request:
            rows = replace(rows, q_TNH=rows.q_TNH.roll(1, dims=0))
        return super()._attend(layer, rows, request, *mask)


def raises(runner: Any, *args: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def one_nan_row(runner: Any, x: torch.Tensor) -> torch.Tensor:
    y = runner(x).clone()
    y[-1, 0] = torch.nan
    return y


def one_wrong_row(runner: Any, x: torch.Tensor) -> torch.Tensor:
    y = runner(x).clone()
    y[-1] = 0
    return y


FAULTS = {
    "wrong theta in a CSA layer": Fault(wrong_theta, "V01", "attn.q"),
    "wrong theta in a sliding layer": Fault(wrong_theta, "V01", "attn.q", 0),
    "wrong theta in a compressor": Fault(compressor_theta, "V01", "attn.entries", 2),
    "wrong theta in the indexer's compressor": Fault(index_theta, "V01", "attn.indexer.scores"),
    "no inverse rotation": Fault(linear("wo_a", no_inverse_rope), "V01", "attn.wo_a"),
    "gate.bias dropped": Fault(no_bias, "V01", "ffn.router", 2),
    "gate.bias in the weights": Fault(in_ffn("router", bias_in_weights), "V01", "ffn.router.weights"),
    "hash table read by the next token": Fault(
        in_ffn("router", lambda runner, x, ids: runner(x, ids.roll(1))), "V01", "ffn.router", 0
    ),
    "one expert zeroed": Fault(
        in_ffn("experts", lambda runner, x, ids, weights: runner(x, ids, weights * (ids != 3))), "V01", "ffn.experts.3"
    ),
    "one expert's gate and up swapped": Fault(routed_swapped(5), "V01", "ffn.experts.5"),
    "shared gate and up swapped": Fault(shared_swapped, "V01", "ffn.shared_experts.w13"),
    "another clamp in the shared expert": Fault(shared_clamp, "V01", "ffn.shared_experts.swiglu"),
    "sink dropped": Fault(sink_dropped, "V01", "attn.core"),
    "indexer off by one": Fault(indexer_off_by_one, "V01", "attn.indexer"),
    "incomplete windows seen": Fault(with_step(EarlyStep), "V01", "attn.core", 2),
    "transposed Sinkhorn before attention": Fault(boundary("hc_attn"), "V01", "hc_ffn.x"),
    "transposed Sinkhorn before the experts": Fault(boundary("hc_ffn"), "V01", "out"),
    "a product one percent too large": Fault(linear("wq_b", lambda run, x: 1.01 * run(x)), "V01", "attn.wq_b"),
    "one of several joined products one percent too large": Fault(
        linear("indexer.weights_proj", lambda run, x: 1.01 * run(x)), "V01", "attn.indexer.weights_proj"
    ),
    "a NaN in the last row": Fault(linear("wo_b", one_nan_row), "V01", "attn.wo_b"),
    "the last row not written": Fault(linear("wo_b", one_wrong_row), "V01", "attn.wo_b"),
    "a kernel that raises": Fault(linear("wo_b", raises), "V01", ""),
    "a stale row in the window's cache": Fault(with_step(StaleStep), "V05", ""),
    "unwritten cache rows take part": Fault(with_step(LeftoverStep), "V08", ""),
    "sequences of a step mixed up": Fault(with_step(FirstOnlyStep), "V09", ""),
}
