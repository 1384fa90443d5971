"""Runs the whole model on its own streams: the embedding, and the distance of its final distribution."""

from dataclasses import dataclass

import torch

from ownpath.finding import Finding
from ownpath.model.block import Residual
from ownpath.model.ranks import Product
from ownpath.runners import HyperBoundary
from ownpath.verify.layer import in_no_layer, load_part
from ownpath.verify.layers.measure import ROW_FACTOR, Measurement, dtype_name
from ownpath.verify.layers.oracle import Oracle

_ROWS = 256
"""Rows whose logits are computed at once: those of a long text over a whole vocabulary are gigabytes."""
_REMEDY_DRIFT = (
    "no single value needs to be off: compare V01's numbers from layer to layer, and the sampler's input with "
    "`ownpath diff`"
)


@torch.inference_mode()
def embed_text(oracle: Oracle) -> Residual:
    """Returns the engine's streams before the first layer. Errors: as ``load_weights``."""
    subject = oracle.subject
    part = load_part(subject, lambda name: name == "embed.weight")
    h_TD = part.weights.params["embed.weight"][oracle.token_ids_T].to(subject.engine.dtype)
    return Residual.of_embedding(h_TD, subject.config.hc_mult)


def check_embedding(engine: Residual, reference_TSD: torch.Tensor, oracle: Oracle) -> tuple[Finding, Measurement]:
    """V01 of the embedding: at most one rounding away."""
    allowed = torch.finfo(oracle.subject.engine.dtype).eps / 2
    dtypes = "", dtype_name(engine.x_TSD.dtype)
    measured = Measurement.of(-1, "embed", (engine.x_TSD, reference_TSD), allowed, dtypes=dtypes)
    message, words = f"relative error {measured.rel_l2:.1e}", "the error of one rounding"
    remedy = "embed.weight: its rows, or the ids"
    finding = Finding.judged("V01", "embed", measured.is_within, message, measured.excess, words, remedy)
    return finding, measured


@dataclass(frozen=True)
class ModelEnds:
    """The boundary and the head, which follow the last layer."""

    hc_head: HyperBoundary
    head: Product
    kernel: str

    @classmethod
    def of(cls, oracle: Oracle) -> "ModelEnds":
        """Loads both. Errors: as ``load_weights``."""
        belongs = in_no_layer(oracle.subject.config)
        part = load_part(oracle.subject, lambda name: belongs(name) and name != "embed.weight")
        return cls(*part.builder.ends(), part.ledger.kernels["head"][1])

    @torch.inference_mode()
    def logits(self, residual: Residual) -> torch.Tensor:
        """Computes logits [T, V] of some rows."""
        return self.head(residual.enter(self.hc_head).h_TD)


@dataclass(frozen=True)
class Distributions:
    """Two distributions over the vocabulary, position by position. kl: of the reference's to the engine's, in nats.

    changed: whether the best token differs. nll_2T: the following token's, by the reference and by the engine; the last
    position has none and counts 0.
    """

    kl_T: torch.Tensor
    changed_T: torch.Tensor
    nll_2T: torch.Tensor


def check_head(oracle: Oracle, ends: ModelEnds, reference_TSD: torch.Tensor) -> tuple[Finding, Measurement]:
    """V01 of the head, on the reference's last rows."""
    last_TSD = reference_TSD[-_ROWS:]
    engine = ends.logits(Residual(last_TSD.to(oracle.subject.engine.dtype)))
    dtypes = dtype_name(oracle.subject.engine.dtype), dtype_name(engine.dtype)
    num_layers, pair = oracle.subject.config.num_hidden_layers, (engine, oracle.head(last_TSD))
    measured = Measurement.of(num_layers, "head", pair, oracle.budget("head"), ends.kernel, dtypes)
    words = f"an error of 1 budget over all rows and of {ROW_FACTOR:g} budgets in a single one, and finite values"
    message = f"{len(last_TSD)} rows of the reference's streams: relative error {measured.rel_l2:.1e}"
    remedy = "hc_head's collapse, the last norm, or the head's product"
    is_good = measured.is_within
    finding = Finding.judged("V01", "head", is_good, message, measured.excess, words, remedy, ends.kernel)
    return finding, measured


def check_end_to_end(oracle: Oracle, ends: ModelEnds, engine: Residual, reference_TSD: torch.Tensor) -> Finding:
    """V04: compares distributions by KL(reference || engine), best token, and the text's likelihood.

    Only the 99 % of positions that agree best are judged, and the value at their end (p99). In the others a near tie
    may have sent a token to another expert, which no budget of rounding bounds; each layer's own comparison covers
    them.
    """
    found, budget = distributions(oracle, ends, engine, reference_TSD), oracle.logit_budget()
    kl = torch.nan_to_num(found.kl_T, nan=torch.inf)
    num_rows = len(kl)
    p99 = kl.sort().values[min(num_rows - 1, int(0.99 * num_rows))]
    is_judged = kl <= p99
    nll = found.nll_2T[:, is_judged].mean(1)
    numbers = {
        "KL divergence at the 99th percentile": (float(p99), budget.kl_p99),
        "in the mean": (float(kl[is_judged].mean()), budget.kl_mean),
        "share of other likeliest tokens": (float(found.changed_T[is_judged].double().mean()), budget.top1_changed),
        "log-likelihood off by": (float((nll[0] - nll[1]).abs()), budget.nll),
    }
    shown = ", ".join(f"{name} {value:.1g} (allowed {allowed:.1g})" for name, (value, allowed) in numbers.items())
    whole = (
        f"all {num_rows} positions: mean {float(kl.mean()):.1g}, largest {float(kl.max()):.1g} at {int(kl.argmax())}"
    )
    theirs, mine = (found.nll_2T.sum(1) / max(1, num_rows - 1)).tolist()
    message = f"over the best 99 % of positions: {shown}; {whole}; mean loss {theirs:.4f}, the engine's {mine:.4f}"
    is_good = all(value <= allowed for value, allowed in numbers.values())
    words = f"{budget.kl_p99:.1e} nats at the 99th percentile"
    return Finding.judged("V04", "logits", is_good, message, float(p99), words, _REMEDY_DRIFT)


def distributions(oracle: Oracle, ends: ModelEnds, engine: Residual, reference_TSD: torch.Tensor) -> Distributions:
    """Computes both distributions over the whole text, some rows at a time."""
    ids_T = oracle.token_ids_T
    kl, changed, nll = [], [], torch.zeros(2, len(ids_T), dtype=torch.float64, device=ids_T.device)
    for start in range(0, len(ids_T), _ROWS):
        rows_R = torch.arange(start, min(start + _ROWS, len(ids_T)), device=ids_T.device)
        both = oracle.head(reference_TSD[rows_R]), ends.logits(engine.rows(rows_R))
        theirs_RV, mine_RV = (logits.double().log_softmax(-1) for logits in both)
        kl.append((theirs_RV.exp() * (theirs_RV - mine_RV)).sum(-1))
        changed.append(theirs_RV.argmax(-1) != mine_RV.argmax(-1))
        following_R = ids_T[start + 1 : start + 1 + len(rows_R), None]
        for idx, logs_RV in enumerate((theirs_RV, mine_RV)):
            found_R = -logs_RV[: len(following_R)].gather(1, following_R)[:, 0]
            nll[idx, start : start + len(found_R)] = found_R
    return Distributions(torch.cat(kl), torch.cat(changed), nll)
