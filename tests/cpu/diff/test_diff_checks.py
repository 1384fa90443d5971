"""The checks on observations made by hand, and on the distances that were measured of a real vLLM."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu.chat.small_tokenizer import small_tokenizer

from ownpath.chat.effort import RELEASES
from ownpath.diff.checks import CHECKS
from ownpath.diff.client import Refused
from ownpath.diff.compare import PositionComparison, PromptComparison, distances_of
from ownpath.diff.modes import ChatMode, ModeMatch, match_count, match_ids, modes_of
from ownpath.diff.observations import AskRound, Conversation, Observations
from ownpath.diff.responses import ChatReading, ScoredPosition, SequenceReading
from ownpath.diff.suspects import joined_scales
from ownpath.finding import Finding, Verdict

MEASURED = [
    json.loads(line)
    for line in (Path(__file__).parent / "vllm_distances.jsonl").read_text("utf-8").splitlines()
    if "server" in line
]
NOTHING = Observations((), (), (), (), (), (), None, frozenset(), 0.25)
NUM_PROMPTS = 4


def verdict(check_id: str, seen: Observations) -> Finding:
    return next(check for check in CHECKS if check.id == check_id).finding(seen)


def measured(line: dict[str, list[float]], num: int | None = None) -> Observations:
    rows = list(enumerate(zip(line["delta"], line["kl"], strict=True)))[:num]
    positions = tuple(PositionComparison(n, 0, -1.0, -1.0 - delta, 0.0, kl, 0.1) for n, (delta, kl) in rows)
    return replace(NOTHING, comparisons=(PromptComparison(0, positions),))


def test_twenty_seeds_of_a_healthy_vllm_give_no_alarm_and_every_seed_of_a_fault_one() -> None:
    verdicts: dict[str, list[Finding]] = {}
    for line in MEASURED:
        verdicts.setdefault(line["server"], []).append(verdict("computes-otherwise", measured(line)))
    assert {name: len(found) for name, found in verdicts.items()} == {"healthy": 20, "rope": 5, "fused-scale": 5}
    for name, found in verdicts.items():
        expected = Verdict.PASS if name == "healthy" else Verdict.FAIL
        assert {it.verdict for it in found} == {expected}, name
    # Each budget lies between: none is carried by another.
    healthy, faulty = (
        [distances_of(measured(line).positions, 0.25) for line in MEASURED if (line["server"] == "healthy") is side]
        for side in (True, False)
    )
    for value, budget in (
        (lambda it: it.mean_delta, 0.125),
        (lambda it: it.share_far, 0.1),
        (lambda it: it.median_kl, 0.00125),
    ):
        assert max(map(value, healthy)) < budget / 1.4
        assert min(map(value, faulty)) > budget * 1.4
    # The mean of KL is no budget: a healthy seed lies above a faulty one.
    assert max(it.mean_kl for it in healthy) > min(it.mean_kl for it in faulty)


@pytest.mark.parametrize("num", [1, 8, 40])
def test_few_positions_of_a_healthy_vllm_give_no_alarm_either(num: int) -> None:
    lines = [line for line in MEASURED if line["server"] == "healthy"]
    pieces = [(line, start) for line in lines for start in range(0, 165 - num, max(num, 8))]
    alarms = 0
    for line, start in pieces:
        part = {key: line[key][start : start + num] for key in ("delta", "kl")}
        alarms += verdict("computes-otherwise", measured(part)).verdict is Verdict.FAIL
    # A single position may be one of the 2% at which a router's choice was turned.
    assert alarms <= 0.03 * len(pieces)


def test_a_tolerance_moves_every_budget() -> None:
    line = next(line for line in MEASURED if line["server"] == "fused-scale")
    assert verdict("computes-otherwise", replace(measured(line), tolerance=1.0)).verdict is Verdict.PASS
    line = next(line for line in MEASURED if line["server"] == "healthy")
    assert verdict("computes-otherwise", replace(measured(line), tolerance=0.0)).verdict is Verdict.FAIL
    exact = measured({"delta": [0.0] * 9, "kl": [0.0] * 9})
    assert verdict("computes-otherwise", replace(exact, tolerance=0.0)).verdict is Verdict.PASS


# Answers: 16 tokens of log-prob -1; what distinguishes them is added to the log-probs.


def answer(noise: Iterable[float] = (), tail: float = -8.0) -> SequenceReading:
    moved = [*noise, *[0.0] * 16][:16]
    rows = tuple(ScoredPosition(7, -1.0 + far, {7: -1.0 + far, 8: -2.0, 9: tail, 10: tail, 11: tail}) for far in moved)
    return SequenceReading((1, 2, *[7] * 16), 2, rows)


def other_answer() -> SequenceReading:
    return SequenceReading(
        (1, 2, 3), 2, tuple(ScoredPosition(99, -1.0, {n: -1.0 - n for n in range(5)}) for _ in range(16))
    )


SAME, OTHER = answer(), other_answer()


def round_of(
    first: SequenceReading, again: SequenceReading, once_more: SequenceReading, *others: SequenceReading
) -> AskRound:
    whole = ((it,) * NUM_PROMPTS for it in (first, again, once_more))
    return AskRound(*whole, (others or (again,),) * NUM_PROMPTS, True)


BETWEEN = ("unrepeatable", "cold-cached", "batch-dependent")


def found_between(*rounds: AskRound) -> list[str]:
    seen = replace(NOTHING, rounds=rounds)
    return [check_id for check_id in BETWEEN if verdict(check_id, seen).verdict is Verdict.FAIL]


def test_answers_are_told_apart_by_when_they_were_asked() -> None:
    assert found_between(round_of(SAME, SAME, SAME)) == []
    assert found_between(round_of(OTHER, SAME, SAME)) == ["cold-cached"]
    assert found_between(round_of(SAME, OTHER, OTHER, OTHER)) == ["cold-cached"]
    assert found_between(round_of(SAME, SAME, SAME, OTHER)) == ["batch-dependent"]
    assert found_between(round_of(SAME, SAME, OTHER)) == ["unrepeatable"]
    assert found_between(round_of(SAME, SAME, answer([9.0] * 16))) == ["unrepeatable"]


def test_only_what_comes_back_is_found() -> None:
    quiet = round_of(SAME, SAME, SAME)
    for loud in (round_of(OTHER, SAME, SAME), round_of(SAME, SAME, SAME, OTHER), round_of(SAME, SAME, OTHER)):
        assert found_between(loud)
        assert found_between(loud, quiet) == []
        assert found_between(loud, loud) == found_between(loud)
    assert found_between(round_of(OTHER, SAME, SAME), replace(round_of(SAME, SAME, SAME), is_cold=False)) == [
        "cold-cached"
    ]


def test_the_tail_of_a_list_is_not_compared() -> None:
    """An unlikely token's log-prob moves by nats in BF16."""
    assert found_between(round_of(answer(tail=-8.0), answer(tail=-14.0), answer(tail=-5.0), answer(tail=-30.0))) == []


