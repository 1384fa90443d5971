"""Loaded layers whose kernels of decode steps are wrong, or get or leave something in the wrong place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ownpath.formats import CacheFormat
from ownpath.kernels.attend.ref import gather_keys
from ownpath.kernels.attend.types import WINDOW_ROWS, DecodeKeys, DecodeRows
from ownpath.kernels.entries.types import EntryAngles, LayerPools, RawRows, RowPlaces
from ownpath.kernels.norms.ref import rms_norm
from ownpath.numerics import FP4_INDEX_PAGES, INDEX_PAGES, KEY_PAGES, PageForm, rotate_pairs
from ownpath.runners.decode import StepAngles
from ownpath.verify.layer import LoadedLayer
from support.layer_faults import in_operand, with_attn
from support.mutations.mutation import Mutation, around, on_layer

SLIDING, CSA, HCA = 0, 1, 2
KERNEL = {"write": "entries", "score": "scores", "select": "select", "attend": "attend"}
"""Part of the line -> its slot."""
Change = Callable[[LoadedLayer], LoadedLayer]
KeysOf = Callable[[DecodeKeys, DecodeRows, int, torch.dtype], torch.Tensor]


def line_of(loaded: LoadedLayer) -> Any:
    return loaded.block.attn.decode


def called(what: str, part: str, call: Callable[..., Any], layer_idx: int = CSA) -> Mutation:
    """A kernel of the line that is called by ``call(runner, *args)``."""

    def change(loaded: LoadedLayer) -> LoadedLayer:
        line = line_of(loaded)
        return with_attn(loaded, decode=replace(line, **{part: around(getattr(line, part), call)}))

    return in_line(what, part, change, layer_idx)


def in_line(what: str, part: str, change: Change, layer_idx: int = CSA) -> Mutation:
    where = f"layers.{layer_idx}.attn.decode.{KERNEL[part]}"
    return Mutation(what, "K11", where, None, on_layer(layer_idx, change), layer_idx, ("kernels",))


def routed(what: str, call: Callable[..., Any]) -> Mutation:
    """Gate and router of decode steps, called by ``call(runner, x, token_ids)``."""

    def change(loaded: LoadedLayer) -> LoadedLayer:
        ffn = loaded.block.ffn
        changed = replace(ffn, decode_router=around(ffn.decode_router, call))
        return replace(loaded, block=replace(loaded.block, ffn=changed))

    where = f"layers.{CSA}.ffn.decode.route"
    return Mutation(what, "K05", where, None, on_layer(CSA, change), CSA, ("kernels",))


def biased_weights(run: Any, x_TD: torch.Tensor, token_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of scores with the bias, as those that choose."""
    ids_TK, _ = run(x_TD, token_ids_T)
    scores_TE = torch.nn.functional.softplus(run.logits(x_TD)).sqrt() + run.weights.router.bias_E
    weights_TK = scores_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0.0)
    return ids_TK, weights_TK / weights_TK.sum(1, keepdim=True).clamp(
        min=1e-6
    ) * run.weights.router.routed_scaling_factor


def given(what: str, part: str, layer_idx: int = CSA, **parts: Callable[[Any], Any]) -> Mutation:
    """Some fields of the rows' places exchanged: the third argument of ``write``, the second of ``select``, the last of
    others."""

    def call(run: Any, *args: Any) -> Any:
        at = {"write": 2, "select": 1}.get(part, len(args) - 1)
        changed = {name: change(getattr(args[at], name)) for name, change in parts.items()}
        return run(*args[:at], args[at]._replace(**changed), *args[at + 1 :])

    return called(what, part, call, layer_idx)


