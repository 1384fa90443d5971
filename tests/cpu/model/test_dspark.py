"""DSpark: its guesses against its definition in float64, its context's memory, and what a wrong one would do.

200 positions: past the sliding window (128).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import DSPARK, Checkpoint, random_checkpoint
from support.dspark_reference import DSparkReference

from ownpath.cache.pools import SequenceCache
from ownpath.config import EngineConfig, Parallel
from ownpath.loading import load_model, plan_model, planned_ranks
from ownpath.model.batch import ForwardBatch
from ownpath.model.dspark import Guesses
from ownpath.model.model import Model
from ownpath.plan.sharding import ShardingError

NUM_POSITIONS, VOCAB_SIZE = 200, 96
EPS_F32 = torch.finfo(torch.float32).eps
FLOAT64_TOLERANCE = 1e-9
"""As in test_incremental: only the order of sums differs."""
CASES = [
    ("modelopt-experts-only", "deepseek-native", NUM_POSITIONS),  # NVIDIA's exports
    ("full-nvfp4", "full-nvfp4", NUM_POSITIONS),
    ("bf16", "bf16", 60),
    ("bf16", "bf16", 1),
]
"""(layout of the backbone, layout of the draft, positions of the context)"""


def tokens(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def drafting_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 1) -> Model:
    return load_model(folder, EngineConfig(str(device), dtype, 512, loads_draft=True, rows_per_request=rows))


def step(model: Model, chunks: Sequence[tuple[list[int], SequenceCache]]) -> torch.Tensor:
    """Runs a step and keeps its context: the target layers' rows."""
    assert model.dspark is not None
    batch = ForwardBatch.of(chunks, model.cache_spec.device)
    _, targets = model.hidden_and_targets(batch)
    model.dspark.remember(targets, batch)
    return targets


def guess(model: Model, next_ids: list[int], caches: Sequence[SequenceCache]) -> Guesses:
    assert model.dspark is not None
    return model.dspark.guess(torch.tensor(next_ids, device=model.cache_spec.device), caches)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    folder = tmp_path_factory.mktemp("dspark")
    random_checkpoint(folder, "full-nvfp4", seed=5, draft="deepseek-native", **DSPARK)
    return drafting_model(folder, device, torch.float64)


@pytest.mark.parametrize(("layout", "draft", "count"), CASES, ids=str)
def test_guesses_equal_the_definition(
    layout: str, draft: str, count: int, tmp_path: Path, device: torch.device
) -> None:
    """From the same rows of the target layers: the drafter alone. Roundings add up as a random walk over all sums."""
    checkpoint = random_checkpoint(tmp_path, layout, seed=1, draft=draft, **DSPARK)
    model, token_ids = drafting_model(tmp_path, device), tokens(count + 1)
    cache = model.new_cache()
    targets = step(model, [(token_ids[:-1], cache)])
    found = guess(model, token_ids[-1:], [cache])
    reference = DSparkReference(checkpoint)
    expected_ids, expected, confidence = reference.guess(targets.cpu(), token_ids[-1])
    worst = (found.logits_RBV[0].cpu() - expected).abs().max().item()
    bound = reference.num_summed() ** 0.5 * EPS_F32 * expected.abs().max().item()
    print(f"DSpark {draft}: max |logit difference| {worst:.2e}, bound {bound:.2e}")
    assert found.token_ids_RB.tolist() == [expected_ids]
    assert worst <= bound
    walk = reference.num_summed() ** 0.5 * EPS_F32 * confidence.abs().max()
    assert (found.confidence_RB[0].cpu() - confidence).abs().max() <= walk


