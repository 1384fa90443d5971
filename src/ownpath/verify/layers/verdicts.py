"""Turns the comparison of one layer into findings: all values within budget, or the first that is not."""

from collections.abc import Iterable, Iterator

from ownpath.finding import Finding, Verdict
from ownpath.verify.layers.choices import Judgement
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement
from ownpath.verify.layers.single_layer import SingleLayer
from ownpath.verify.layers.teacher_forcing import ORDER, LayerComparison

_WITHIN = f"an error of 1 budget over all rows and of {ROW_FACTOR:g} budgets in a single one, and finite values"
_PLACES = {
    "attn.q": "the rotation of queries: theta of this kind of layer, YaRN, which channels",
    "attn.kv": "the rotation of the window's keys, or what they are rounded to",
    "attn.entries": "the compressor: windows, ape, overlap, norm, rotation at a window's first position",
    "attn.indexer.scores": "index queries and keys: their rotation, the compressor, the head weights' scale",
    "attn.core": "the softmax: scale, sink, the window's edge, complete windows, cached rows",
    "attn.wo_a": "the rotation back in front of the product, or the product",
    "attn.reduce": "the exchange that adds up all ranks' parts, or a rank's columns of wo_b",
    "hc_ffn.x": "post and comb that hc_attn made, as the streams take attention's output in",
    "ffn.router.weights": "weights from scores without the bias, their sum, routed_scaling_factor",
    "ffn.experts": "the experts: scales, gate and up, the clamp, the routing weight",
    "ffn.shared_experts.swiglu": "the clamp, gate and up",
    "ffn.reduce": "the exchange that adds up all ranks' parts, or a rank's experts and its part of the shared one",
    "out": "post and comb that hc_ffn made, as the streams take the experts' output in, or the experts' sum",
}
"""Places to look at, by the value that is the first to be off."""
_PRODUCT = "this slot's kernel or its weights: the stages load and kernels look at each alone"
_GROWN = "what multiplies here: a scale applied twice, or not at all"


def verdicts(comparison: LayerComparison, single: SingleLayer) -> Iterator[Finding]:
    """Checks V01 (every value beyond its budget, every wrong choice), V02 (the layer's output), V03 (its
    magnitudes)."""
    layer = single.layer.name
    wrong = dict(_wrong_choices(comparison.choices.entries, comparison.choices.experts, single))
    bad = {measured.slot: measured for measured in comparison.measurements if not measured.is_within}
    root = next((name for name in ORDER if name in bad or name in wrong), "")
    for name in ORDER:
        if name in wrong:
            yield wrong[name]
        if name in bad:
            yield _beyond_budget(bad[name], layer, "" if name == root else root, comparison.expert)
    if not root:
        yield _pass(comparison, layer)
    yield _check_output(comparison.measurements[-1], layer, root)
    yield _check_magnitudes(comparison.measurements, layer)


def _wrong_choices(entries: Judgement | None, experts: Judgement, single: SingleLayer) -> Iterator[tuple[str, Finding]]:
    """Yields wrong choices, by the first value that depends on the choice."""
    layer, kernels = single.layer.name, single.loaded.ledger.kernels
    if entries is not None and entries.num_wrong:
        remedy = "the indexer: which entries are complete, their order, index_topk, lowest index on ties"
        yield "attn.core", _wrong_choice(f"{layer}.attn.indexer", entries, "compressed entries", remedy)
    if experts.num_wrong:
        remedy = "the router: the bias in the choice, num_experts_per_tok, ties, or the table of a hash layer"
        where = f"{layer}.ffn.router"
        yield "ffn.router.weights", _wrong_choice(where, experts, "experts", remedy, kernels[where][1])


def _wrong_choice(where: str, judged: Judgement, what: str, remedy: str, kernel: str = "") -> Finding:
    first = int(judged.wrong_T.nonzero()[0])
    message = f"{judged.num_wrong} of {len(judged.wrong_T)} tokens get other {what} than the scores say, first {first}"
    words = "0 tokens, near ties aside (twice the scores' own distance)"
    return Finding("V01", where, Verdict.FAIL, message, float(judged.num_wrong), words, remedy, kernel)