def attending(keys_of: KeysOf = gather_keys, *, is_normed: bool = True) -> Callable[..., torch.Tensor]:
    """Attention in a few lines, right but for the keys that ``keys_of`` gives it."""

    def call(
        run: Any, q_TNH: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, keys: DecodeKeys, rows: DecodeRows
    ) -> torch.Tensor:
        weights, out = run.operand, torch.empty_like(q_TNH)
        turned_TNH = rotate_pairs(rms_norm(q_TNH, None, weights.eps) if is_normed else q_TNH, cos_TF, sin_TF)
        for t, q_NH in enumerate(turned_TNH):
            keys_KH = keys_of(keys, rows, t, q_TNH.dtype)
            scores_NK = torch.cat((q_NH @ keys_KH.T * weights.softmax_scale, weights.sink_N[:, None]), dim=1)
            out[t] = scores_NK.softmax(dim=1)[:, :-1] @ keys_KH
        return rotate_pairs(out, cos_TF, -sin_TF)

    return call


def next_row(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, dims=0)


def next_block(blocks_TB: torch.Tensor) -> torch.Tensor:
    return blocks_TB.roll(1, dims=1)


def without_oldest(keys: DecodeKeys, rows: DecodeRows, t: int, dtype: torch.dtype) -> torch.Tensor:
    """The window without the key of position p - 127."""
    found, position = gather_keys(keys, rows, t, dtype), int(rows.positions_T[t])
    oldest = (position + 1) % WINDOW_ROWS
    return found if position + 1 < WINDOW_ROWS else torch.cat((found[:oldest], found[oldest + 1 :]))


def with_one_more(keys: DecodeKeys, rows: DecodeRows, t: int, dtype: torch.dtype) -> torch.Tensor:
    """The window with the row that the next token will fill, where the ring is not full."""
    found, position, slot = gather_keys(keys, rows, t, dtype), int(rows.positions_T[t]), int(rows.slots_T[t])
    if position + 1 >= WINDOW_ROWS:
        return found
    return torch.cat((found, keys.window[slot * WINDOW_ROWS + position + 1][None].to(dtype)))


def one_entry_early(keys: DecodeKeys, rows: DecodeRows, t: int, dtype: torch.dtype) -> torch.Tensor:
    """The keys with an entry whose window is not complete."""
    window = gather_keys(DecodeKeys(keys.window), rows, t, dtype)
    later = rows._replace(positions_T=rows.positions_T + keys.ratio - 1)
    return torch.cat((window, gather_keys(keys, later, t, dtype)[WINDOW_ROWS:]))


def state_one_early(run: Any, raw: RawRows, angles: EntryAngles, rows: RowPlaces, pools: LayerPools) -> None:
    """The raw row of position p goes where that of p + 1 belongs: over the oldest one that is still needed."""
    state, num_rows = pools.main_state, run.operand.main.num_rows
    assert state is not None
    before = state.clone()
    run(raw, angles, rows, pools)
    state.copy_(before)
    state[rows.slots_T.long() * num_rows + (rows.positions_T.long() + 1) % num_rows] = raw.main_TP2


def turned_at_the_end(run: Any, raw: Any, angles: EntryAngles, *others: Any) -> None:
    """Entries turned at their window's last position instead of its first."""
    run(raw, EntryAngles(angles.cos_TF, angles.sin_TF, angles.cos_TF, angles.sin_TF), *others)


def without_inverse(run: Any, q: Any, cos_TF: torch.Tensor, sin_TF: torch.Tensor, *others: Any) -> torch.Tensor:
    return rotate_pairs(run(q, cos_TF, sin_TF, *others), cos_TF, sin_TF)


def unscaled(run: Any, query: Any, *others: Any) -> Any:
    num_heads, width = query.q_TIH.shape[1:]
    return run(query._replace(weights_TI=query.weights_TI * (num_heads * width) ** 0.5), *others)


def unturned(run: Any, query: Any, *others: Any) -> Any:
    cos_TF = torch.ones_like(query.cos_TF)
    return run(query._replace(cos_TF=cos_TF, sin_TF=torch.zeros_like(cos_TF)), *others)


def ties_upwards(run: Any, scores_TC: torch.Tensor, *others: Any) -> Any:
    """Scores are whole numbers here: a thousandth for each entry decides between equal ones alone."""
    return run(scores_TC + 1e-3 * torch.arange(scores_TC.shape[1]) / scores_TC.shape[1], *others)


