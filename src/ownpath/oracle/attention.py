"""Attention over a whole sequence at once, without caches: window, compressed entries, indexer, sink.

Legend: T tokens, D hidden, N heads, H head dim, K keys, C compressed entries, I index heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.config import CSA_RATIO, Layer
from ownpath.formats import KeyFormat
from ownpath.official import Step
from ownpath.oracle.arithmetic import OracleRun
from ownpath.oracle.formats import E2M1, E4M3, fp4, fp8, hadamard_matrix, nearest, power_of_two_scale
from ownpath.oracle.formulas import QUERIES_AT_ONCE, attention_weights, index_scores, rms, rotate_to, top_indices

_KV_BLOCK, _INDEX_BLOCK = 64, 32


def attention(run: OracleRun, layer: Layer, x_TD: Tensor, forced_mask_TC: Tensor | None) -> Tensor:
    """Maps x [T, D] -> [T, D]. forced_mask: the entries each query sees, instead of the indexer's choice."""
    config, name, ratio = run.config, f"{layer.name}.attn", layer.ratio
    positions = torch.arange(len(x_TD), device=x_TD.device)
    both = run.linear(f"{name}.wqa_wkv", x_TD, f"{name}.wq_a", f"{name}.wkv")
    qr, kv = both.split((config.q_lora_rank, config.head_dim), -1)
    qr = run.norm(f"{name}.q_norm", qr, f"{name}.q_norm.weight")
    q = run.linear(f"{name}.wq_b", qr, f"{name}.wq_b").unflatten(-1, (config.num_attention_heads, config.head_dim))
    q = run.record(f"{name}.q", rotate_to(norm_heads(run, f"{name}.q_head_norm", q), positions, config, ratio))
    kv = run.norm(f"{name}.kv_norm", kv, f"{name}.kv_norm.weight")
    keys = run.record(f"{name}.kv", _quantize_kv(run, run.arithmetic.round(rotate_to(kv, positions, config, ratio))))
    if Step.KV in run.arithmetic.official:
        run.record(f"{name}.key_quantizer", keys)
    keys = in_cache(run, keys)
    age = positions[:, None] - positions
    visible = (age >= 0) & (age < config.sliding_window)
    if ratio:
        entries = in_cache(run, _quantize_kv(run, _compress(run, f"{name}.compressor", x_TD, ratio)))
        keys = torch.cat((keys, run.record(f"{name}.entries", entries)))
        seen = torch.arange(len(entries), device=x_TD.device) < ((positions + 1) // ratio)[:, None]
        if ratio == CSA_RATIO:
            seen = _select(run, f"{name}.indexer", (x_TD, qr), seen, forced_mask_TC)
        visible = torch.cat((visible, seen), 1)
    o = run.record(f"{name}.core", attend(run, q, keys, visible, run.stored.param(f"{name}.attn_sink")))
    o = run.record(f"{name}.o", rotate_to(o, positions, config, ratio, inverse=True))
    return run.linear(f"{name}.wo_b", project_groups(run, name, o).flatten(1), f"{name}.wo_b")


def norm_heads(run: OracleRun, slot: str, q: Tensor) -> Tensor:
    """Norms query heads, without a weight; official numerics round after every operation."""
    if Step.Q_HEAD_NORM not in run.arithmetic.official:
        return run.record(slot, rms(q, run.config.rms_norm_eps))
    round_ = run.arithmetic.round
    mean = round_(round_(q.square()).mean(-1, keepdim=True))
    return run.record(slot, q * round_(torch.rsqrt(round_(mean + run.config.rms_norm_eps))))


def _quantize_kv(run: OracleRun, kv: Tensor) -> Tensor:
    """Rounds keys to the cache's format; the identity without one."""
    if Step.KV not in run.arithmetic.official:
        return kv
    num_rotary = run.config.qk_rope_head_dim
    plain, rotary = kv.split((kv.shape[-1] - num_rotary, num_rotary), -1)
    return torch.cat((fp8(plain, _KV_BLOCK).to(kv.dtype), rotary), -1)


def in_cache(run: OracleRun, keys: Tensor) -> Tensor:
    """Rounds keys as the caches hold them: in FP8 pages rotary channels are BF16, all others E4M3."""
    if not run.arithmetic.cache_format.in_pages:
        return keys
    num_rotary = run.config.qk_rope_head_dim
    plain, rotary = keys.split((keys.shape[-1] - num_rotary, num_rotary), -1)
    return torch.cat((fp8(plain, _KV_BLOCK).to(keys.dtype), rotary.bfloat16().to(keys.dtype)), -1)


def _in_index_cache(run: OracleRun, keys: Tensor) -> Tensor:
    """As ``_in_cache``, for index keys: E4M3 with one scale for each key, or E2M1 with one for 32 channels."""
    stored = run.arithmetic.cache_format.index_keys
    if stored is KeyFormat.BF16:
        return keys
    size, codes = (keys.shape[-1], E4M3) if stored is KeyFormat.FP8 else (_INDEX_BLOCK, E2M1)
    blocks = keys.float().unflatten(-1, (-1, size))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=codes[-1] * 2.0**-126), codes[-1])
    return (nearest(blocks.double() / scale, codes) * scale).flatten(-2).to(keys.dtype)


