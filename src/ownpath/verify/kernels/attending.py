"""K09: softmax over keys with a sink, the window's edges, and the ring of keys that a sequence keeps.

Legend: t queries, N heads, H head dim, K keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ownpath.config import SLIDING
from ownpath.model.attention import AttentionCore, Projected
from ownpath.model.batch import Span
from ownpath.model.caches import CacheSpec, SequenceCache
from ownpath.ops import OpKind
from ownpath.verify.finding import Finding
from ownpath.verify.kernels.compare import Deviation, Exact, deviation
from ownpath.verify.kernels.limits import EXP_STEPS, FLOAT32_ROUND, SPREAD, rounding, summing
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.report import Tally, error_of

NUM_KEYS = (1, 2, 31, 129, 300)
NUM_QUERIES = 7
SIZES = (1.0, 0.0, 2.0**-4, 4.0)
"""Of the queries in turn: where scores are zero the sink has its full share."""
REMEDY = "a query sees itself and the sliding_window - 1 tokens before; the sink is in the sum and nowhere else"


def check_attention(probe: Probe) -> Iterator[Finding]:
    """K09 of a layer's attention between its projections."""
    for slot in probe.slots_of(OpKind.ATTENTION):
        core: Any = probe.slots[slot]
        tally = Tally("K09", slot, "softmax and sink, unseen keys, window's edges, ring of keys", REMEDY)
        for name, check in _checks(core):
            kernel = probe.kernels[slot]
            try:
                for found, message in check(probe, slot, core):
                    tally.add(slot, kernel, found, f"{name}: {message or found}")
            except Exception as error:  # whatever a kernel can raise is what is looked for
                tally.fail(slot, kernel, f"{name}: {error_of(error)}")
        yield from tally.findings()


Found = Iterator[tuple[Deviation, str]]


def _checks(core: object) -> Iterator[tuple[str, Callable[[Probe, str, Any], Found]]]:
    if isinstance(core, AttentionCore):
        yield "softmax", _softmax
        yield "unseen keys", _unseen
    yield "window", _window
    yield "ring", _ring


