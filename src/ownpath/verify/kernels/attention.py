"""K09: checks softmax over keys with a sink, the window's edges, and the ring of keys that a sequence keeps.

Legend: t queries, N heads, H head dim, K keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ownpath.attention.interface import Projected
from ownpath.cache.pools import CachePool, CacheSpec
from ownpath.cache.tables import StepTables
from ownpath.config import SLIDING
from ownpath.conformance.bounds import Deviation, Exact, deviation
from ownpath.conformance.cached import kept
from ownpath.conformance.exact import attention
from ownpath.conformance.params import NUM_KEYS
from ownpath.finding import Finding
from ownpath.model.attention import AttentionCore
from ownpath.ops import OpKind
from ownpath.verify.kernels.probe import Probe
from ownpath.verify.kernels.tally import Tally

NUM_QUERIES = 7
REMEDY = "a query sees itself and the sliding_window - 1 tokens before; the sink is in the sum and nowhere else"


def check_attention(probe: Probe) -> Iterator[Finding]:
    """K09: checks a layer's attention between its projections."""
    for slot in probe.slots_of(OpKind.ATTENTION):
        core: Any = probe.slots[slot]
        tally = Tally("K09", slot, "softmax and sink, unseen keys, window's edges, ring of keys", REMEDY)
        for name, check in _checks(core):
            kernel = probe.kernels[slot]
            with tally.catch_errors(slot, kernel, f"{name}: "):
                for found, message in check(probe, slot, core):
                    tally.add(slot, kernel, found, f"{name}: {message or found}")
        yield from tally.findings()


Deviations = Iterator[tuple[Deviation, str]]


def _checks(core: object) -> Iterator[tuple[str, Callable[[Probe, str, Any], Deviations]]]:
    if isinstance(core, AttentionCore):
        yield "softmax", _check_softmax
        yield "unseen keys", _check_unseen_keys
        yield "ring", _check_ring
    yield "window", _check_window


def _queries(probe: Probe, slot: str, num_rows: int) -> Tensor:
    return probe.draw.queries(slot, num_rows, probe.config.num_attention_heads, probe.config.head_dim)


def _exact(probe: Probe, slot: str, q_tNH: Tensor, keys_KH: Tensor, visible_tK: Tensor) -> Exact:
    sink_N = probe.stored.param(f"{slot.removesuffix('.core')}.attn_sink")
    return attention(q_tNH, keys_KH, visible_tK, sink_N, probe.config.softmax_scale)


def _check_softmax(probe: Probe, slot: str, core: AttentionCore) -> Deviations:
    """Checks few and many keys, some of them hidden, at least one seen."""
    for num_keys in NUM_KEYS:
        q_tNH, keys_KH = _queries(probe, slot, NUM_QUERIES), _keys(probe, slot, num_keys)
        visible_tK = probe.normal(f"{slot} mask {num_keys}", NUM_QUERIES, num_keys) > 0
        visible_tK[:, 0] = True
        found = core.layer.softmax(q_tNH, keys_KH, visible_tK)
        worst = deviation(found, _exact(probe, slot, q_tNH, keys_KH, visible_tK))
        yield worst, f"{num_keys} keys: {worst}"


def _keys(probe: Probe, slot: str, num_keys: int) -> Tensor:
    return probe.draw.keys(slot, num_keys, probe.config.head_dim)


def _check_unseen_keys(probe: Probe, slot: str, core: AttentionCore) -> Deviations:
    """Checks that the contents of keys that no query sees change no bit."""
    num_keys = NUM_KEYS[-1]
    q_tNH, keys_KH = _queries(probe, slot, NUM_QUERIES), _keys(probe, slot, num_keys)
    visible_tK = (torch.arange(num_keys, device=probe.device) % 3 > 0).expand(NUM_QUERIES, -1)
    first = core.layer.softmax(q_tNH, keys_KH, visible_tK)
    others = keys_KH.clone()
    others[::3] = 100.0
    second = core.layer.softmax(q_tNH, others, visible_tK)
    differing = int((first != second).sum())
    yield Deviation(float("inf") if differing else 0.0), f"{differing} outputs depend on keys that are not to be seen"


def _check_window(probe: Probe, slot: str, core: Any) -> Deviations:
    """Checks a sequence in chunks, past the window and round the ring: each query against all keys that it may see."""
    assert probe.layer is not None
    config, layer_idx = probe.config, probe.layer.layer_idx
    if isinstance(core, AttentionCore):
        core = replace(core, layer=replace(core.layer, compressor=None, index_compressor=None, selector=None))
    elif (*config.backbone_layers(), *config.draft_layers())[layer_idx].ratio != SLIDING:
        return
    window = config.sliding_window
    num_tokens = 2 * window + 9
    q_tNH, kv_tH = _queries(probe, slot, num_tokens), _keys(probe, slot, num_tokens)
    cache = _pool(probe, num_tokens).new_sequence()
    found = []
    for size in chunks(window, num_tokens):
        rows = slice(cache.num_tokens, cache.num_tokens + size)
        tables = StepTables.of([cache], [size])
        found.append(core(Projected(q_tNH[rows], kv_tH[rows]), probe.layer.reference_step(tables)))
        tables.extend()
    age = torch.arange(num_tokens, device=probe.device)[:, None] - torch.arange(num_tokens, device=probe.device)
    exact = _exact(probe, slot, q_tNH, _kept(probe, kv_tH), (age >= 0) & (age < window))
    worst = deviation(torch.cat(found), exact)
    where = f"token {worst.place[0]}: {worst}" if worst.place else ""
    yield worst, where


def chunks(window: int, num_tokens: int) -> Iterator[int]:
    """Yields chunk sizes: almost a window, over its edge token by token, a whole window, and the rest."""
    sizes = [max(1, window - 2), 1, 1, 1, 1, window]
    yield from sizes
    yield num_tokens - sum(sizes)


def _kept(probe: Probe, keys_TH: Tensor) -> Tensor:
    return kept(keys_TH, probe.config.qk_rope_head_dim, probe.subject.engine.cache_format)


def _pool(probe: Probe, num_tokens: int) -> CachePool:
    """Makes the caches of one sequence, with no room beyond what is needed."""
    spec = CacheSpec.of(probe.config, probe.subject.engine)
    return CachePool(replace(spec, max_tokens=num_tokens, max_sequences=1))


def _check_ring(probe: Probe, slot: str, core: AttentionCore) -> Deviations:
    """Checks that rows come back as the caches keep them, bit by bit, anywhere in the ring, after chunks of every
    size."""
    assert probe.layer is not None
    config = probe.config
    window, num_tokens = config.sliding_window, 3 * config.sliding_window + 5
    kv_tH = _keys(probe, slot, num_tokens)
    kept_tH = _kept(probe, kv_tH)
    cache, wrong = _pool(probe, num_tokens).new_sequence(), 0
    for size in (1, window - 1, 1, window, 2, window // 2, window + 1):
        size = min(size, num_tokens - cache.num_tokens)
        new_tH = kv_tH[cache.num_tokens : cache.num_tokens + size]
        tables = StepTables.of([cache], [size])
        probe.layer.reference_step(tables).write_rows(core.layer, Projected(new_tH, new_tH))
        tables.extend()
        last = torch.arange(max(0, cache.num_tokens - window), cache.num_tokens, device=probe.device)
        ring = cache.window(core.layer.layer_idx)
        wrong += int((ring[last % len(ring)] != kept_tH[last]).any(-1).sum())
    yield Deviation(float("inf") if wrong else 0.0), f"{wrong} rows are not what was written"