def _beyond_budget(measured: Measurement, layer: str, root: str, expert: int | None) -> Finding:
    slot = measured.slot
    where = f"{layer}.{slot}" if expert is None or slot != "ffn.experts" else f"{layer}.{slot}.{expert}"
    order = f"follows {layer}.{root}" if root else "the first of this layer beyond its budget"
    only = " (every row off went to this expert)" if where != f"{layer}.{slot}" else ""
    remedy = "" if root else _PLACES.get(slot, _PRODUCT)
    message = f"{order}: {_numbers(measured)}{only}"
    return Finding("V01", where, Verdict.FAIL, message, measured.excess, _WITHIN, remedy, measured.kernel)


def _numbers(measured: Measurement) -> str:
    bad = f", {measured.nonfinite_share:.1%} not finite" if measured.nonfinite_share else ""
    empty = ", all zero" if measured.zero_share == 1 else ""
    rows = f"relative error {measured.rel_l2:.1e}, worst row {measured.worst_row:.1e}, budget {measured.budget:.1e}"
    return f"{rows}, cosine {measured.cosine:.6f}{bad}{empty}"


def _pass(comparison: LayerComparison, layer: str) -> Finding:
    worst = max(comparison.measurements, key=lambda measured: measured.excess)
    chosen = comparison.choices
    ties = chosen.experts.num_differing + (chosen.entries.num_differing if chosen.entries else 0)
    near = f"; {ties} near ties fell to the other side" if ties else ""
    message = f"{len(comparison.measurements)} values; nearest to its budget {worst.slot}: {_numbers(worst)}{near}"
    return Finding("V01", layer, Verdict.PASS, message, worst.excess, _WITHIN, kernel=worst.kernel)


def _check_output(out: Measurement, layer: str, root: str) -> Finding:
    """V02: checks the streams after the layer, when those before it are the reference's."""
    words = f"a relative error of {out.budget:.1e} over all rows, {ROW_FACTOR:g} times that in a single one"
    message = f"given the reference's streams, {_numbers(out)}"
    remedy = f"{layer}.{root} is where it begins" if root != "out" else _PLACES["out"]
    return Finding.judged("V02", layer, out.is_within, message, out.rel_l2, words, remedy)


def _check_magnitudes(measurements: Iterable[Measurement], layer: str) -> Finding:
    """V03: compares largest magnitudes with the reference's."""
    shown = [m for m in measurements if m.reference_amax]
    worst = max(shown, key=lambda m: m.grown / m.budget)
    allowed = ROW_FACTOR * worst.budget
    words = f"within {allowed:.1e} of the reference's, relative"
    by_name = {m.slot: m for m in shown}
    enters, leaves = (by_name[name].amax if name in by_name else 0.0 for name in ("hc_attn.x", "out"))
    largest = max(shown, key=lambda m: m.amax if m.slot not in ("hc_attn.x", "hc_ffn.x", "out") else 0.0)
    message = f"streams {enters:.3g} -> {leaves:.3g}, largest within {largest.amax:.3g} ({largest.slot})"
    if worst.is_as_large:
        return Finding("V03", layer, Verdict.PASS, message, worst.grown, words)
    where = f"{layer}.{worst.slot}"
    message = f"largest magnitude {worst.amax:.4g}, the reference's {worst.reference_amax:.4g}; {message}"
    return Finding("V03", where, Verdict.FAIL, message, worst.grown, words, _GROWN, worst.kernel)


def check_growth(measurements: Iterable[Measurement]) -> Finding:
    """V03 over the depth: reports how the streams' largest magnitude grows, and where most."""
    enters = {m.layer_idx: m.amax for m in measurements if m.slot == "hc_attn.x"}
    leaves = {m.layer_idx: m.amax for m in measurements if m.slot == "out"}
    steps = {idx: leaves[idx] / enters[idx] for idx in leaves if enters.get(idx)}
    if not steps:
        return Finding("V03", "streams", Verdict.SKIPPED, "no layer was compared")
    most = max(steps, key=lambda idx: steps[idx])
    first, last = min(leaves), max(leaves)
    message = f"largest magnitude {enters[first]:.3g} before layers.{first}, {leaves[last]:.3g} behind layers.{last}"
    message = f"{message}; it grows most in layers.{most}, {steps[most]:.3g} times"
    return Finding("V03", "streams", Verdict.PASS, message, steps[most], "reported: a step that no other layer has")