def _queries(probe: Probe, slot: str, num_rows: int) -> Tensor:
    heads, dim = probe.config.num_attention_heads, probe.config.head_dim
    sizes = torch.tensor(SIZES, device=probe.device).repeat(-(-num_rows // len(SIZES)))[:num_rows]
    return (probe.normal(f"{slot} q", num_rows, heads, dim) * sizes[:, None, None]).to(probe.dtype)


def attended(probe: Probe, slot: str, q_tNH: Tensor, keys_KH: Tensor, visible_tK: Tensor) -> Exact:
    """Attention in float64.

    A score is a sum of H products, rounded to the activations' dtype. An error d of a score moves the output by its
    weight times d times how far its key is from the output; weights are rounded once more.
    """
    sink_N = probe.stored.param(f"{slot.removesuffix('.core')}.attn_sink")
    q, keys, scale = q_tNH.double(), keys_KH.double(), probe.config.softmax_scale
    scores_tNK = (q @ keys.T) * scale
    error_tNK = summing(q.shape[-1]) * (q.abs() @ keys.abs().T) * scale
    # By the largest of the row too: exp of a difference.
    error_tNK = (
        error_tNK + rounding(probe.dtype) * scores_tNK.abs() + EXP_STEPS * FLOAT32_ROUND * (1 + scores_tNK.abs())
    )
    hidden = ~visible_tK[:, None]
    scores_tNK = scores_tNK.masked_fill(hidden, -torch.inf)
    sink_tN1 = sink_N.expand(len(q), -1)[..., None]
    weights_tNK = torch.cat((scores_tNK, sink_tN1), -1).softmax(-1)[..., :-1]
    out_tNH = weights_tNK @ keys
    off_tNK = weights_tNK * (error_tNK.masked_fill(hidden, 0.0) + rounding(probe.dtype))
    spread_tNH = (off_tNK.square() @ keys.square()).sqrt()
    spread_tNH = spread_tNH + off_tNK.square().sum(-1, keepdim=True).sqrt() * out_tNH.abs()
    sums_tNH = summing(len(keys)) * (weights_tNK @ keys.abs())
    return Exact(out_tNH, SPREAD * spread_tNH + sums_tNH)


def _softmax(probe: Probe, slot: str, core: AttentionCore) -> Found:
    """Few and many keys, some of them hidden, at least one seen."""
    for num_keys in NUM_KEYS:
        q_tNH, keys_KH = _queries(probe, slot, NUM_QUERIES), _keys(probe, slot, num_keys)
        visible_tK = probe.normal(f"{slot} mask {num_keys}", NUM_QUERIES, num_keys) > 0
        visible_tK[:, 0] = True
        found = core.softmax(q_tNH, keys_KH, visible_tK)
        worst = deviation(found, attended(probe, slot, q_tNH, keys_KH, visible_tK))
        yield worst, f"{num_keys} keys: {worst}"


def _keys(probe: Probe, slot: str, num_keys: int) -> Tensor:
    return probe.normal(f"{slot} keys", num_keys, probe.config.head_dim).to(probe.dtype)


def _unseen(probe: Probe, slot: str, core: AttentionCore) -> Found:
    """What lies in keys that no query sees changes no bit."""
    num_keys = NUM_KEYS[-1]
    q_tNH, keys_KH = _queries(probe, slot, NUM_QUERIES), _keys(probe, slot, num_keys)
    visible_tK = (torch.arange(num_keys, device=probe.device) % 3 > 0).expand(NUM_QUERIES, -1)
    first = core.softmax(q_tNH, keys_KH, visible_tK)
    others = keys_KH.clone()
    others[::3] = 100.0
    second = core.softmax(q_tNH, others, visible_tK)
    differing = int((first != second).sum())
    yield Deviation(float("inf") if differing else 0.0), f"{differing} outputs depend on keys that are not to be seen"


def _window(probe: Probe, slot: str, core: Any) -> Found:
    """A sequence in chunks, past the window and round the ring, each query against all keys that it may see."""
    assert probe.layer is not None
    config, layer_idx = probe.config, probe.layer.layer_idx
    if isinstance(core, AttentionCore):
        core = replace(core, compressor=None, indexer=None)
    elif config.compress_ratios[layer_idx] != SLIDING:
        return
    window = config.sliding_window
    num_tokens = 2 * window + 9
    q_tNH, kv_tH = _queries(probe, slot, num_tokens), _keys(probe, slot, num_tokens)
    cache = _cache(probe, num_tokens)
    found, position = [], 0
    for size in chunks(window, num_tokens):
        rows = slice(position, position + size)
        span = Span(0, size, position, cache)
        found.append(core(Projected(q_tNH[rows], kv_tH[rows]), span))
        position += size
    age = torch.arange(num_tokens, device=probe.device)[:, None] - torch.arange(num_tokens, device=probe.device)
    worst = deviation(torch.cat(found), attended(probe, slot, q_tNH, kv_tH, (age >= 0) & (age < window)))
    where = f"token {worst.place[0]}: {worst}" if worst.place else ""
    yield worst, where


def chunks(window: int, num_tokens: int) -> Iterator[int]:
    """Almost a window, over its edge token by token, a whole window, and the rest."""
    sizes = [max(1, window - 2), 1, 1, 1, 1, window]
    yield from sizes
    yield num_tokens - sum(sizes)


def _cache(probe: Probe, num_tokens: int) -> SequenceCache:
    """A sequence's caches, with no room beyond what is needed."""
    return SequenceCache(replace(CacheSpec.of(probe.config, probe.subject.engine), max_tokens=num_tokens))


def _ring(probe: Probe, slot: str, _core: Any) -> Found:
    """What was written comes back bit by bit, wherever in the ring, after chunks of every size."""
    assert probe.layer is not None
    config = probe.config
    window, num_tokens = config.sliding_window, 3 * config.sliding_window + 5
    kv_tH = _keys(probe, slot, num_tokens)
    ring = _cache(probe, num_tokens).layers[probe.layer.layer_idx].window
    position, wrong = 0, 0
    for size in (1, window - 1, 1, window, 2, window // 2, window + 1):
        size = min(size, num_tokens - position)
        ring.write(kv_tH[position : position + size], position)
        position += size
        kept = kv_tH[max(0, position - window) : position]
        wrong += int((ring.read(position - len(kept), position) != kept).any(-1).sum())
    yield Deviation(float("inf") if wrong else 0.0), f"{wrong} rows are not what was written"
