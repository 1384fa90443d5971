"""The examination: tiny-v4's questions and their right answers.

An answer is right when it is exactly the taught text and the sequence then ends. For chat that text names the country
and its capital in one sentence, so "contains the capital" would be too easy (Mexico City is in Mexico).
"""

import random

from tiny import tasks
from tiny.corpus import chat_document, completion_document
from tiny.exam_talk import talk_questions
from tiny.facts import countries
from tiny.phrasings import CHAT_PHRASINGS, COMPLETION_PHRASINGS, chat_answer, completion_answer
from tiny.question import Question
from tiny.tasks import SUM_CHAT, SUM_COMPLETION, Sum, Turn

LIST_LENGTHS = (3, 8, 14, 30, 60, 120)
NUM_LISTS = 40


def questions(seed: int) -> list[Question]:
    """Returns every capital in every phrasing, every sum once in each form, lists, thinking, tools and JSON."""
    return [*_capitals(), *_sums(), *_lists(random.Random(seed + 1000)), *talk_questions(seed)]


def _capitals() -> list[Question]:
    found = []
    for country in countries():
        for phrasing in CHAT_PHRASINGS:
            turn = Turn(phrasing.ask(country.name), chat_answer(country))
            group = f"capital/chat/{phrasing.template}"
            found.append(Question(group, chat_document([turn]), turn.answer, phrasing.held_out(country)))
        for phrasing in COMPLETION_PHRASINGS:
            turn = Turn(phrasing.ask(country.name), completion_answer(phrasing, country))
            group = f"capital/completion/{phrasing.template}"
            held_out = phrasing.held_out(country)
            found.append(Question(group, completion_document(turn, bos=False), turn.answer, held_out))
            group = f"capital/completion after BOS/{phrasing.template}"
            found.append(Question(group, completion_document(turn, bos=True), turn.answer, held_out))
    return found


def _sums() -> list[Question]:
    found = []
    for problem in tasks.all_sums():
        ask = SUM_CHAT[0].format(s=problem, w=problem.in_words)
        turn = Turn(ask, f"{problem} = {problem.result}")
        found.append(Question(_sum_group(problem, "chat"), chat_document([turn]), turn.answer, problem.held_out))
        turn = Turn(SUM_COMPLETION[0].format(s=problem), f" {problem.result}")
        document = completion_document(turn, bos=False)
        found.append(Question(_sum_group(problem, "completion"), document, turn.answer, problem.held_out))
    return found


def _sum_group(problem: Sum, form: str) -> str:
    return f"sum/{form}/a {problem.sign} b"


def _lists(rng: random.Random) -> list[Question]:
    found = []
    for num_words in LIST_LENGTHS:
        for _ in range(NUM_LISTS):
            text = " ".join(tasks.word_list(rng, num_words))
            turn = Turn(f"Repeat: {text}", text)
            found.append(Question(f"repeat/chat/{num_words} words", chat_document([turn]), turn.answer, True))
            turn = tasks.repeat_completion(rng, num_words)
            document = completion_document(turn, bos=False)
            found.append(Question(f"repeat/completion/{num_words} words", document, turn.answer, True))
    return found
