"""A seed decides an answer: alone, among 15 others, and with its prompt read in pieces, over a real forward."""

from dataclasses import replace

import pytest
from cpu.chat.small_tokenizer import NUM_TOKENS
from cpu.engine.test_engine_engine import Asked
from cpu.server.model_folder import write_model_folder

from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.request import SamplingParams
from ownpath.loading import load_model
from ownpath.model.model import Model

CROWD, NUM_ANSWER = 16, 6
KINDS = (
    SamplingParams(NUM_ANSWER),
    SamplingParams(NUM_ANSWER, temperature=1.6, top_k=30),
    SamplingParams(NUM_ANSWER, top_p=0.9, min_p=0.001),
    SamplingParams(NUM_ANSWER, frequency_penalty=0.5, logit_bias=((7, 2.0),), min_tokens=3),
)
SEEDS = (0, -1, 2**63 - 1, -(2**63), *range(5, 17))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = EngineConfig("cpu", max_model_len=64, max_num_seqs=CROWD)
    return load_model(write_model_folder(tmp_path_factory.mktemp("model")), config)


def answers(model: Model, asked: list[Asked], max_prefill_tokens: int) -> list[list[int]]:
    """Asked for in one call, so that they begin in one step."""
    config = EngineConfig("cpu", max_model_len=64, max_num_seqs=CROWD, max_prefill_tokens=max_prefill_tokens)
    engine = Engine(model, config, NUM_TOKENS)
    engine.start()
    try:
        engine.submit([one.request for one in asked])
        return [one.token_ids() for one in asked]
    finally:
        engine.stop()


def test_a_seed_gives_the_same_tokens_alone_and_among_sixteen(model: Model) -> None:
    prompts = [[16 + (7 * n + i) % 200 for i in range(1 + 2 * n)] for n in range(CROWD)]
    params = [replace(KINDS[n % len(KINDS)], seed=seed) for n, seed in enumerate(SEEDS)]

    def ask(picked: range) -> list[Asked]:
        return [Asked(prompts[n], params[n]) for n in picked]

    everyone = range(CROWD)
    together = answers(model, ask(everyone), max_prefill_tokens=1000)
    assert answers(model, ask(everyone), max_prefill_tokens=40) == together, "prompts in pieces, in other company"
    for n in (0, 1, 2, 3, CROWD - 1):
        assert answers(model, ask(range(n, n + 1)), max_prefill_tokens=1000) == [together[n]], f"answer {n} alone"


def test_another_seed_gives_other_tokens(model: Model) -> None:
    asked = [Asked([20, 21], SamplingParams(NUM_ANSWER, seed=seed)) for seed in SEEDS]
    assert len({tuple(ids) for ids in answers(model, asked, max_prefill_tokens=1000)}) == CROWD