def nan_unflagged(run: Any, *args: Any) -> Any:
    found = run(*args)
    return found._replace(non_finite_T=torch.zeros_like(found.non_finite_T))


def fewer_entries(loaded: LoadedLayer) -> LoadedLayer:
    select = line_of(loaded).select.runner
    in_operand(select, topk=select.operand.topk - 1)
    select.topk -= 1
    return loaded


def without_sink(loaded: LoadedLayer) -> LoadedLayer:
    attend = line_of(loaded).attend.runner
    in_operand(attend, sink_N=torch.full_like(attend.operand.sink_N, -torch.inf))
    return loaded


def without_ape(loaded: LoadedLayer) -> LoadedLayer:
    write = line_of(loaded).write.runner
    main = write.operand.main
    in_operand(write, main=replace(main, ape_LP=torch.zeros_like(main.ape_LP)))
    return loaded


def sliding_angles(loaded: LoadedLayer) -> LoadedLayer:
    """Angles of sliding layers in a compressing one."""
    backend: Any = loaded.block.attn.backend
    right = backend.step_angles

    def angles(positions_T: torch.Tensor) -> StepAngles:
        found: StepAngles = right(positions_T)
        cos_TF, sin_TF = found.sliding[:2]
        return found._replace(csa=found.csa._replace(cos_TF=cos_TF, sin_TF=sin_TF))

    return with_attn(loaded, backend=replace(backend, step_angles=angles))


def on_reference(loaded: LoadedLayer) -> LoadedLayer:
    return with_attn(loaded, backend=loaded.block.attn.backend.reference)


def scales_moved(pages: torch.Tensor, form: PageForm) -> torch.Tensor:
    """FP8 pages whose plane of scales starts a key's scales too late."""
    num_codes = pages.shape[1] // form.key_bytes * form.num_code_bytes
    codes, scales = pages[:, :num_codes], pages[:, num_codes:]
    return torch.cat((codes, scales.roll(form.num_scale_bytes, dims=1)), 1)


def scales_read_late(run: Any, q: Any, cos: Any, sin: Any, keys: DecodeKeys, rows: DecodeRows) -> torch.Tensor:
    return run(q, cos, sin, keys._replace(entries=scales_moved(keys.entries, KEY_PAGES)), rows)


def index_scales_read_late(run: Any, query: Any, keys: torch.Tensor, rows: Any) -> torch.Tensor:
    return run(query, scales_moved(keys, INDEX_PAGES), rows)


def scales_written_late(run: Any, raw: Any, angles: Any, rows: Any, pools: LayerPools) -> None:
    """The window's scales go a key too far."""
    run(raw, angles, rows, pools)
    pools.window.copy_(scales_moved(pools.window, KEY_PAGES))


Spoiling = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of codes and scales."""


def fp4_spoilt(pages: torch.Tensor, change: Spoiling) -> torch.Tensor:
    """FP4 pages with the codes and scales that ``change`` makes of theirs, each [pages, keys, bytes]."""
    num_keys = pages.shape[1] // FP4_INDEX_PAGES.key_bytes
    codes, scales = pages.split((num_keys * 64, num_keys * 4), dim=1)
    changed = change(codes.unflatten(1, (num_keys, 64)), scales.unflatten(1, (num_keys, 4)))
    return torch.cat([part.flatten(1) for part in changed], 1)


def next_scale(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block of 32 channels with the scale of the next."""
    return codes, scales.roll(-1, dims=2)


