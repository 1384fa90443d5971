"""Drafts of a whole model with a random MTP module, in float64: the answers without, and guesses as of one forward."""

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.engine.drafting_model import Always
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.config import EngineConfig
from ownpath.engine.decoder import Decoder
from ownpath.engine.draft_decoder import ROWS, DraftBegun, DraftDecoder, DraftedTokens
from ownpath.engine.drafting import Drafts, make_drafts
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

VOCAB, MAX_ROWS, WAIT_S = 96, 3, 60


@pytest.fixture(scope="module")
def config(device: torch.device) -> EngineConfig:
    return EngineConfig(
        str(device), torch.float64, 320, MAX_ROWS, max_prefill_tokens=64, loads_draft=True, rows_per_request=ROWS
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, config: EngineConfig) -> Model:
    folder: Path = tmp_path_factory.mktemp("drafts")
    random_checkpoint(folder, "full-nvfp4", seed=21, draft="deepseek-native", **THREE_LAYERS)
    return load_model(folder, config)


class Watched(DraftDecoder):
    """Notes what was guessed of one request: position -> token, and how many tokens counted before."""

    guessed: dict[int, int]
    num_kept: list[int]

    def finish(self, begun: DraftBegun) -> DraftedTokens:
        found = super().finish(begun)
        self.guessed[begun.held.positions[0] + 1] = found.guesses[0]
        self.num_kept.append(len(found.token_ids[0]))
        return found


def said(heard: "queue.SimpleQueue[StepOutput]") -> list[int]:
    ids: list[int] = []
    while True:
        output = heard.get(timeout=WAIT_S)
        assert output.error is None
        ids += [] if output.token is None else [output.token.token_id]
        if output.finish_reason is not None:
            return ids


def answers(
    model: Model, config: EngineConfig, wanted: list[tuple[list[int], SamplingParams]], drafts: Drafts | None
) -> tuple[list[list[int]], Engine]:
    prefix = PrefixCache(model.caches, PrefixSettings(4))
    decoder = Decoder(model, MAX_ROWS, VOCAB) if len(wanted) > 1 else None
    engine = Engine(model, config, VOCAB, end_token_ids=(), decoder=decoder, prefix=prefix, drafts=drafts)
    engine.start()
    asked = []
    for ids, params in wanted:
        heard: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        engine.submit([Request(ids, params, heard.put)])
        asked.append(heard)
    found = [said(heard) for heard in asked]
    engine.stop()
    assert prefix.faults() == []
    prefix.clear()
    assert model.caches.slots.faults() == []
    return found, engine


def test_answers_are_those_without_drafts(model: Model, config: EngineConfig) -> None:
    """Greedy and drawn, more than run together, one of them over the end of a block."""
    wanted = [
        (
            [(n + 5 * i * i) % VOCAB for i in range(length)],
            SamplingParams(5 + n, temperature=0.0 if n % 2 else 1.5, seed=n),
        )
        for n, length in enumerate((3, 252, 40, 7))
    ]
    expected, _ = answers(model, config, wanted, None)
    found, engine = answers(model, config, wanted, Drafts(model, DraftDecoder(model, MAX_ROWS, VOCAB), Always()))
    assert found == expected
    counts = engine.load().drafts
    assert counts.num_steps > 5


def test_guesses_are_those_of_one_forward(model: Model, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the window's end, whether guesses were right or not: the module has seen what it would of the whole text,
    at the same positions. A key at another one would move these logits by 1e-3."""
    decoder, drawn_from, right = Watched(model, MAX_ROWS, VOCAB), list[torch.Tensor](), Model.guess

    def guess(*args: Any) -> torch.Tensor:
        drawn_from.append(right(*args))
        return drawn_from[-1]

    monkeypatch.setattr(Model, "guess", guess)
    decoder.guessed, decoder.num_kept = {}, []
    prompt = [(7 * n * n + n) % VOCAB for n in range(120)]
    (answer,), _ = answers(
        model, config, [(prompt, SamplingParams(16, temperature=0))], Drafts(model, decoder, Always())
    )
    text = [*prompt, *answer]
    batch = ForwardBatch.of([(text[:-1], model.new_cache())], config.device)
    _, hidden = model.forward_drafting(batch)
    next_ids = torch.tensor(text[1:], device=config.device)
    logits = model.draft_forward(hidden, next_ids, batch, torch.arange(len(text) - 1, device=config.device))
    expected = logits.argmax(-1).tolist()
    guessed = {at: token_id for at, token_id in decoder.guessed.items() if at - 2 < len(expected)}
    assert len(guessed) > 6
    assert guessed == {at: expected[at - 2] for at in guessed}
    for at, num_kept, found in zip(guessed, decoder.num_kept, drawn_from, strict=False):
        torch.testing.assert_close(found[num_kept - 1], logits[at - 2], rtol=0, atol=1e-9)


def test_an_engine_is_given_drafts_where_they_are_loaded(model: Model, config: EngineConfig) -> None:
    drafts = make_drafts(model, config, VOCAB)
    assert drafts is not None
    assert drafts.decoder.buckets[-1] == MAX_ROWS
    assert make_drafts(model, EngineConfig(), VOCAB) is None
    with pytest.raises(ValueError, match="--draft: the engine drafts with MTP modules"):
        make_drafts(replace(model, drafts=()), config, VOCAB)
