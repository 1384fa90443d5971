"""Steps with drafts: the answers without them, whoever joins, ends, goes or is sent back, however good guesses are."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cpu.engine.drafting_model import Always, DraftingPagedModel, LateDraftDecoder
from cpu.engine.late_device import LateDecoder, LateDevice, LateMark, Work
from cpu.engine.test_overlap import (
    ENDLESS,
    ENDS,
    MAX_ROWS,
    OTHERS,
    PLAIN,
    RULE,
    VOCAB,
    Asked,
    alone,
    ids_of,
    random_request,
    until,
)

from ownpath.config import EngineConfig
from ownpath.engine.draft_policy import DraftPolicy
from ownpath.engine.drafting import Drafts
from ownpath.engine.engine import Engine
from ownpath.engine.load import DraftCounts
from ownpath.engine.request import FinishReason, NonFinite, SamplingParams, StepOutput


class Never(DraftPolicy):
    """Never drafts."""

    def drafts(self, num_requests: int) -> bool:
        return False


@dataclass
class Served:
    """An engine that drafts, on a late device."""

    engine: Engine
    model: DraftingPagedModel
    decoder: LateDraftDecoder
    plain: LateDecoder
    device: LateDevice

    def start(self, *wanted: tuple[list[int], SamplingParams]) -> list[Asked]:
        asked = [Asked.of(*one) for one in wanted]
        self.engine.submit([one.request for one in asked])
        return asked

    @property
    def counts(self) -> DraftCounts:
        return self.engine.load().drafts


@contextmanager
def served(
    share: float,
    rule: Any = RULE,
    most_s: float = 0.0,
    seed: int = 0,
    policy: DraftPolicy | None = None,
) -> Iterator[Served]:
    device = LateDevice(most_s, seed)
    model = DraftingPagedModel(rule, VOCAB, device, share)
    decoder, plain = LateDraftDecoder(model, MAX_ROWS, VOCAB), LateDecoder(model, MAX_ROWS, VOCAB)
    config = EngineConfig(max_model_len=512, max_num_seqs=MAX_ROWS, max_prefill_tokens=16)
    drafts = Drafts(model, decoder, policy or Always())  # type: ignore[arg-type]  # its steps are made of tokens
    engine = Engine(model, config, VOCAB, end_token_ids=ENDS, decoder=plain, drafts=drafts)
    engine.start()
    try:
        yield Served(engine, model, decoder, plain, device)
    finally:
        device.release()
        engine.stop()
        device.end()
    assert model.caches.slots.faults() == []
    assert not model.caches.slots.owned, "every request gave its slot and blocks back, however it ended"


@pytest.mark.parametrize(
    ("share", "kinds"),
    [(0.0, PLAIN), (0.6, PLAIN), (1.0, PLAIN), (0.6, (*PLAIN, *PLAIN, *OTHERS))],
    ids=["none", "some", "all", "mixed"],
)
def test_answers_are_those_without_drafts(share: float, kinds: Sequence[dict[str, Any]]) -> None:
    """Tokens, log-probs, likeliest tokens and ends, of random joins, ends and aborts."""
    chance = random.Random(int(10 * share))
    wanted = [random_request(chance, kinds) for _ in range(14)]
    expected = [alone(*one) for one in wanted]
    with served(share, most_s=0.001, seed=3) as running:
        asked, aborted = [], set()
        for n, one in enumerate(wanted):
            asked += running.start(one)
            if chance.random() < 0.4:
                time.sleep(chance.random() * 0.01)
            if chance.random() < 0.2:
                aborted.add(victim := chance.randrange(n + 1))
                running.engine.abort(asked[victim].request)
        for n, one in enumerate(asked):
            if n not in aborted:
                assert one.all() == expected[n], wanted[n]
        until(lambda: running.engine.num_open == 0)
        for n in aborted:
            heard = asked[n].heard()
            assert heard == expected[n][: len(heard)]
        counts = running.counts
        if kinds is PLAIN:
            assert counts.num_steps > 10, "else this tests little"
            assert 0.5 * share <= counts.num_right / counts.num_guesses <= 0.2 + share


def test_a_guess_that_is_right_spares_a_step() -> None:
    """All right: an answer of 41 tokens has its first from the step that reads the prompt, and 20 steps of two."""
    for share, num_steps in ((1.0, 20), (0.0, 40)):
        with served(share, ENDLESS) as running:
            (asked,) = running.start(([5, 6], SamplingParams(41, temperature=0)))
            assert len(ids_of(asked.all())) == 41
            until(lambda: not running.engine.is_stepping)
            assert running.decoder.num_uploads <= 3
            assert running.decoder.num_behind > num_steps / 2, "steps are launched before the ones before are read"
            # One step more may be launched before the last is read.
            assert 1 + num_steps <= running.counts.num_steps <= 2 + num_steps
            assert running.counts.num_right >= (20 if share else 0)


def test_a_failed_step_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [([9 + n, 5], SamplingParams(20, temperature=0.9, seed=n)) for n in range(3)]
    expected = [alone(*one) for one in wanted]
    with served(0.6) as running:
        verify, fails = running.model.verify, iter([False] * 4 + [True])

        def failing(*args: Any) -> Any:
            if next(fails, False):
                raise RuntimeError("a kernel failed")
            return verify(*args)

        def at_once(work: Work, turn: int) -> LateMark:
            running.device.put(lambda: None).wait()
            work()  # on the engine's thread, which sees it fail
            return running.device.put(lambda: None)

        monkeypatch.setattr(running.model, "verify", failing)
        monkeypatch.setattr(running.decoder, "_enqueue", at_once)
        asked = running.start(*wanted)
        assert [one.all() for one in asked] == expected
        assert running.engine.load().counts.num_step_retries > 0


@pytest.mark.parametrize("bad_from", [9, 10])
def test_logits_that_are_not_finite_end_their_request_alone(bad_from: int) -> None:
    """In a first row, or in a second one that would count."""

    def rule(history: tuple[int, ...]) -> torch.Tensor:
        is_bad = history[0] == 60 and len(history) >= bad_from
        return torch.full((VOCAB,), torch.nan) if is_bad else ENDLESS(history)

    with served(1.0, rule) as running:
        bad, good = running.start(*(([first, 7], SamplingParams(30, temperature=0)) for first in (60, 61)))
        heard = bad.all()
        assert len(ids_of(heard)) == bad_from - 2
        assert heard[-1].non_finite is NonFinite.LOGITS
        assert len(ids_of(good.all())) == 30


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    """Tokens of the same distribution whatever came before, half of whose guesses are right: a chi-square test."""
    logits = torch.tensor([1.5, 0.5, -0.5, 0.0, 1.0, -1.0, 0.2, -0.2])
    whole, found = torch.full((VOCAB,), -40.0), Counter[int]()
    whole[10:18] = logits
    with served(0.5, lambda history: whole) as running:
        for one in running.start(*(([5], SamplingParams(200, seed=n)) for n in range(10))):
            found.update(ids_of(one.all())[1:])
        assert running.counts.num_right > 250
    expected = logits.softmax(0) * found.total()
    chi2 = float(((torch.tensor([found[10 + n] for n in range(8)]) - expected).square() / expected).sum())
    assert found.total() == 1990
    assert chi2 < 42.7, "of 7 degrees of freedom: once in 2.6 million"


def test_a_policy_that_declines_leaves_plain_steps() -> None:
    with served(1.0, ENDLESS, policy=DraftPolicy(most_requests=2)) as running:
        asked = running.start(*(([5 + n], SamplingParams(30, temperature=0)) for n in range(3)))
        assert [len(ids_of(one.all())) for one in asked] == [30] * 3
        assert running.counts.num_steps == 0
        assert len(running.model.rows) >= 29


@pytest.mark.parametrize("policy", [Always(), Never()], ids=["drafts", "plain"])
def test_an_engine_without_requests_reads_its_last_step_and_rests(policy: DraftPolicy) -> None:
    """An answer that a token ends leaves a step that goes on from it; a plain one was never read and kept its cache."""
    with served(1.0, policy=policy) as running:
        ends = set()
        for prompt in range(5, 15):
            (asked,) = running.start(([prompt], SamplingParams(40, temperature=0.9, seed=prompt)))
            ends.add(asked.all()[-1].finish_reason)
            until(lambda: not running.engine.load().slots.used)
        assert FinishReason.STOP in ends
        steps = running.engine.num_steps
        time.sleep(0.05)
        assert running.engine.num_steps == steps


def expected(prompt: list[int], params: SamplingParams) -> list[StepOutput]:
    """The answer by plain steps, of a model that ends none."""
    with served(0.0, ENDLESS, policy=DraftPolicy(most_requests=0)) as running:
        (asked,) = running.start((prompt, params))
        return asked.all()


@pytest.mark.parametrize("policy", [Never(), Always()], ids=["plain", "drafts"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 40])
def test_short_prompts_are_read_by_graphs(policy: DraftPolicy, length: int) -> None:
    """Two tokens a step where steps draft; long ones by the model's ``forward``, and by the module with it. Where none
    does the module reads nothing. Answers are the same."""
    wanted = [9 + n for n in range(length)], SamplingParams(20, seed=3)
    with served(1.0, ENDLESS, policy=policy) as running:
        (asked,) = running.start(wanted)
        assert asked.all() == expected(*wanted)
        drafts = isinstance(policy, Always)
        assert running.model.has_read is (drafts and length > 16)
        if drafts and length <= 16:
            until(lambda: not running.engine.is_stepping)
            # All guesses are right, the first of them if a whole step has read the prompt's last token but one.
            num_reading, num_left = divmod(length, 2)
            num_answering = (20 - (not num_left) - (length == 1) + 1) // 2
            assert running.counts.num_steps - num_reading - num_answering in (0, 1)
            # Each is launched before the one before is read, but the first ones.
            assert running.decoder.num_behind >= running.counts.num_steps - 3


def test_prompts_are_read_beside_answers_that_draft() -> None:
    """Steps go on with two rows of each request; what is read is known, and counts for no guess."""
    long, short = ([5, 6], SamplingParams(60, seed=1)), ([7, *range(20, 33)], SamplingParams(20, seed=2))
    with served(1.0, ENDLESS) as running:
        (first,) = running.start(long)
        until(lambda: running.counts.num_steps > 3)
        (second,) = running.start(short)
        assert second.all() == expected(*short)
        assert first.all() == expected(*long)
        assert not running.model.has_read
        assert running.counts.num_guesses == running.counts.num_right
