"""The engine and the server over the real forward: what is scored is what the model says."""

from collections.abc import Iterator

import pytest
import torch
from cpu.server.harness import MAX_MODEL_LEN, TOKENIZER, Harness, harness
from cpu.server.model_folder import write_model_folder

from ownpath.config import EngineConfig
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

# The same products in other batch shapes: float32 sums of at most a few hundred terms, through 5 layers. Logits are
# of order 1, so 64 of float32's relative steps per layer bound the reordering.
TOLERANCE = 5 * 64 * 2**-23


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return load_model(folder, EngineConfig(device=str(device), max_model_len=MAX_MODEL_LEN))


@pytest.fixture(scope="module")
def served(model: Model, device: torch.device) -> Iterator[Harness]:
    with harness(model, device=str(device)) as running:
        yield running


def direct_logprobs(model: Model, ids: list[int]) -> torch.Tensor:
    batch = ForwardBatch.of([(ids, model.new_cache())], model.cache_spec.device, all_logits=True)
    return model.forward(batch)[:, : TOKENIZER.num_tokens].log_softmax(-1).cpu()


def test_echo_scores_are_those_of_a_direct_forward(model: Model, served: Harness) -> None:
    """A prompt of 150 tokens passes the window and is read in three chunks; the direct forward takes it whole."""
    ids = [16 + (37 * n) % 250 for n in range(150)]
    answer = served.complete(prompt=ids, echo=True, logprobs=1, max_tokens=0)
    scores = answer["choices"][0]["logprobs"]["token_logprobs"]
    expected = direct_logprobs(model, ids)
    assert scores[0] is None
    for position in range(1, len(ids)):
        assert scores[position] == pytest.approx(float(expected[position - 1, ids[position]]), abs=TOLERANCE)


def test_greedy_answers_are_the_models_argmax(model: Model, served: Harness) -> None:
    """Teacher-forced over its own answer, every token is the likeliest, up to a tie within the tolerance."""
    answer = served.chat(temperature=0, max_tokens=24, return_token_ids=True)
    prompt_ids, ids = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    expected = direct_logprobs(model, prompt_ids + ids)[len(prompt_ids) - 1 : -1]
    assert len(ids) == len(expected)
    for row, token_id in zip(expected, ids, strict=True):
        assert float(row[token_id]) >= float(row.max()) - 2 * TOLERANCE


def test_company_does_not_change_a_seeded_answer(served: Harness) -> None:
    fields = {"seed": 5, "max_tokens": 20, "return_token_ids": True}
    alone = served.complete(prompt="hello world", **fields)["choices"][0]
    crowd = served.complete(prompt=["hello", "hello world", "stop stop stop stop"], **fields)["choices"]
    assert crowd[1]["token_ids"] == alone["token_ids"]
