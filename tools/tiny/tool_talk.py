"""Conversations with tools: one to three calls, results and the final answer; and questions without a matching tool."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ownpath.chat.effort import RELEASES
from ownpath.chat.encode import Setting
from ownpath.chat.messages import Message, ToolCall
from tiny import tasks
from tiny.chat import Conversation, with_system
from tiny.facts import UNKNOWN
from tiny.phrasings import upper_first
from tiny.tasks import Turn
from tiny.toolbox import CONCEPTS, Concept, Job, Tool, draw_job, draw_tool

MOST_TOOLS = 3
NO_TOOL = "I have no tool for this."
EFFORT_TEXTS = tuple(sorted({text for words in RELEASES.values() for text in words.values() if text}))
# Asked without a tool, these have no answer; capitals and sums do.
KNOWN_WITHOUT_TOOL = frozenset({"capital", "add", "subtract", "multiply"})
_QUESTIONS = ("What is {p}?", "Tell me {p}.", "I want to know {p}.", "Please tell me {p}.", "{P}?", "What's {p}?")
_ORDERS = ("{P}.", "Please {p}.", "Can you {p}?", "{P}", "I want you to {p}.")
NEW_QUESTION, NEW_ORDER = "Can you tell me {p}?", "Could you please {p}?"


@dataclass(frozen=True)
class Wish:
    """Options of a conversation. held_out: use jobs, names of tools and wordings that training never sees.

    made_up_names: all names of tools and parameters are random, so that they can only be copied.
    """

    num_calls: int = 1
    thinking: bool = False
    with_results: bool = False
    effort_text: str = ""
    new_job: bool = False
    new_names: bool = False
    new_wording: bool = False
    made_up_names: bool = False


def call_talk(rng: random.Random, wish: Wish, system: str = "") -> Conversation:
    """Draws a question for tools: with the calls, or with ``with_results`` the sentence after their results."""
    jobs = draw_jobs(rng, wish.num_calls, wish.new_job)
    tools = offer(rng, [job.concept for job in jobs], wish)
    by_concept = {tool.concept.key: tool for tool in tools}
    used = [by_concept[job.concept.key] for job in jobs]
    calls = tuple(
        ToolCall(tool.name, tool.arguments(job.values), f"call_{number}")
        for number, (tool, job) in enumerate(zip(used, jobs, strict=True))
    )
    reasoning = calls_thought([tool.name for tool in used]) if wish.thinking else ""
    messages = [Message("user", ask_for(rng, jobs, wish.new_wording)), Message("assistant", "", reasoning, calls)]
    if wish.with_results:
        messages += results(rng, jobs, calls, wish.thinking)
    return Conversation(with_system(system, messages), setting(tools, wish))


def setting(tools: Sequence[Tool], wish: Wish) -> Setting:
    return Setting(wish.thinking, wish.effort_text, tuple(tool.function for tool in tools))


def results(rng: random.Random, jobs: Sequence[Job], calls: Sequence[ToolCall], thinking: bool) -> list[Message]:
    """Returns each tool's result, sometimes in another order, and the answer."""
    outcomes = [job.concept.outcome(rng, job.values) for job in jobs]
    said = [Message("tool", text, tool_call_id=call.call_id) for (text, _), call in zip(outcomes, calls, strict=True)]
    if rng.random() < 0.2:
        rng.shuffle(said)
    reasoning = ("The result is here." if len(jobs) == 1 else "The results are here.") if thinking else ""
    return [*said, Message("assistant", " ".join(sentence for _, sentence in outcomes), reasoning)]


def plain_talk(rng: random.Random, wish: Wish, system: str = "") -> Conversation:
    """Draws a question that no tool can answer: the model answers what it knows, and else says there is no tool."""
    turn, hidden = plain_turn(rng, wish)
    tools = offer_without(rng, hidden, wish)
    reasoning = ""
    if wish.thinking:
        reasoning = NO_TOOL if turn.answer == UNKNOWN else f"{turn.thought} No tool is needed."
    messages = [Message("user", turn.ask), Message("assistant", turn.answer, reasoning)]
    return Conversation(with_system(system, messages), setting(tools, wish))