def attend(run: OracleRun, q_TNH: Tensor, keys_KH: Tensor, visible_TK: Tensor, sink_N: Tensor) -> Tensor:
    """Attends to the visible keys, with the sink in the softmax, which adds nothing: [T, N, H]."""
    round_, parts = run.arithmetic.round, []
    for start in range(0, len(q_TNH), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        scores = round_(torch.einsum("tnh,kh->tnk", q_TNH[rows], keys_KH)) * run.config.head_dim**-0.5
        weights = attention_weights(scores, visible_TK[rows], sink_N)
        parts.append(torch.einsum("tnk,kh->tnh", round_(weights), keys_KH))
    return torch.cat(parts)


def project_groups(run: OracleRun, name: str, o_TNH: Tensor) -> Tensor:
    """Projects each group of heads by its own matrix of ``wo_a``: [T, groups, rank]."""
    groups, rank = run.config.o_groups, run.config.o_lora_rank
    grouped = o_TNH.flatten(1).unflatten(-1, (groups, -1))
    wo_a = run.matrix(f"{name}.wo_a").view(groups, rank, -1)
    return run.record(f"{name}.wo_a", torch.einsum("tgi,gri->tgr", grouped, wo_a))


def _compress(run: OracleRun, name: str, x_TD: Tensor, ratio: int) -> Tensor:
    """Computes a sequence's entries from its hidden rows."""
    return entries_of(run, name, run.wide_linear(f"{name}.wkv_wgate", x_TD, f"{name}.wkv", f"{name}.wgate"), ratio)


def entries_of(run: OracleRun, name: str, both_TH: Tensor, ratio: int) -> Tensor:
    """Computes one entry for every ``ratio`` complete tokens, rotated at the first one's position: [C, H].

    both: the compressor's two products of a sequence's rows from position 0 on, side by side.
    """
    num_windows = len(both_TH) // ratio
    both = both_TH[: num_windows * ratio].unflatten(0, (num_windows, ratio))
    kv, score = both.chunk(2, -1)
    score = score + run.stored.param(f"{name}.ape")
    if ratio == CSA_RATIO:
        half = kv.shape[-1] // 2
        before = F.pad(kv[..., :half], (0, 0, 0, 0, 1, 0))[:num_windows]
        before_score = F.pad(score[..., :half], (0, 0, 0, 0, 1, 0), value=-math.inf)[:num_windows]
        kv = torch.cat((before, kv[..., half:]), 1)
        score = torch.cat((before_score, score[..., half:]), 1)
    round_ = run.arithmetic.round
    entries = rms(round_((kv * score.softmax(1)).sum(1)), run.config.rms_norm_eps) * run.stored.param(
        f"{name}.norm.weight"
    )
    starts = torch.arange(num_windows, device=both_TH.device) * ratio
    return round_(rotate_to(round_(entries), starts, run.config, ratio))


def _select(
    run: OracleRun, name: str, inputs: tuple[Tensor, Tensor], seen_TC: Tensor, forced_mask_TC: Tensor | None
) -> Tensor:
    """Selects the best entries that each query may see, the lower index at a tie. inputs: x and qr."""
    config, (x_TD, qr) = run.config, inputs
    positions = torch.arange(len(x_TD), device=x_TD.device)
    q = run.linear(f"{name}.wq_b", qr, f"{name}.wq_b").unflatten(-1, (config.index_n_heads, config.index_head_dim))
    q = _transform_index(run, run.arithmetic.round(rotate_to(q, positions, config, CSA_RATIO)))
    if Step.INDEXER in run.arithmetic.official:
        run.record(f"{name}.quantizer", q)
    k = _in_index_cache(run, _transform_index(run, _compress(run, f"{name}.compressor", x_TD, CSA_RATIO)))
    weights = run.wide_linear(f"{name}.weights_proj", x_TD, f"{name}.weights_proj")
    weights = weights * (config.index_head_dim * config.index_n_heads) ** -0.5
    scores = run.record_wide(f"{name}.scores", index_scores(q, k, weights).masked_fill(~seen_TC, -math.inf))
    if forced_mask_TC is not None:
        mask = forced_mask_TC.to(seen_TC.device)
    elif scores.shape[1] <= config.index_topk:
        mask = seen_TC
    else:
        mask = torch.zeros_like(seen_TC).scatter(1, top_indices(scores, config.index_topk), True) & seen_TC
    return run.record_wide(f"{name}.mask", mask)


def _transform_index(run: OracleRun, x: Tensor) -> Tensor:
    """Transforms index queries and keys into the form in which they are scored."""
    if Step.INDEXER not in run.arithmetic.official:
        return x
    turned = run.arithmetic.round(x @ hadamard_matrix(x.shape[-1]).to(x))
    return fp4(turned, _INDEX_BLOCK).to(x.dtype)