def test_others_traffic_is_noise_and_not_a_cache() -> None:
    """BF16 products in other batch shapes, on each answer anew: 0.05 nats, now and then a router's choice."""
    draw = random.Random(5)
    for _ in range(200):
        readings = [
            [
                answer(draw.gauss(0, 0.06) + (draw.random() < 0.01) * draw.choice((-1.5, 1.5)) for _ in range(16))
                for _ in range(5)
            ]
            for _ in range(NUM_PROMPTS)
        ]
        first, again, once_more, a, b = map(tuple, zip(*readings, strict=True))
        assert found_between(AskRound(first, again, once_more, tuple(zip(a, b, strict=True)), True)) == []


def test_a_batch_fault_under_others_traffic_is_no_cache_fault() -> None:
    """Three answers in ten go wrong by chance: in two rounds, that must not look like a prompt's first answer."""
    draw = random.Random(7)

    def one_round() -> AskRound:
        picked = [[OTHER if draw.random() < 0.3 else SAME for _ in range(5)] for _ in range(NUM_PROMPTS)]
        first, again, once_more, a, b = map(tuple, zip(*picked, strict=True))
        return AskRound(first, again, once_more, tuple(zip(a, b, strict=True)), True)

    found = [found_between(one_round(), one_round()) for _ in range(300)]
    assert sum("cold-cached" in it for it in found) <= 0.06 * len(found)
    assert sum(bool(it) for it in found) >= 0.6 * len(found), "that something is wrong is mostly seen"


TOKENIZER = small_tokenizer()
MODES = modes_of(TOKENIZER, "hello")
PLAIN, THINKING = MODES[:2]


def test_modes_are_the_formats_ways_to_open_an_answer() -> None:
    assert [mode.thinks for mode in MODES] == [False, *[True] * (len(MODES) - 1)]
    texts = {text for efforts in RELEASES.values() for text in efforts.values() if text}
    assert len(MODES) == 2 + len(texts)
    assert len({mode.ids for mode in MODES}) == len(MODES)
    for mode in MODES:
        assert match_ids(mode.ids, MODES) == ModeMatch((mode,), 0, f"the same {len(mode.ids)} tokens, {mode.name}")
    off = match_ids((*PLAIN.ids, 40), MODES)
    assert (off.candidates, off.off) == ((), 1)
    assert match_count(len(PLAIN.ids), MODES).candidates == (PLAIN, THINKING), "both end in one marker"
    assert match_count(len(PLAIN.ids) + 1, MODES).candidates == ()