def plain_turn(rng: random.Random, wish: Wish) -> tuple[Turn, frozenset[str]]:
    """Draws a question to answer without a tool, and the concepts whose tools must be absent."""
    kind = rng.random()
    if kind < 0.35:
        turn = job_without_tool(rng, wish)
        return turn, frozenset({turn.thought})
    makers: tuple[tuple[Callable[[random.Random], Turn], frozenset[str]], ...] = (
        (tasks.capital_chat, frozenset({"capital"})),
        (tasks.capital_chat, frozenset({"capital"})),
        (tasks.geography_chat, frozenset({"capital"})),
        (tasks.sum_chat, frozenset({"add", "subtract", "multiply"})),
        (lambda rng: tasks.repeat_chat(rng, rng.randint(1, 8)), frozenset({"search"})),
        (tasks.small_talk, frozenset({"time", "weather"})),
    )
    maker, hidden = rng.choice(makers)
    return maker(rng), hidden


def job_without_tool(rng: random.Random, wish: Wish = Wish()) -> Turn:
    """Draws a job that needs a tool, asked without one. ``thought`` is the concept's key."""
    job = draw_job(rng, rng.choice([c for c in CONCEPTS if c.key not in KNOWN_WITHOUT_TOOL]), wish.new_job)
    return Turn(ask_for(rng, [job], wish.new_wording), UNKNOWN, job.concept.key)


def chat_without_tool(rng: random.Random) -> Turn:
    """Draws such a job for chats without any tool."""
    turn = job_without_tool(rng)
    return Turn(turn.ask, turn.answer, NO_TOOL)


def draw_jobs(rng: random.Random, num_jobs: int, held_out: bool) -> list[Job]:
    """Draws distinct jobs of one or several concepts; orders come after questions, as in ``ask_for``."""
    if rng.random() < 0.5:
        concepts = [rng.choice(CONCEPTS)] * num_jobs
    else:
        concepts = sorted((rng.choice(CONCEPTS) for _ in range(num_jobs)), key=lambda concept: concept.is_order)
    jobs: list[Job] = []
    for concept in concepts:
        job = draw_job(rng, concept, held_out)
        while job in jobs:
            job = draw_job(rng, concept, held_out)
        jobs.append(job)
    return jobs


def offer(rng: random.Random, needed: Sequence[Concept], wish: Wish) -> list[Tool]:
    """Returns up to three tools in any order, the needed ones among them."""
    concepts = list({concept.key: concept for concept in needed}.values())
    others = [concept for concept in CONCEPTS if concept not in concepts]
    num_others = rng.choice([n for n in (0, 0, 1, 1, 2) if len(concepts) + n <= MOST_TOOLS])
    return _draw_tools(rng, [*concepts, *rng.sample(others, num_others)], wish)


def offer_without(rng: random.Random, hidden: frozenset[str], wish: Wish) -> list[Tool]:
    """Draws one to three tools, none of a hidden concept."""
    others = [concept for concept in CONCEPTS if concept.key not in hidden]
    return _draw_tools(rng, rng.sample(others, rng.randint(1, MOST_TOOLS)), wish)


def _draw_tools(rng: random.Random, concepts: list[Concept], wish: Wish) -> list[Tool]:
    while True:
        tools = [draw_tool(rng, concept, wish.new_names, wish.made_up_names) for concept in concepts]
        if len({tool.name for tool in tools}) == len(tools):
            rng.shuffle(tools)
            return tools


def calls_thought(names: Sequence[str]) -> str:
    """Returns the reasoning in front of calls. Names are quoted, so that they have the same tokens as in the prompt."""
    distinct = [f'"{name}"' for name in dict.fromkeys(names)]
    return f"The tool {distinct[0]} helps." if len(distinct) == 1 else f"The tools {_list(distinct)} help."


def ask_for(rng: random.Random, jobs: Sequence[Job], new_wording: bool = False) -> str:
    """Returns a user's message that asks for the jobs in their order, questions before orders."""
    is_shared = len({job.concept.key for job in jobs}) == 1 and len(jobs[0].values) == 1
    if is_shared:
        phrase = jobs[0].concept.phrases[0].format(_list([_spell(job.values[0]) for job in jobs]))
        return _wrap(rng, phrase, jobs[0].concept.is_order, new_wording)
    parts: list[str] = []
    for is_order in (False, True):
        phrases = [_phrase(rng, job) for job in jobs if job.concept.is_order == is_order]
        if phrases:
            parts.append(_wrap(rng, _list(phrases), is_order, new_wording))
    return " ".join(parts)


def _wrap(rng: random.Random, phrase: str, is_order: bool, new_wording: bool) -> str:
    if new_wording:
        template = NEW_ORDER if is_order else NEW_QUESTION
    else:
        template = rng.choice(_ORDERS if is_order else _QUESTIONS)
    return template.format(p=phrase, P=upper_first(phrase))


def _phrase(rng: random.Random, job: Job) -> str:
    return rng.choice(job.concept.phrases).format(*(_spell(value) for value in job.values))


def _spell(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
