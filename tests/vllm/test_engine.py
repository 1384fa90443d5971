"""The embedded model inside vLLM: answers, what ran, and how far log-probs may be."""

from pathlib import Path

import pytest
import torch
from conftest import Answers, ask, greedy, near_ties, prompts, reference, scores, text_ids

from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir

pytestmark = pytest.mark.vllm
# 560 tokens have 140 compressed keys, more than the 128 that an indexer chooses.
TEXTS = [text_ids(60), text_ids(560)]
NUM_LAYERS, NUM_SLOTS, NUM_INDEXERS = 4, 30, 2
ROUTER_BIASES = {f"model.layers.{at}.ffn.experts.routed_experts.e_score_correction_bias" for at in range(NUM_LAYERS)}
"""The router's own parameter, to which vLLM's experts hold a second name. No product multiplies it."""
OPTIONS = {"prompts": prompts(), "texts": TEXTS, "engine": {"max_model_len": 1024, "max_num_batched_tokens": 1024}}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return ask(default_model_dir(), tmp_path_factory.mktemp("tiny") / "out.json", OPTIONS)


def test_greedy_ids_are_ours(answers: Answers) -> None:
    model = reference(default_model_dir())
    assert answers.ids == [greedy(model, ids, 4) for ids in prompts()]
    assert answers.texts == [" Paris.", " Tokyo."]


def test_every_layer_that_we_claim_ran_through_our_runners(answers: Answers) -> None:
    """Each slot once a step; an indexer's queries where it must choose. No layer of ours has a weight."""
    (rank,) = answers.ranks
    assert len(rank["shares"]) == len(rank["kernels"]) == NUM_SLOTS
    assert set(rank["parameters"]) <= ROUTER_BIASES
    calls = {slot: count for slot, count in rank["calls"].items() if "indexer" not in slot}
    assert len(calls) == NUM_SLOTS - NUM_INDEXERS
    assert len(set(calls.values())) == 1, calls
    assert set(rank["calls"]) == set(rank["shares"])
    assert {"OwnpathLinearMethod", "OwnpathExpertsMethod", "OwnpathGroupMethod"} <= set(rank["methods"])


def test_the_log_says_which_kernel_runs_where(answers: Answers) -> None:
    assert f"ownpath runs {NUM_SLOTS} products" in answers.log
    assert "ownpath: layers.{0-3}.ffn.experts: modelopt-nvfp4, ref.nvfp4_moe (row_major): " in answers.log
    assert "ownpath: layers.{0-3}.attn.wo_a: bf16, ref.grouped_linear" in answers.log
    assert "cute.nvfp4_moe needs sm_90, this is CPU" in answers.log
    assert "vLLM: ffn.gate (unquantised): vLLM multiplies it without asking" in answers.log


def test_log_probs_are_within_what_the_caches_format_does(answers: Answers) -> None:
    """vLLM rounds activations to BF16 and keys to FP8. Our own model does both too, elsewhere and in another order.

    Each rounding moves a log-prob by its own amount. Two independent sets of the same roundings differ by at most twice
    what one of them does on average, and by four times at most; but rows that may go to another expert are not bounded.
    """
    folder = default_model_dir()
    exact, rounded = reference(folder), reference(folder, torch.bfloat16, CacheFormat.FP8)
    for ids, found in zip(TEXTS, answers.logprobs, strict=True):
        right = scores(exact, ids)
        moved, off = (scores(rounded, ids) - right).abs(), (torch.tensor(found) - right).abs()
        bounded = ~near_ties(exact, rounded, ids)[:-1]
        print(f"{len(ids)} tokens: off by {off.mean():.4f} on average and {off.max():.4f} at most, "
              f"{off[bounded].max():.4f} in {int(bounded.sum())} rows without a near tie; ours with the same roundings "
              f"{moved.mean():.4f} and {moved.max():.4f}")  # fmt: skip
        assert float(off.median()) <= 2 * float(moved.median())
        assert float(off[bounded].mean()) <= 2 * float(moved.mean())
        assert float(off[bounded].max()) <= 4 * float(moved.max())
        assert int(bounded.sum()) >= len(ids) // 2


def test_two_ranks_answer_the_same(tmp_path: Path) -> None:
    """TP by width: half of the heads, of the groups and of each expert's width on each rank."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = ask(default_model_dir(), tmp_path / "out.json", {"prompts": prompts(), "engine": engine})
    model = reference(default_model_dir())
    assert found.ids == [greedy(model, ids, 4) for ids in prompts()]
    assert len(found.ranks) == 2
    for rank in found.ranks:
        assert set(rank["parameters"]) <= ROUTER_BIASES
        assert rank["shares"]["layers.0.attn.wq_b"] == [4 * 512 // 2, 128]
        assert rank["shares"]["layers.0.attn.wqa_wkv"] == [128 + 512, 256]
        assert rank["shares"]["layers.0.attn.wo_b"] == [256, 2 * 128 // 2]
        assert rank["shares"]["layers.0.ffn.experts"] == [256, 256]


def test_two_ranks_of_experts_answer_the_same(tmp_path: Path) -> None:
    """EP: half of the experts on each rank, at their whole width; the rest as in TP."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True}
    found = ask(default_model_dir(), tmp_path / "out.json", {"prompts": prompts(), "engine": engine})
    model = reference(default_model_dir())
    assert found.ids == [greedy(model, ids, 4) for ids in prompts()]
    for rank in found.ranks:
        assert rank["shares"]["layers.0.ffn.experts"] == [512, 256]
        assert rank["counts"]["taken"] < 400