def test_the_target_layers_rows_are_their_streams_averaged(model: Model) -> None:
    """Each target layer's, from a backbone that ends behind it."""
    assert model.dspark is not None
    token_ids, device = tokens(140), model.cache_spec.device
    hidden, targets = model.hidden_and_targets(ForwardBatch.of([(token_ids, model.new_cache())], device))
    assert targets.shape == (140, 3 * 64)
    for layer_idx, found in zip(model.dspark.shape.target_layer_ids, targets.chunk(3, dim=-1), strict=True):
        ratios = model.config.compress_ratios[: layer_idx + 1]
        cut = replace(model, blocks=model.blocks[: layer_idx + 1], config=replace(model.config, compress_ratios=ratios))
        streams_TSD = cut.hidden(ForwardBatch.of([(token_ids, cut.new_cache())], device)).streams_TSD
        assert (found - streams_TSD.mean(1)).abs().max() <= FLOAT64_TOLERANCE
    assert (hidden.streams_TSD - streams_TSD).abs().max() <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("size", [1, 3, 64, 129])
def test_chunks_equal_one_shot(size: int, model: Model) -> None:
    """Small chunks begin shortly before the window's end."""
    token_ids, start = tokens(NUM_POSITIONS if size > 3 else 136), 0 if size > 3 else 120
    caches = [model.new_cache(), model.new_cache()]
    step(model, [(token_ids[:-1], caches[0])])
    if start:
        step(model, [(token_ids[:start], caches[1])])
    for begin in range(start, len(token_ids) - 1, size):
        step(model, [(token_ids[begin : min(begin + size, len(token_ids) - 1)], caches[1])])
    whole, chunks = (guess(model, token_ids[-1:], [cache]) for cache in caches)
    for expected, found in zip(vars(whole).values(), vars(chunks).values(), strict=True):
        assert (found - expected).abs().max() <= FLOAT64_TOLERANCE


def test_sequences_side_by_side_equal_each_alone(model: Model) -> None:
    first, second = tokens(150, seed=4), tokens(5, seed=5)
    alone = []
    for ids in (first, second):
        cache = model.new_cache()
        step(model, [(ids, cache)])
        alone.append(guess(model, [7], [cache]).logits_RBV)
    caches = [model.new_cache(), model.new_cache()]
    step(model, [(first, caches[0]), (second, caches[1])])
    found = guess(model, [7, 7], caches).logits_RBV
    assert (found - torch.cat(alone)).abs().max() <= FLOAT64_TOLERANCE


def test_rejected_guesses_leave_no_trace(tmp_path: Path, device: torch.device) -> None:
    """Six rows of a request in a step, four of them taken back: the next block is that of a sequence without them."""
    random_checkpoint(tmp_path, "full-nvfp4", seed=5, draft="deepseek-native", **DSPARK)
    model, token_ids = drafting_model(tmp_path, device, torch.float64, rows=6), tokens(160)
    caches = [model.new_cache(), model.new_cache()]
    for cache in caches:
        step(model, [(token_ids[:150], cache)])
    step(model, [(token_ids[150:152], caches[0])])
    step(model, [([*token_ids[150:152], 1, 2, 3, 4], caches[1])])
    caches[1].num_tokens = 152
    guess(model, [9], [caches[1]])  # a block's own keys are not kept
    expected, found = (guess(model, [9], [cache]).logits_RBV for cache in caches)
    assert (found - expected).abs().max() <= FLOAT64_TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 20000.0}, {"sliding_window": 127}, {"hc_sinkhorn_iters": 1}, {"dspark_noise_token_id": 5}],
    ids=str,
)
def test_the_comparison_would_see_a_wrong_constant(change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, "bf16", seed=1, draft="bf16", **DSPARK)
    other = Checkpoint(tmp_path, checkpoint.config, checkpoint.fields | change, checkpoint.decoded)
    targets = torch.randn(NUM_POSITIONS, 3 * 64, generator=torch.Generator().manual_seed(0))
    right, wrong = (DSparkReference(one).guess(targets, 7)[1] for one in (checkpoint, other))
    walk = DSparkReference(checkpoint).num_summed() ** 0.5 * EPS_F32
    assert (right - wrong).abs().max() > 10 * walk * right.abs().max()


def test_ranks_are_refused_by_name(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", seed=1, draft="bf16", **DSPARK)
    with pytest.raises(ShardingError, match="DSpark runs on one rank"):
        planned_ranks(tmp_path, EngineConfig(max_model_len=64, loads_draft=True, parallel=Parallel(0, 2)))
    assert plan_model(tmp_path, "cpu", loads_draft=True).draft.num_modules == 3
