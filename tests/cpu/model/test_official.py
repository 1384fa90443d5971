"""Official numerics, each step alone and all together, against a second forward that shares no code with the first.

In float64 both round at the same places and nowhere else, so that they agree to float64's rounding; in float32, values
next to a rounding boundary of E4M3 or E2M1 would fall to either side.
"""

from pathlib import Path

import pytest
import torch
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.config import EngineConfig
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.official import OFFICIAL, PLAIN, Step
from ownpath.oracle.arithmetic import Arithmetic
from ownpath.oracle.forward import reference_draft_logits, reference_logits
from ownpath.oracle.weights import StoredWeights
from ownpath.plan.errors import PlanError
from ownpath.verify.subject import Subject

TOLERANCE = 2**16 * torch.finfo(torch.float64).eps
NUM_TOKENS = 400
LAYOUTS = ("modelopt-experts-only", "full-nvfp4", "compressed-tensors", "deepseek-native", "fp8-experts", "bf16")
CHOICES = {"plain": PLAIN, "official": OFFICIAL} | {step: frozenset({step}) for step in Step}
BY_STORAGE = {
    Step.NVFP4_INPUTS: LAYOUTS[:3],
    Step.FP8_EXPERTS: LAYOUTS[:3],
    Step.FP8_INPUTS: LAYOUTS[:5],
    Step.ROUTING_WEIGHT: LAYOUTS,
}
"""Steps whose kernels depend on how weights are stored. Each other one is tried alone once, and with all everywhere."""
CASES = [(layout, choice) for choice in ("plain", "official") for layout in LAYOUTS]
CASES += [(layout, step) for step in Step for layout in BY_STORAGE.get(step, ("deepseek-native",))]
KEPT = {(layout, "official") for layout in LAYOUTS}
KEPT |= {(layouts[idx], step) for idx, (step, layouts) in enumerate(BY_STORAGE.items())}
KEPT |= {(layout, step) for layout, step in CASES if step not in BY_STORAGE and layout == "deepseek-native"}
"""All steps together in every layout, and each step alone, and none, in one; the others are slow."""


def token_ids(count: int = NUM_TOKENS) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(
    folder: Path, official: frozenset[Step], chunks: list[list[int]], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    model = load_model(folder, EngineConfig(dtype=dtype, official=official))
    cache = model.new_cache()
    steps = [model.forward(ForwardBatch.of([(chunk, cache)], "cpu", all_logits=True)) for chunk in chunks]
    return torch.cat(steps)


def second_forward(folder: Path, official: frozenset[Step], ids: list[int]) -> torch.Tensor:
    """By the oracle that ``ownpath verify`` holds layers against."""
    subject = Subject.of(folder, EngineConfig(official=official))
    return reference_logits(
        subject.plan, StoredWeights(subject.index, subject.device), torch.tensor(ids), exact(official)
    )


def exact(official: frozenset[Step]) -> Arithmetic:
    return Arithmetic(torch.float64, official=official)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each layout."""
    found = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, folder in found.items():
        random_checkpoint(folder, layout, seed=1, **THREE_LAYERS)
    return found


@pytest.mark.parametrize(
    ("layout", "choice"), [pytest.param(*case, marks=() if case in KEPT else pytest.mark.slow) for case in CASES]
)
def test_logits_equal_the_second_forward(layout: str, choice: str, folders: dict[str, Path]) -> None:
    found = logits(folders[layout], CHOICES[choice], [token_ids()])
    expected = second_forward(folders[layout], CHOICES[choice], token_ids())
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("choice", ["plain", "official"])
@pytest.mark.parametrize(
    ("layout", "draft"), [("modelopt-experts-only", "deepseek-native"), ("full-nvfp4", "full-nvfp4")]
)
def test_draft_logits_equal_the_second_forward(layout: str, draft: str, choice: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, layout, seed=1, draft=draft, **THREE_LAYERS)
    ids, official = token_ids(), CHOICES[choice]
    model = load_model(tmp_path, EngineConfig(dtype=torch.float64, official=official, loads_draft=True))
    batch = ForwardBatch.of([(ids[:-1], model.new_cache())], "cpu", all_logits=True)
    hidden = model.drafts[0].hidden(model.hidden(batch), torch.tensor(ids[1:]), batch)
    subject = Subject.of(tmp_path, EngineConfig(official=official, loads_draft=True))
    stored = StoredWeights(subject.index, subject.device)
    expected = reference_draft_logits(subject.plan, stored, torch.tensor(ids), exact(official))
    assert (model.logits(hidden, batch.logits_ids) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("layout", "step"),
    [
        ("deepseek-native", Step.FP8_INPUTS),
        ("full-nvfp4", Step.NVFP4_INPUTS),
        ("bf16", Step.KV),
        ("bf16", Step.INDEXER),
    ],
)
def test_the_comparison_would_see_a_missing_step(layout: str, step: Step, folders: dict[str, Path]) -> None:
    without = logits(folders[layout], OFFICIAL - {step}, [token_ids()])
    expected = second_forward(folders[layout], OFFICIAL, token_ids())
    assert (without - expected).abs().max() > 1e6 * TOLERANCE * expected.abs().max()


def test_chunks_compute_what_one_step_computes(folders: dict[str, Path]) -> None:
    """The cache holds rounded keys, so that a later step reads what the same step would have seen."""
    folder, ids = folders["deepseek-native"], token_ids()
    whole = logits(folder, OFFICIAL, [ids])
    cut = logits(folder, OFFICIAL, [ids[:129], ids[129:300], *([token] for token in ids[300:310]), ids[310:]])
    assert (whole - cut).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_planned_step_runs(layout: str, folders: dict[str, Path]) -> None:
    """The ledger counts each planned operation, those of official numerics included."""
    model = load_model(folders[layout], EngineConfig(dtype=torch.bfloat16, official=OFFICIAL))
    cache = model.new_cache()
    for ids in (token_ids(40), token_ids(1)):  # a prompt, and a decode step
        assert torch.isfinite(model.forward(ForwardBatch.of([(ids, cache)], "cpu"))).all()
    assert set(model.ledger.calls) == set(plan_model(folders[layout], "cpu", official=OFFICIAL).slots)


def test_an_indexer_that_hadamard_cannot_rotate_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "bf16", index_head_dim=48)
    plan_model(tmp_path, "cpu", official=OFFICIAL - {Step.INDEXER})
    with pytest.raises(PlanError, match=r"layers\.\d+\.attn\.indexer\.quantizer: .*needs powers of two, not 48"):
        plan_model(tmp_path, "cpu", official=OFFICIAL)
