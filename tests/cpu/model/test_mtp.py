"""MTP: its logits against its definition in float64 and against transformers' layers, its cache, and its absence.

200 positions: past the sliding window (128), which is all that the draft's layer sees.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import THREE_LAYERS, Checkpoint, random_checkpoint
from support.mtp_reference import MtpReference
from support.transformers_v4 import reference_draft_logits

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

NUM_POSITIONS = 200
VOCAB_SIZE = 96
EPS_F32 = torch.finfo(torch.float32).eps
FLOAT64_TOLERANCE = 1e-9
"""As in test_incremental: only the order of sums differs."""
TRANSFORMERS_TOLERANCE = 2e-4
"""As in test_parity: the whole backbone lies before the draft."""

CASES = [
    ("modelopt-experts-only", "deepseek-native"),  # NVIDIA's export: the draft's experts stay MXFP4
    ("deepseek-native", "deepseek-native"),
    ("modelopt-experts-only", "modelopt-experts-only"),  # third parties quantise the draft too
    ("full-nvfp4", "full-nvfp4"),
    ("fp8-experts", "fp8-experts"),  # DeepSeek's base model
    ("bf16", "bf16"),
]
"""(layout of the backbone, layout of the draft)"""


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def drafting_model(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, rows_per_request: int = 1
) -> Model:
    engine = EngineConfig(str(device), dtype, 256, loads_draft=True, rows_per_request=rows_per_request)
    return load_model(folder, engine)


Chunk = tuple[list[int], list[int], SequenceCache]
"""(tokens, the token after each of them, cache)"""


def step(model: Model, chunks: list[Chunk], later_ids: list[int] | None = None) -> tuple[torch.Tensor, ...]:
    """One step through backbone and drafts: each one's logits, of every row.

    later_ids: the tokens two places after the rows', for a second module.
    """
    device = model.cache_spec.device
    batch = ForwardBatch.of([(ids, cache) for ids, _, cache in chunks], device, all_logits=True)
    hidden = model.hidden(batch)
    found = [model.logits(hidden, batch.logits_ids)]
    following = [[next_id for _, next_ids, _ in chunks for next_id in next_ids], later_ids or []]
    for draft, next_ids in zip(model.drafts, following, strict=False):
        hidden = draft.hidden(hidden, torch.tensor(next_ids, device=device), batch)
        found.append(model.logits(hidden, batch.logits_ids))
    return tuple(found)


@pytest.mark.parametrize(("layout", "draft"), CASES, ids=str)
def test_draft_logits_equal_the_definition(layout: str, draft: str, tmp_path: Path, device: torch.device) -> None:
    """From the same streams: the module alone. Roundings add up as a random walk over all the sums in a row."""
    checkpoint = random_checkpoint(tmp_path, layout, seed=1, draft=draft)
    model, token_ids = drafting_model(tmp_path, device), tokens(NUM_POSITIONS + 1)
    batch = ForwardBatch.of([(token_ids[:-1], model.new_cache())], device, all_logits=True)
    before = model.hidden(batch)
    next_ids = torch.tensor(token_ids[1:])
    found = model.drafts[0].hidden(before, next_ids.to(device), batch)
    logits = model.logits(found, batch.logits_ids).cpu()
    reference = MtpReference(checkpoint)
    streams, expected = reference.draft(before.streams_TSD.cpu(), next_ids)
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape == (NUM_POSITIONS, VOCAB_SIZE)
    walk = reference.num_summed() ** 0.5 * EPS_F32
    worst = (logits - expected).abs().max().item()
    print(f"MTP {draft}: max |logit difference| {worst:.2e}, bound {walk * expected.abs().max().item():.2e}")
    assert (found.streams_TSD.cpu() - streams).abs().max() <= walk * streams.abs().max()
    assert worst <= walk * expected.abs().max().item()


@pytest.mark.parametrize(("layout", "draft"), [CASES[0], CASES[-1]], ids=str)
def test_backbone_and_draft_equal_transformers(layout: str, draft: str, tmp_path: Path, device: torch.device) -> None:
    """From tokens to draft: transformers' backbone up to its head, then its sliding layer with the draft's weights."""
    checkpoint = random_checkpoint(tmp_path, layout, seed=1, draft=draft)
    model, token_ids = drafting_model(tmp_path, device), tokens(NUM_POSITIONS + 1)
    _, logits = step(model, [(token_ids[:-1], token_ids[1:], model.new_cache())])
    expected = reference_draft_logits(checkpoint, token_ids, device)
    worst = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    print(f"MTP {layout}, {draft}: max |log-prob difference| {worst:.2e} over {NUM_POSITIONS} positions")
    assert logits.shape == expected.shape
    assert worst <= TRANSFORMERS_TOLERANCE


@pytest.mark.parametrize(
    "change", [{"rope_theta": 20000.0}, {"sliding_window": 127}, {"hc_sinkhorn_iters": 1}], ids=str
)
def test_the_comparison_would_see_a_wrong_constant(change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, "bf16", seed=1, draft="bf16")
    other = Checkpoint(tmp_path, checkpoint.config, checkpoint.fields | change, checkpoint.decoded)
    streams = torch.randn(NUM_POSITIONS, 4, 64, generator=torch.Generator().manual_seed(0))
    right, wrong = (
        MtpReference(one).draft(streams, torch.tensor(tokens(NUM_POSITIONS)))[1] for one in (checkpoint, other)
    )
    assert (right - wrong).abs().max() > 10 * MtpReference(checkpoint).num_summed() ** 0.5 * EPS_F32 * right.abs().max()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    """Two modules, so that the second one's cache is seen too."""
    folder = tmp_path_factory.mktemp("drafting")
    random_checkpoint(folder, "full-nvfp4", seed=5, draft="deepseek-native", num_nextn_predict_layers=2, **THREE_LAYERS)
    return drafting_model(folder, device, torch.float64)


