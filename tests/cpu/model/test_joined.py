"""Joined products give what they give apart, in prompts and decode steps, whatever each module's scales are."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from support.checkpoints import LAYOUTS, THREE_LAYERS, Tensors, full_nvfp4, random_checkpoint

from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import TensorReader
from ownpath.checkpoint.schema import MODELOPT_NVFP4, Encoding
from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.official import PLAIN, Step

PAIRS, STEPS = 8, 6
FLOAT64_TOLERANCE = 1e-9
"""As in ``test_incremental``: 2^-52 grown through 5 layers of sums of some 500 terms, with a margin of 1e3."""
NVFP4_QUERIES = "nvfp4 queries"
SLOTS = ("queries", "x_products")
MODES = [
    *((layout, PLAIN, {"attn.queries", "attn.x_products"}) for layout in ("deepseek-native", "bf16", NVFP4_QUERIES)),
    ("full-nvfp4", PLAIN, {"attn.x_products"}),
    ("compressed-tensors", PLAIN, {"attn.x_products"}),
    ("deepseek-native", frozenset({Step.FP8_INPUTS}), {"attn.queries", "attn.x_products"}),
    (NVFP4_QUERIES, frozenset({Step.NVFP4_INPUTS}), {"attn.x_products"}),
]


def nvfp4_queries(module: str) -> Encoding:
    """As the full export, with the index queries in NVFP4 too."""
    return MODELOPT_NVFP4 if module.endswith(".wq_b") else full_nvfp4(module)


def logits_of(folder: Path, official: frozenset[Step], sizes: Iterable[int]) -> tuple[torch.Tensor, set[str]]:
    """The logits of steps of so many tokens, and the joined slots that ran in layer 1."""
    model = load_model(folder, EngineConfig(dtype=torch.float64, max_model_len=256, official=official))
    generator = torch.Generator().manual_seed(4)
    cache, found = model.new_cache(), []
    for size in sizes:
        token_ids = torch.randint(0, 96, (size,), generator=generator).tolist()
        found.append(model.forward(ForwardBatch.of([(token_ids, cache)], "cpu")))
    ran = {slot.removeprefix("layers.1.") for slot in model.ledger.calls if slot.startswith("layers.1.")}
    return torch.cat(found), {slot for slot in ran if slot.endswith(SLOTS)}


@pytest.mark.parametrize(
    ("layout", "official", "expected"),
    MODES,
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(map(str, value))),
)
def test_joined_equals_apart(
    layout: str,
    official: frozenset[Step],
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit in float64, in prompts of two tokens at a time and decode steps: with so few rows, torch's library
    sums in the order of the terms, however wide the product is."""
    monkeypatch.setitem(LAYOUTS, NVFP4_QUERIES, nvfp4_queries)
    random_checkpoint(tmp_path, layout, seed=3, **THREE_LAYERS)
    sizes = (2,) * PAIRS + (1,) * STEPS
    joined, ran = logits_of(tmp_path, official, sizes)
    assert ran == expected
    monkeypatch.setattr("ownpath.plan.planner.can_join", lambda *_: False)
    apart, ran = logits_of(tmp_path, official, sizes)
    assert not ran
    assert torch.equal(joined, apart)


def test_a_long_prompt_differs_by_the_order_of_sums_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many rows the library splits sums by the sizes of the whole product. Beyond the indexer's top-k."""
    random_checkpoint(tmp_path, "deepseek-native", seed=3, **THREE_LAYERS)
    joined, _ = logits_of(tmp_path, PLAIN, (195, 1, 1))
    monkeypatch.setattr("ownpath.plan.planner.can_join", lambda *_: False)
    apart, _ = logits_of(tmp_path, PLAIN, (195, 1, 1))
    assert (joined - apart).abs().max() <= FLOAT64_TOLERANCE * apart.abs().max()


def test_the_two_input_scales_of_the_queries_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above would see one scale take the place of the other."""
    monkeypatch.setitem(LAYOUTS, NVFP4_QUERIES, nvfp4_queries)
    random_checkpoint(tmp_path, NVFP4_QUERIES, seed=3, **THREE_LAYERS)
    names = [f"layers.1.attn.{part}wq_b.input_scale" for part in ("", "indexer.")]
    with TensorReader(CheckpointIndex.open(tmp_path)) as read:
        tensors: Tensors = {name: read(name) for name in names}
    assert tensors[names[0]] != tensors[names[1]]


def test_index_weights_are_not_rounded(tmp_path: Path) -> None:
    """In bfloat16 too they stay sums of float32, joined or apart."""
    random_checkpoint(tmp_path, "bf16", seed=3, **THREE_LAYERS)
    model = load_model(tmp_path, EngineConfig(dtype=torch.bfloat16, max_model_len=64))
    products = model.blocks[1].attn.x_products
    assert products is not None
    _, weights_TI, _ = products(torch.randn(5, 64).bfloat16())
    assert weights_TI.dtype is torch.float32
    assert not torch.equal(weights_TI.bfloat16().float(), weights_TI)
