"""Rows for the sampler, and what must be chosen from them by the plain definition: sort, cut, take the best score."""

import math

import torch

from ownpath.kernels.sample import ref
from ownpath.kernels.sample.types import (
    IN_PROMPT,
    BiasRows,
    FilterRows,
    NextStep,
    PenaltyRows,
    Sampled,
    SampleRows,
)


def plain_rows(num_rows: int, temperature: float = 1.0, first_seed: int = 0, index: int = 0) -> SampleRows:
    """Rows without filters, whose seeds count up."""
    return SampleRows(
        torch.full((num_rows,), temperature),
        torch.arange(num_rows) + first_seed,
        torch.full((num_rows,), index, dtype=torch.int32),
    )


def filters(num_rows: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> FilterRows:
    """The same filters for all rows."""
    return FilterRows(
        torch.full((num_rows,), top_k, dtype=torch.int32),
        torch.full((num_rows,), top_p),
        torch.full((num_rows,), min_p),
    )


def _pick(g: torch.Generator, num_rows: int, values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[torch.randint(len(values), (num_rows,), generator=g)]


def mixed_rows(num_rows: int, num_vocab: int, g: torch.Generator, with_all: bool = True) -> SampleRows:
    """Random parameters of every kind, off in some rows. with_all: penalties, bias and mask too."""
    rows = SampleRows(
        _pick(g, num_rows, [0.0, 1e-3, 0.5, 1.0, 1.7]),
        torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=g),
        torch.randint(0, 1000, (num_rows,), generator=g, dtype=torch.int32),
        FilterRows(
            _pick(g, num_rows, [0, 0, 1, 2, 7, 50, num_vocab, num_vocab + 5]).int(),
            _pick(g, num_rows, [1.0, 1.0, 0.987, 0.7123, 0.2345, 1e-30]),
            _pick(g, num_rows, [0.0, 0.0, 0.0123, 0.3, 1.0]),
        ),
    )
    if not with_all:
        return rows
    tables = torch.randint(0, 40, (3, num_vocab), generator=g, dtype=torch.int32)
    tables = torch.where(tables > 36, tables - 36, tables.clamp(max=1) * 0)
    tables |= (torch.rand(3, num_vocab, generator=g) < 0.1).int() * IN_PROMPT
    penalties = PenaltyRows(
        tables,
        torch.randint(-1, 3, (num_rows,), generator=g, dtype=torch.int32),
        *(_pick(g, num_rows, values) for values in ([0.0, 0.5, -1.0], [0.0, 0.3], [1.0, 1.3, 0.7])),
    )
    num_places = min(9, num_vocab)
    ids = torch.rand(num_rows, num_vocab, generator=g).topk(num_places).indices.sort(-1).values.int()
    counts = torch.randint(0, num_places + 1, (num_rows,), generator=g, dtype=torch.int32)
    bias = BiasRows(ids, torch.randn(num_rows, num_places, generator=g) * 4, counts)
    mask = torch.randint(-(2**31), 2**31 - 1, (num_rows, -(-num_vocab // 32)), generator=g, dtype=torch.int32)
    mask[::3] = -1
    return rows._replace(penalties=penalties, bias=bias, mask_TW=mask)


def next_step(
    count: int, num_fields: int, device: torch.device | None = None, width: int = 64
) -> tuple[Sampled, NextStep]:
    """Results of ``count`` rows of a step, and arrays in which they go on; the last is padded, all else is marked."""
    device = device or torch.device("cpu")
    g = torch.Generator().manual_seed(count)
    on_host = torch.full((2, num_fields, width), -9, dtype=torch.int32, pin_memory=device.type == "cuda")
    results = torch.randint(-5, 5, (num_fields, width), generator=g, dtype=torch.int32).to(device)
    counts = torch.randint(0, 900, (2, width), generator=g, dtype=torch.int32).to(device)
    pad, turn = torch.zeros(2, width, dtype=torch.int32, device=device)
    pad[count - 1 :] = -1
    following = NextStep(torch.full_like(pad, -9), pad, counts, turn, results, on_host)
    token, fault, logprob = results[:3, :count]
    return Sampled(token, fault, logprob.view(torch.float32)), following


def adjusted_logits(logits_V: list[float], rows: SampleRows, row: int) -> list[float]:
    """One row's logits after penalties, bias and mask, each float32 step by itself."""

    def f32(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32))

    x = list(logits_V)
    if rows.penalties is not None and rows.penalties.table_T[row] >= 0:
        entries = rows.penalties.tables_RV[rows.penalties.table_T[row]].tolist()
        presence, frequency, repetition = (float(part[row]) for part in rows.penalties[2:])
        for i, entry in enumerate(entries):
            count = entry & (IN_PROMPT - 1)
            if entry:
                x[i] = f32(x[i] * f32(1 / repetition if x[i] > 0 else repetition))
            x[i] = f32(x[i] - f32(frequency * count))
            x[i] = f32(x[i] - presence) if count else x[i]
    if rows.bias is not None:
        for place in range(int(rows.bias.counts_T[row])):
            i = int(rows.bias.ids_TK[row, place])
            x[i] = f32(x[i] + float(rows.bias.values_TK[row, place]))
    if rows.mask_TW is not None:
        words = rows.mask_TW[row].tolist()
        x = [value if words[i // 32] >> i % 32 & 1 else -math.inf for i, value in enumerate(x)]
    return x


def kept_ids(x: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that all filters keep, from the ranking."""
    ranked = sorted(range(len(x)), key=lambda i: (-x[i], i))
    shares = [math.exp((x[i] - x[ranked[0]]) / temperature) for i in ranked]
    total, before, kept = math.fsum(shares), 0.0, set()
    for rank, (i, share) in enumerate(zip(ranked, shares, strict=True)):
        inside = (not 0 < top_k <= rank) and (top_p >= 1 or before < top_p * total) and share >= min_p
        if rank == 0 or inside:
            kept.add(i)
        before += share
    return kept


def expected_token(logits_V: torch.Tensor, rows: SampleRows, row: int) -> int:
    """The token of one row: the best score among those that are kept, by the definition."""
    x = adjusted_logits(logits_V.tolist(), rows, row)
    temperature = float(rows.temperature_T[row])
    if temperature == 0:
        return min(range(len(x)), key=lambda i: (-x[i], i))
    limits = (0, 1.0, 0.0) if rows.filters is None else (part[row].item() for part in rows.filters)
    kept = kept_ids(x, temperature, *limits)
    noise = ref.gumbel(ref.words_of(rows.seed_T[row : row + 1], rows.index_T[row : row + 1], len(x)))[0].tolist()
    return min(kept, key=lambda i: (-(x[i] * (1 / temperature) + noise[i]), i))