def run_in_chunks(model: Model, token_ids: list[int], size: int, first: int = 0) -> list[torch.Tensor]:
    """first: the size of a chunk in front of the others."""
    cache, found = model.new_cache(), []
    starts = [*([0] if first else []), *range(first, len(token_ids) - 2, size)]
    for start, stop in pairwise([*starts, len(token_ids) - 2]):
        following = [token_ids[start + ahead : stop + ahead] for ahead in (1, 2)]
        found.append(step(model, [(token_ids[start:stop], following[0], cache)], following[1]))
    return [torch.cat(logits) for logits in zip(*found, strict=True)]


@pytest.mark.parametrize("size", [1, 3, 64, 127, 129])
def test_chunks_equal_one_shot(size: int, model: Model) -> None:
    """Small chunks begin shortly before the window's end, where rings go round, and end behind it."""
    num_positions, first = (NUM_POSITIONS, 0) if size > 3 else (146, 118)
    token_ids = tokens(num_positions)
    whole = run_in_chunks(model, token_ids, len(token_ids))
    assert len(whole) == 3
    for expected, found in zip(whole, run_in_chunks(model, token_ids, size, first), strict=True):
        assert found.shape == (num_positions - 2, VOCAB_SIZE)
        assert (found - expected).abs().max() <= FLOAT64_TOLERANCE


def test_drafts_decode_several_rows_at_a_time(model: Model, tmp_path: Path, device: torch.device) -> None:
    """The modules' windows are longer too: three rows a step, on the line, past the window's end."""
    random_checkpoint(
        tmp_path, "full-nvfp4", seed=5, draft="deepseek-native", num_nextn_predict_layers=2, **THREE_LAYERS
    )
    several, token_ids = drafting_model(tmp_path, device, torch.float64, rows_per_request=3), tokens(146)
    whole = run_in_chunks(model, token_ids, len(token_ids))
    for expected, found in zip(whole, run_in_chunks(several, token_ids, 3), strict=True):
        assert (found - expected).abs().max() <= FLOAT64_TOLERANCE
    attend = {slot: calls for slot, calls in several.ledger.calls.items() if slot.endswith("decode.attend")}
    assert set(attend.values()) == {48}, "one call a step in each layer of the backbone and of both modules"
    assert len([slot for slot in attend if slot.startswith("mtp")]) == 2


