"""Random models in four exports inside vLLM, on one rank and on two: our own engine's greedy ids, and log-probs as near
to our float32 model's as the roundings of vLLM's BF16 activations and FP8 cache let them be.

Nothing in a random model is sure of itself, so a prompt is asked for its greedy answer only if ours is sure: in our own
model no step of the answer has a near tie of experts, and the likeliest token leads by four times what roundings move
it.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answers, ask_each, near_ties, reference, scores, text_ids
from support.checkpoints import random_checkpoint

from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

pytestmark = pytest.mark.vllm
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}, "ignore": []}
CLAIMS: dict[str, dict[str, Any]] = {
    "modelopt-experts-only": FP8 | {"moe_quant_algo": "NVFP4"},
    "full-nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors": COMPRESSED,
    "deepseek-native": FP8,
}
"""Layout -> what config.json claims of formats."""
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
RANKS: dict[str, dict[str, Any]] = {"TP 1": {}, "TP 2": TWO, "TP 2 + EP": TWO | {"enable_expert_parallel": True}}
NUM_PROMPTS, NUM_TOKENS, TEXT, LONGEST = 2, 2, 60, 400
FOLDERS: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of the embedded one's shapes in each layout, of other random weights."""
    fields = json.loads((default_model_dir() / "config.json").read_text())
    del fields["quantization_config"]
    for seed, (layout, claim) in enumerate(CLAIMS.items(), start=20):
        folder = tmp_path_factory.mktemp("oracle") / layout
        made = random_checkpoint(folder, layout, seed, **fields)
        claims = {"quantization_config": claim, "expert_dtype": "fp4"}
        (folder / "config.json").write_text(json.dumps(made.fields | claims))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(default_model_dir() / name, folder)
        FOLDERS[layout] = folder
    return FOLDERS


@dataclass(frozen=True)
class Ours:
    """Our own models of a layout. right, moved: log-probs of the text in float32, and how far the roundings
    move each. is_bounded: rows without a near tie of experts. prompts, answers: see the module's first lines."""

    right: torch.Tensor
    moved: torch.Tensor
    is_bounded: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]


@cache
def ours(layout: str) -> Ours:
    exact, rounded = reference(FOLDERS[layout]), reference(FOLDERS[layout], torch.bfloat16, CacheFormat.FP8)
    ids = text_ids(TEXT)
    right = scores(exact, ids)
    moved = (scores(rounded, ids) - right).abs()
    bounded = ~near_ties(exact, rounded, ids)[:-1]
    return Ours(right, moved, bounded, *sure_prompts(exact, rounded, 4 * float(moved[bounded].max())))


def sure_prompts(exact: Model, rounded: Model, lead: float) -> tuple[list[list[int]], list[list[int]]]:
    """Finds beginnings of a random text whose greedy answer is sure in every step."""
    text = torch.randint(3, 2500, (LONGEST,), generator=torch.Generator().manual_seed(7)).tolist()
    prompts, answers = list[list[int]](), list[list[int]]()
    for row in sure_rows(exact, rounded, text, lead)[0].nonzero().flatten().tolist():
        ids, answer = text[: row + 1], list[int]()
        while len(answer) < NUM_TOKENS:
            is_sure, likeliest = sure_rows(exact, rounded, [*ids, *answer], lead)
            if not is_sure[-1]:
                break
            answer.append(int(likeliest[-1]))
        else:
            prompts.append(ids)
            answers.append(answer)
        if len(prompts) == NUM_PROMPTS:
            return prompts, answers
    raise AssertionError("too few sure answers")


def sure_rows(exact: Model, rounded: Model, ids: list[int], lead: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which rows are sure of the next token, and that token."""
    batch = ForwardBatch.of([(ids, exact.new_cache())], "cpu", all_logits=True)
    top = exact.forward(batch).float().topk(2)
    return (top.values[:, 0] - top.values[:, 1] > lead) & ~near_ties(exact, rounded, ids), top.indices[:, 0]


@pytest.fixture(scope="module", params=RANKS)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """All layouts, one engine after the other in one process."""
    prompts = {str(FOLDERS[layout]): ours(layout).prompts for layout in CLAIMS}
    options = {"prompts": prompts, "texts": [text_ids(TEXT)], "engine": RANKS[request.param], "num_tokens": NUM_TOKENS}
    out = tmp_path_factory.mktemp("answers") / "out.json"
    found = ask_each([FOLDERS[layout] for layout in CLAIMS], out, options)
    return dict(zip(CLAIMS, found, strict=True))


@pytest.mark.parametrize("layout", CLAIMS)
def test_a_random_model_answers_as_ours(layout: str, answers: dict[str, Answers]) -> None:
    """Distances as for the embedded model: two sets of the same roundings differ by twice what one moves on average, by
    four times at most."""
    found, own = answers[layout], ours(layout)
    assert found.ids == own.answers
    off = (torch.tensor(found.logprobs[0]) - own.right).abs()
    bounded = own.is_bounded
    print(f"{layout}: off by {off.mean():.4f} on average and {off.max():.4f} at most, {off[bounded].max():.4f} in "
          f"{int(bounded.sum())} rows without a near tie; there ours with the same roundings "
          f"{own.moved[bounded].mean():.4f} and {own.moved[bounded].max():.4f}")  # fmt: skip
    assert float(off.median()) <= 2 * float(own.moved.median())
    assert float(off[bounded].mean()) <= 2 * float(own.moved[bounded].mean())
    assert float(off[bounded].max()) <= 4 * float(own.moved[bounded].max())
    assert int(bounded.sum()) >= TEXT // 4


@pytest.mark.parametrize("layout", CLAIMS)
def test_every_product_is_ours_on_every_rank(layout: str, answers: dict[str, Answers]) -> None:
    found = answers[layout]
    for rank in found.ranks:
        assert len(rank["kernels"]) == 30
        assert not [name for name in rank["parameters"] if not name.endswith("e_score_correction_bias")]
    experts = [rank["shares"]["layers.0.ffn.experts"] for rank in found.ranks]
    wo_b = [rank["shares"]["layers.0.attn.wo_b"] for rank in found.ranks]
    assert wo_b == [[256, 256 // len(found.ranks)]] * len(found.ranks)
    assert experts in ([[512, 256]], [[256, 256]] * 2, [[512, 256]] * 2)