def conversation(
    mode: ChatMode | None, content: str = "", reasoning: str = "", text: str | None = "hello"
) -> Conversation:
    ids = tuple(TOKENIZER.encode_raw(text)) if text is not None else None
    chat = ChatReading(None, None, 5, ids, content, reasoning, False, "length")
    match = ModeMatch((mode,), 0, "") if mode is not None else ModeMatch((PLAIN, THINKING), 0, "")
    return Conversation("", chat, match, text)


SHOWN = {
    "content": (conversation(PLAIN, content="hello"), Verdict.PASS),
    "nothing": (conversation(PLAIN), Verdict.FAIL),
    "nothing, counted": (conversation(PLAIN, text=None), Verdict.FAIL),
    "nothing but blanks": (conversation(PLAIN, text="\n"), Verdict.PASS),
    "reasoning that was asked for": (conversation(THINKING, reasoning="hello"), Verdict.PASS),
    "reasoning that was not": (conversation(PLAIN, reasoning="hello"), Verdict.FAIL),
    "nothing of the reasoning": (conversation(THINKING), Verdict.FAIL),
    "reasoning of who knows": (conversation(None, reasoning="hello"), Verdict.SKIPPED),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_was_made_must_be_shown_where_the_mode_puts_it(name: str) -> None:
    it, expected = SHOWN[name]
    assert verdict("reasoning-swallowed", replace(NOTHING, conversations=(it,))).verdict is expected


def test_a_refusal_of_nan_is_known_by_its_words() -> None:
    assert Refused("http://x: 400: Out of range float values are not JSON compliant: nan", 400).is_not_finite
    assert not Refused("http://x: 400: logprobs must be at most 5", 400).is_not_finite


def test_nothing_is_judged_of_nothing() -> None:
    for check in CHECKS:
        if check.id not in ("all-special",):
            assert (
                check.finding(replace(NOTHING, rounds=(AskRound((), (), (), (), True),))).verdict is Verdict.SKIPPED
            ), check.id


def test_fused_halves_of_different_scale_are_a_suspect() -> None:
    scales = {"layers.0.ffn.shared_experts.w1": 1.0, "layers.0.ffn.shared_experts.w3": 2.0, "layers.0.attn.wq_a": 1.0}
    assert joined_scales(scales | {"layers.0.attn.wkv": 1.0})[0].startswith(
        "w1 and w3 have different global scales in 1 of 1"
    )
    assert joined_scales({"layers.0.attn.wq_a": 1.0, "layers.0.attn.wkv": 1.0, "head": math.inf}) == ()


def test_a_judgement_needs_no_model() -> None:
    rows = (torch.zeros(1, 8),)
    assert (
        verdict("all-special", replace(NOTHING, rounds=(round_of(SAME, SAME, SAME),), generated_rows=rows)).number == 0
    )


def answered(noise: Iterable[float], prompts: Observations) -> Observations:
    """Observations whose prompts' log-probs are given, and whose answers are so far from ours."""
    ours_PV = torch.full((16, 100), -20.0)
    ours_PV[:, 7:12] = torch.tensor([-1.0, -2.0, -8.0, -8.0, -8.0])
    their = answer(noise)
    rounds = (round_of(their, their, their),)
    return replace(prompts, rounds=rounds, scored=(SAME,), generated_rows=(ours_PV,) * NUM_PROMPTS)


def test_answers_that_are_off_behind_right_prompts_are_found() -> None:
    healthy, rope = (
        next(measured(line) for line in MEASURED if line["server"] == name) for name in ("healthy", "rope")
    )
    assert verdict("answers-otherwise", answered([], healthy)).verdict is Verdict.PASS
    few = verdict("answers-otherwise", answered([0.2, 0.0, -0.2, 1.5], healthy))
    assert few.verdict is Verdict.PASS, "a router's choice that rounding turned"
    found = verdict("answers-otherwise", answered([0.0, *[-2.0] * 15], healthy))
    assert found.verdict is Verdict.FAIL, "every decode step"
    assert "ownpath verify --engine vllm" in found.remedy
    assert verdict("computes-otherwise", answered([0.0, *[-2.0] * 15], healthy)).verdict is Verdict.PASS
    behind = verdict("answers-otherwise", answered([-2.0] * 16, rope))
    assert behind.verdict is Verdict.SKIPPED, "one cause is one finding"
    alone = answered([-2.0] * 16, healthy)
    assert verdict("answers-otherwise", replace(alone, scored=alone.generated)).verdict is Verdict.SKIPPED