def test_sequences_side_by_side_equal_each_alone(model: Model) -> None:
    """A chunk of one beside single tokens of the other."""
    first, second = tokens(150, seed=4), tokens(40, seed=5)
    alone = [run_in_chunks(model, ids, len(ids)) for ids in (first, second)]
    caches = [model.new_cache(), model.new_cache()]
    rows: list[list[torch.Tensor]] = [[], []]
    for start in range(4):
        a = slice(37 * start, 37 * (start + 1))
        b = slice(start, start + 1)
        chunks = [(first[a], first[a.start + 1 : a.stop + 1], caches[0]), (second[b], [second[start + 1]], caches[1])]
        later = [*first[a.start + 2 : a.stop + 2], second[start + 2]]
        *_, logits = step(model, chunks, later)
        rows[0].append(logits[:-1])
        rows[1].append(logits[-1:])
    for (*_, expected), found in zip(alone, (torch.cat(part) for part in rows), strict=True):
        assert (found - expected[: len(found)]).abs().max() <= FLOAT64_TOLERANCE
    assert [cache.num_tokens for cache in caches] == [148, 4]


def test_a_second_module_continues_from_the_first(tmp_path: Path, device: torch.device) -> None:
    checkpoint = random_checkpoint(tmp_path, "bf16", seed=1, draft="bf16", num_nextn_predict_layers=2)
    model, token_ids = drafting_model(tmp_path, device), tokens(40)
    cache = model.new_cache()
    batch = ForwardBatch.of([(token_ids[:-2], cache)], device, all_logits=True)
    streams = model.hidden(batch).streams_TSD.cpu()
    cache.num_tokens = 0  # the same step once more, now with the drafts
    *_, logits = step(model, [(token_ids[:-2], token_ids[1:-1], cache)], token_ids[2:])
    walk = 0.0
    for draft_idx in range(2):
        reference = MtpReference(checkpoint, f"mtp.{draft_idx}")
        streams, expected = reference.draft(
            streams, torch.tensor(token_ids[draft_idx + 1 : len(token_ids) - 1 + draft_idx])
        )
        walk += reference.num_summed() ** 0.5 * EPS_F32
    assert (logits.cpu() - expected).abs().max() <= walk * expected.abs().max()


def test_hidden_gives_the_logits_that_forward_gives(model: Model) -> None:
    token_ids = tokens(60)
    batches = [ForwardBatch.of([(token_ids, model.new_cache())], model.cache_spec.device) for _ in range(2)]
    expected = model.forward(batches[0])
    found = model.logits(model.hidden(batches[1]), batches[1].logits_ids)
    assert found.shape == expected.shape == (1, VOCAB_SIZE)
    assert (found - expected).abs().max() <= FLOAT64_TOLERANCE


def test_without_the_draft_nothing_changes(tmp_path: Path) -> None:
    """A checkpoint with a draft that was not asked for: the bits and the memory of the one that has none."""
    device = torch.device("cpu")
    random_checkpoint(tmp_path / "without", "full-nvfp4", seed=1)
    random_checkpoint(tmp_path / "with", "full-nvfp4", seed=1, draft="full-nvfp4")
    engine = EngineConfig(max_model_len=256)
    logits, num_bytes = [], []
    for model in (
        load_model(tmp_path / "without", engine),
        load_model(tmp_path / "with", engine),
        drafting_model(tmp_path / "with", device),
    ):
        cache = model.new_cache()
        logits.append(model.forward(ForwardBatch.of([(tokens(140), cache)], device, all_logits=True)))
        num_bytes.append(cache.num_bytes())
        assert len(model.drafts) == (len(logits) == 3)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert num_bytes[0] == num_bytes[1] == num_bytes[2] - 128 * 64 * 4  # one window of 128 float32 keys of 64
