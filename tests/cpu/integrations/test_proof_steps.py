"""Steps of an engine: each kind and size is reached, and every row is found again, whatever order they have."""

from collections.abc import Sequence

import pytest

from ownpath.integrations.vllm.proof.steps import (
    FIRST_LENGTH,
    ROWS,
    SPARE_LENGTH,
    Driver,
    Planned,
    Scheduled,
    StepLimits,
    place_rows,
)

TEXT = [7, 8, 9, 7, 8, 11, 12, 13, 14, 15, 7, 8, 9, 7, 8, 20, 21, 22, 23, 24] * 40
ANSWERS = list(range(500, 900))


class Chunks:
    """An engine that reads prompts in chunks, oldest first, and decodes what is read."""

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits
        self.left: dict[str, int] = {}
        self.answers: dict[str, int] = {}

    def add(self, sequence: str, prompt: Sequence[int], answer: int, num_answers: int) -> None:
        assert len(prompt) + num_answers <= self.limits.length
        self.left[sequence], self.answers[sequence] = len(prompt), num_answers

    def stop(self, sequence: str) -> None:
        self.left.pop(sequence, None)

    def step(self) -> Scheduled:
        room, rows, answered = self.limits.rows, dict[str, int](), []
        for name in list(self.left)[: self.limits.sequences]:
            rows[name] = min(self.left[name], room)
            room -= rows[name]
            self.left[name] -= rows[name]
            if rows[name] and not self.left[name]:
                answered.append(name)
                self.left[name] = 1
                self.answers[name] -= 1
                if not self.answers[name]:
                    del self.left[name]
        return Scheduled(rows, answered)


def judged(limits: StepLimits, sizes: Sequence[int]) -> tuple[list[tuple[str, int]], list[str], list[Planned]]:
    steps: list[Planned] = []
    refused = list(Driver(Chunks(limits), TEXT, ANSWERS, steps.append).run(sizes))
    return [(step.kind, step.num_rows) for step in steps if step.is_judged], refused, steps


def test_every_kind_and_size_is_reached() -> None:
    found, refused, steps = judged(StepLimits(1024, 64, 1024), (1, 2, 5, 64, 130))
    assert found == [
        *(("prefill", size) for size in (1, 2, 5, 64, 130)),
        *(("decode", size) for size in (1, 2, 5, 64)),
        *(("mixed", size) for size in (2, 5, 64, 130)),
    ]
    assert refused == [
        "decode of 130 rows: at most 64 sequences decode together",
        "mixed of 1 rows: one row is of one kind",
    ]
    mixed = [step for step in steps if step.is_judged and step.kind == "mixed"]
    assert [sorted(len(ids) for _, ids in step.rows.values()) for step in mixed] == [
        [1, 1],
        [1, 4],
        [1] * 5 + [59],
        [1] * 5 + [125],
    ]
    assert max(start for step in mixed for start, _ in step.rows.values()) >= 130


def test_prompts_that_do_not_fit_a_step_are_read_in_chunks() -> None:
    found, refused, _ = judged(StepLimits(32, 16, 200), (1, 16, 64))
    assert ("decode", 16) in found
    assert refused[0] == "prefill of 64 rows: a step has at most 32 rows of one sequence"


def test_every_row_of_a_sequence_is_read_once_and_in_order() -> None:
    _, _, steps = judged(StepLimits(48, 16, 400), (1, 5, 16))
    read: dict[str, int] = {}
    for step in steps:
        for name, (start, ids) in step.rows.items():
            assert start == read.get(name, 0)
            read[name] = start + len(ids)
            if start + len(ids) <= 9:
                assert list(ids) == TEXT[start : start + len(ids)] or ids[-1] >= 500


def test_rows_are_found_in_any_order() -> None:
    """Prompts that begin alike, one inside the other; and rows that decode at positions next to each other."""
    rows = {"a": (0, (7, 8)), "b": (0, (7, 8, 9, 7)), "c": (5, (501,)), "d": (6, (502,))}
    planned = Planned("mixed", 8, rows, True)
    parts = place_rows([502, 7, 8, 9, 7, 501, 7, 8], [6, 0, 1, 2, 3, 5, 0, 1], planned)
    assert [(part.sequence, part.start, part.first_row, part.count) for part in parts] == [
        ("d", 6, 0, 1),
        ("b", 0, 1, 4),
        ("c", 5, 5, 1),
        ("a", 0, 6, 2),
    ]


def test_a_row_of_nobody_is_an_error() -> None:
    planned = Planned("decode", 1, {"a": (3, (501,))}, True)
    with pytest.raises(ValueError, match=r"row 0 \(token 9, position 3\) of a decode of 1 rows"):
        place_rows([9], [3], planned)


@pytest.mark.parametrize(
    ("sizes", "others"),
    [
        (ROWS, set()),
        ((1, 2, 5), {149}),  # what five prompts take
        ((1, 16, 64), {130, 149, 130 + 2 * 37 + 16, 130 + 10 * 37 + 16}),  # the shorter ones cannot grow so far
        ((700,), set()),
    ],
)
def test_steps_that_only_fill_caches_have_sizes_that_are_asked_for(sizes: Sequence[int], others: set[int]) -> None:
    """Engines compile kernels for new numbers of rows: there is no step of a number that nobody asked for."""
    limits = StepLimits(1024, 136, max(*sizes, FIRST_LENGTH) + SPARE_LENGTH)
    _, _, steps = judged(limits, sizes)
    assert {step.num_rows for step in steps} <= {*sizes} | others
    assert len([step for step in steps if not step.is_judged]) <= len(sizes) + 2
    decoding = [step for step in steps if step.is_judged and step.kind == "decode"]
    assert all(max(start for start, _ in step.rows.values()) >= FIRST_LENGTH for step in decoding)
    assert all(len({start for start, _ in step.rows.values()}) > 1 for step in decoding if step.num_rows > 1)
