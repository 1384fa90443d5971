"""Memory that ends while the prefix cache keeps blocks, and steps that fail: exact answers of a model that reads every
row which V4 reads, whatever comes together."""

import random
from dataclasses import replace

import pytest
import torch
from cpu.engine.served import Asked, Served
from cpu.engine.stamp_model import StampModel, expected_answer

from ownpath.engine.prefix import PrefixSettings
from ownpath.engine.request import FinishReason
from ownpath.model.batch import ForwardBatch

SETTINGS = PrefixSettings(8)


def prompt(kind: int, num_tokens: int) -> list[int]:
    """Prompts of one kind begin alike."""
    return [(kind + 5 * n + n * n) % 90 for n in range(num_tokens)]


def test_who_was_sent_back_finds_what_is_left_of_its_blocks() -> None:
    """The second request needs a block that the first one has taken; kept blocks of an earlier one went before."""
    with Served(StampModel(1024, cache_blocks=6), SETTINGS) as served:
        assert served.answer(prompt(9, 600), 4)[0] == expected_answer(prompt(9, 600), 4)
        first, second = served.submit(prompt(1, 500), 280), served.submit(prompt(2, 520), 300)
        assert first.tokens() == expected_answer(prompt(1, 500), 280)
        assert second.tokens() == expected_answer(prompt(2, 520), 300)
        counts = served.engine.load().counts
        assert counts.num_preempted == 1
        assert counts.num_blocks_evicted >= 2
        assert counts.num_prefix_hits == 1, "the second one, when it began again"


class Unreliable(StampModel):
    """Every fifth step of several requests fails, before its forward or behind it."""

    def __init__(self) -> None:
        super().__init__(1024, cache_blocks=7)
        self.chance, self.num_failed = random.Random(3), 0

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        dice = self.chance.random() if len(batch.tables.slots) > 1 else 1.0
        if dice < 0.1:
            self.num_failed += 1
            raise RuntimeError("before")
        logits = super().forward(batch)
        if dice < 0.2:
            self.num_failed += 1
            raise RuntimeError("behind")
        return logits


@pytest.mark.parametrize("kept", [None, SETTINGS, replace(SETTINGS, num_tails=4)], ids=["nothing", "blocks", "tails"])
def test_whatever_comes_together(kept: PrefixSettings | None) -> None:
    """Prompts that begin alike, few blocks, clients that leave, and steps that fail: of those that stay each answers
    exactly, once, and at the end all is free."""
    chance, model = random.Random(5), Unreliable()
    with Served(model, kept, 300) as served:
        stay: list[tuple[Asked, list[int]]] = []
        for number in range(60):
            ids, num_tokens = prompt(number % 3, chance.choice((3, 250, 256, 511, 600))), chance.choice((2, 9, 60))
            asked = served.submit(ids, num_tokens)
            if number % 4 == 3:
                if chance.random() < 0.5:
                    asked.next()
                served.engine.abort(asked.request)
            else:
                stay.append((asked, expected_answer(ids, num_tokens)))
        for asked, expected in stay:
            assert asked.tokens() == expected
            assert asked.heard[-1].finish_reason is FinishReason.LENGTH
        counts = served.engine.load().counts
        assert model.num_failed > 5
        assert counts.num_step_retries > 10
        assert (counts.num_prefix_hits > 0) == (kept is not None)
