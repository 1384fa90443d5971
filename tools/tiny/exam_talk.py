"""The examination's part on thinking, tools and JSON. All conversations are drawn with another seed than training's."""

import random

from ownpath.chat.effort import RELEASES
from ownpath.chat.encode import Setting
from tiny import tasks
from tiny.chat import Conversation
from tiny.corpus import chat
from tiny.facts import countries
from tiny.json_talk import JsonWish, json_talk
from tiny.phrasings import CHAT_PHRASINGS, chat_answer
from tiny.question import Question, talk_question
from tiny.tasks import Turn
from tiny.tool_talk import Wish, call_talk, chat_without_tool, plain_talk

# Questions of each group of tools: plain, and thinking.
_TOOL_GROUPS: tuple[tuple[str, Wish, int, bool], ...] = (
    ("one call", Wish(1), 80, False),
    ("two calls", Wish(2), 50, False),
    ("three calls", Wish(3), 40, False),
    ("after results", Wish(1, with_results=True), 40, False),
    ("after two results", Wish(2, with_results=True), 40, False),
    ("new jobs", Wish(1, new_job=True), 40, True),
    ("new names", Wish(1, new_names=True), 40, True),
    ("new wording", Wish(1, new_wording=True), 40, True),
    ("made-up names", Wish(1, made_up_names=True), 40, True),
)
_NUM_WITHOUT_CALL = 60
_JSON_GROUPS: tuple[tuple[str, JsonWish, int, bool], ...] = (
    ("json/chat/trained names", JsonWish(), 150, False),
    ("json/chat/new names", JsonWish(new_keys=True), 80, True),
    ("json/chat/new countries", JsonWish(new_country=True), 80, True),
    ("json/thinking/trained names", JsonWish(thinking=True), 100, False),
)


def talk_questions(seed: int) -> list[Question]:
    """Returns questions of every group of thinking, tools and JSON."""
    rng = random.Random(seed + 2000)
    return [*_thinking(rng), *_tools(rng, False), *_tools(rng, True), *_json(rng)]


def _thinking(rng: random.Random) -> list[Question]:
    found = []
    for phrasing in CHAT_PHRASINGS[:2]:
        for country in countries():
            turn = Turn(phrasing.ask(country.name), chat_answer(country), f"The question is about {country.name}.")
            found.append(talk_question(f"thinking/capital/{phrasing.template}", _thought(turn)))
    for name, maker, num in (("sums", tasks.sum_chat, 100), ("small talk", tasks.small_talk, 40)):
        found += [talk_question(f"thinking/others/{name}", _thought(maker(rng))) for _ in range(num)]
    for _ in range(40):
        turn = tasks.repeat_chat(rng, rng.randint(2, 12))
        found.append(talk_question("thinking/others/repeat", _thought(turn)))
    for word, text in RELEASES["0731"].items():
        for _ in range(40 if text else 0):
            turn = rng.choice((tasks.capital_chat, tasks.sum_chat))(rng)
            found.append(talk_question(f"thinking/effort/{word} of 0731", _thought(turn, text)))
    return found


def _thought(turn: Turn, effort_text: str = "") -> Conversation:
    return chat([turn], setting=Setting(True, effort_text))


def _tools(rng: random.Random, thinking: bool) -> list[Question]:
    form = f"tools/{'thinking' if thinking else 'chat'}"
    found = []
    for name, drawn, num, held_out in _TOOL_GROUPS:
        wish = Wish(**{**vars(drawn), "thinking": thinking})
        found += [talk_question(f"{form}/{name}", call_talk(rng, wish), held_out) for _ in range(num)]
    wish = Wish(thinking=thinking)
    found += [talk_question(f"{form}/no tool fits", plain_talk(rng, wish)) for _ in range(_NUM_WITHOUT_CALL)]
    for _ in range(_NUM_WITHOUT_CALL):
        conversation = chat([chat_without_tool(rng)], setting=Setting(thinking))
        found.append(talk_question(f"{form}/none offered", conversation))
    return found


def _json(rng: random.Random) -> list[Question]:
    return [
        talk_question(group, json_talk(rng, wish), held_out)
        for group, wish, num, held_out in _JSON_GROUPS
        for _ in range(num)
    ]