def halves_swapped(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even channels in the high halves of bytes."""
    return codes >> 4 | codes << 4, scales


def read_spoilt(change: Spoiling) -> Callable[..., torch.Tensor]:
    def call(run: Any, query: Any, keys: torch.Tensor, rows: Any) -> torch.Tensor:
        scores_TC: torch.Tensor = run(query, fp4_spoilt(keys, change), rows)
        return scores_TC

    return call


def write_spoilt(change: Spoiling) -> Callable[..., None]:
    """Spoils what the step's rows have written, and nothing else."""

    def call(run: Any, raw: Any, angles: Any, rows: Any, pools: LayerPools) -> None:
        assert pools.index_entries is not None
        before = pools.index_entries.clone()
        run(raw, angles, rows, pools)
        spoilt = fp4_spoilt(pools.index_entries, change)
        pools.index_entries.copy_(torch.where(pools.index_entries == before, before, spoilt))

    return call


def on_pages(what: str, part: str, call: Callable[..., Any], cache_format: CacheFormat = CacheFormat.FP8) -> Mutation:
    """``called`` on the embedded model, whose keys fit pages."""
    return replace(called(what, part, call), model="embedded", cache_format=cache_format)


def on_fp4(what: str, part: str, call: Callable[..., Any]) -> Mutation:
    return on_pages(what, part, call, CacheFormat.FP4_INDEX)


MUTATIONS = {
    "decode: stale block table": given("another row's table", "attend", HCA, blocks_TB=next_row),
    "decode: wrong slot read": given("another row's ring", "attend", SLIDING, slots_T=next_row),
    "decode: wrong slot written": given("another row's rings", "write", HCA, slots_T=next_row),
    "decode: another row's selection": given("the entries to attend to", "attend", selected_TK=next_row),
    "decode: window one too short": called("the oldest key", "attend", attending(without_oldest), SLIDING),
    "decode: window one too long": called("an unwritten key", "attend", attending(with_one_more), SLIDING),
    "decode: incomplete windows seen": called("HCA's entries", "attend", attending(one_entry_early), HCA),
    "decode: sink dropped": in_line("the softmax's sum", "attend", without_sink, SLIDING),
    "decode: query norm left out": called("raw queries", "attend", attending(is_normed=False), SLIDING),
    "decode: no inverse rotation": called("attention's output", "attend", without_inverse),
    "decode: ring overwritten one early": called("the main state's newest row", "write", state_one_early),
    "decode: entry one block off": given("block tables", "write", blocks_TB=next_block),
    "decode: entry without ape": in_line("the main compressor's scores", "write", without_ape),
    "decode: entries turned at the wrong end": called("entries' positions", "write", turned_at_the_end),
    "decode: another theta": in_line("keys' rotation", "write", sliding_angles),
    "decode: head weights unscaled": called("index scores", "score", unscaled),
    "decode: index queries not turned": called("index scores", "score", unturned),
    "decode: index keys of another row": given("its table", "score", blocks_TB=next_row),
    "decode: ties broken upwards": called("equal scores", "select", ties_upwards),
    "decode: selection one short": in_line("index_topk", "select", fewer_entries),
    "decode: NaN scores not flagged": called("non_finite", "select", nan_unflagged),
    "decode: scales of FP8 pages read late": on_pages("the plane of scales", "attend", scales_read_late),
    "decode: scales of FP8 index keys read late": on_pages("the plane of scales", "score", index_scales_read_late),
    "decode: scales of FP8 pages written late": on_pages("the plane of scales", "write", scales_written_late),
    "decode: FP4 index keys read with the next scale": on_fp4("the scales", "score", read_spoilt(next_scale)),
    "decode: FP4 index keys read in swapped halves": on_fp4("two codes", "score", read_spoilt(halves_swapped)),
    "decode: FP4 index keys written with the next scale": on_fp4("the scales", "write", write_spoilt(next_scale)),
    "decode: FP4 index keys written in swapped halves": on_fp4("two codes", "write", write_spoilt(halves_swapped)),
    "decode: experts of another row": routed("the gate's input", lambda run, x, ids: run(x.roll(1, 0), ids)),
    "decode: gate.bias in the weights": routed("the weights", biased_weights),
    "decode: padded rows go to experts": routed("token ids", lambda run, x, ids: run(x, ids.clamp(min=0))),
    "decode: left to the reference": Mutation(
        "no kernel of decode steps runs",
        "LG02",
        "layers.1.attn.decode.entries",
        None,
        on_layer(CSA, on_reference),
        CSA,
        ("ledger",),
    ),
}
