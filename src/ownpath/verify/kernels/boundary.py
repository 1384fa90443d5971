"""K08: the hyper-connections' boundaries: Sinkhorn's sums, the streams' sums, what goes in and what is kept.

Legend: T tokens, S streams, D hidden, M mixing weights.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ownpath.ops import OpKind
from ownpath.runners import Mix
from ownpath.verify.finding import Finding
from ownpath.verify.kernels.calls import streams
from ownpath.verify.kernels.compare import Deviation, Exact, deviation
from ownpath.verify.kernels.limits import EXP_STEPS, FLOAT32_ROUND, rounding, summing
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.report import Tally, error_of
from ownpath.verify.reference.arithmetic import Arithmetic, Scope
from ownpath.verify.reference.hyper import read_streams, write_streams

ROWS, MANY_ROWS = (1, 2, 16, 17, 33), (1, 2, 16, 17, 33, 256, 257, 1024)
REMEDY = "comb[from, to]: rows are the streams that are read, columns those that are written; sums in float32"


def check_boundaries(probe: Probe) -> Iterator[Finding]:
    """K08 of every boundary."""
    for slot in probe.slots_of(OpKind.HYPER):
        tally = Tally("K08", slot, "streams, mixing weights and normed input in float64", REMEDY)
        kernel = probe.kernels[slot]
        for num_rows in MANY_ROWS if probe.is_cuda else ROWS:
            try:
                for what, found in _compared(probe, slot, num_rows):
                    tally.add(slot, kernel, found, f"{num_rows} tokens, {what}: {found}")
            except Exception as error:  # whatever a kernel can raise is what is looked for
                tally.fail(slot, kernel, f"{num_rows} tokens: {error_of(error)}")
        yield from tally.findings()


def _compared(probe: Probe, slot: str, num_rows: int) -> Iterator[tuple[str, Deviation]]:
    """(what, how far off) for each part of one boundary's results."""
    x_TSD, y_TD, mix = streams(probe, slot, num_rows)
    out = probe.slots[slot](x_TSD, y_TD, mix)
    yield "streams", deviation(out.x_TSD, _written(x_TSD, y_TD, mix))
    if not bool(out.x_TSD.isfinite().all()):
        return
    # What is read is what was written: its own streams, so that one error is not counted twice.
    x_TSD = out.x_TSD.double()
    logits_T1 = _logits(probe, slot, x_TSD)
    if out.mix is not None:
        scope = Scope.of(probe.stored, probe.part.plan, Arithmetic(narrow=probe.dtype))
        _, post_TS, comb_TSS = read_streams(scope, slot, _norm_key(slot), x_TSD)
        yield from _mixed(probe, out.mix, Mix(post_TS, comb_TSS), logits_T1)
    yield "normed input", deviation(out.h_TD, _normed(probe, slot, x_TSD, logits_T1))


def _norm_key(slot: str) -> str:
    name = slot.removesuffix("hc_head") + "norm" if slot.endswith("hc_head") else slot.replace(".hc_", ".") + "_norm"
    return f"{name}.weight"


def _written(x_TSD: Tensor, y_TD: Tensor, mix: Mix) -> Exact:
    """New streams: a sum of S + 1 products."""
    post, comb, x, y = mix.post_TS.double(), mix.comb_TSS.double(), x_TSD.double(), y_TD.double()
    terms = write_streams(x.abs(), y.abs(), post.abs(), comb.abs())
    return Exact(write_streams(x, y, post, comb), summing(x.shape[1] + 1) * terms)


def _logits(probe: Probe, slot: str, x_TSD: Tensor) -> Tensor:
    """By how much the mixing logits, scaled, may be off: the largest of each token, [T, 1]."""
    x = x_TSD.flatten(1)
    fn, scale = probe.stored.param(f"{slot}_fn"), probe.stored.param(f"{slot}_scale")
    rms = x.square().mean(-1, keepdim=True).add(probe.config.rms_norm_eps).sqrt()
    sums = (x.abs() @ fn.abs().T) / rms * summing(x.shape[1])
    values = (x @ fn.T).abs() / rms
    return ((sums + 8 * FLOAT32_ROUND * values) * scale.abs().amax()).amax(-1, keepdim=True)


def _mixed(probe: Probe, found: Mix, exact: Mix, logits_T1: Tensor) -> Iterator[tuple[str, Deviation]]:
    """Weights of the streams.

    A logit's error d changes a sigmoid by d / 4. It changes an entry of comb by a factor of exp(4 d) at most: softmax
    by exp(2 d), and each of Sinkhorn's sums by no more than what the entries are off by, twice over. Each of its steps
    adds a sum of S and a quotient.
    """
    num_streams = exact.post_TS.shape[1]
    post = Exact(exact.post_TS, logits_T1 / 2 + EXP_STEPS * FLOAT32_ROUND * exact.post_TS)
    yield f"post in {found.post_TS.dtype}", _wide(found.post_TS, post)
    steps = EXP_STEPS + 2 * probe.config.hc_sinkhorn_iters * (num_streams + 1)
    relative_T11 = (torch.expm1(4 * logits_T1) + steps * FLOAT32_ROUND)[..., None]
    yield f"comb in {found.comb_TSS.dtype}", _wide(found.comb_TSS, Exact(exact.comb_TSS, relative_T11 * exact.comb_TSS))
    # Sinkhorn ends with columns: they sum to 1 but for eps in the divisor.
    sums_TS = found.comb_TSS.double().sum(1)
    bound = torch.full_like(sums_TS, 2 * num_streams * probe.config.hc_eps + 2 * num_streams * FLOAT32_ROUND)
    yield "comb's sums over the streams read", deviation(sums_TS, Exact(torch.ones_like(sums_TS), bound))


def _wide(found: Tensor, exact: Exact) -> Deviation:
    """Weights that mix streams stay at least float32."""
    if found.dtype.itemsize < 4:
        return Deviation(float("inf"), (), 0.0, 0.0)
    return deviation(found, exact)


def _normed(probe: Probe, slot: str, x_TSD: Tensor, logits_T1: Tensor) -> Exact:
    """The collapsed streams, rounded once, then their norm, whose divisor is off by no more than they are."""
    config, stored, s = probe.config, probe.stored, probe.config.hc_mult
    flat = x_TSD.flatten(1)
    mixes = (flat @ stored.param(f"{slot}_fn")[:s].T) * flat.square().mean(-1, keepdim=True).add(
        config.rms_norm_eps
    ).rsqrt()
    pre_TS = torch.sigmoid(mixes * stored.param(f"{slot}_scale")[0] + stored.param(f"{slot}_base")[:s]) + config.hc_eps
    h_TD = (pre_TS[..., None] * x_TSD).sum(1)
    weights_T1 = logits_T1 / 4 + (EXP_STEPS + s) * FLOAT32_ROUND
    error_TD = x_TSD.abs().sum(1) * weights_T1 + rounding(probe.dtype) * h_TD.abs()
    root_T1 = h_TD.square().mean(-1, keepdim=True).add(config.rms_norm_eps).sqrt()
    divisor_T1 = error_TD.square().mean(-1, keepdim=True).sqrt() / root_T1 + EXP_STEPS * FLOAT32_ROUND
    gain_TD = stored.param(_norm_key(slot)) / root_T1
    return Exact(h_TD * gain_TD, (error_TD + h_TD.abs() * divisor_T1) * gain_TD.abs())
