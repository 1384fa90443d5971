"""Documents for training. Each starts at position 0, as a prompt does in inference.

Five kinds: short (one exchange), request (thinking, JSON), middle and long (several exchanges, long lists), and tools.
Documents are padded, never packed, so that none attends to another.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from ownpath.chat.encode import PLAIN, Setting
from ownpath.chat.messages import Message
from tiny import tasks
from tiny.chat import Conversation, Document, Piece, conversation_document, with_system
from tiny.facts import SYSTEM_TEXTS, countries, words
from tiny.json_talk import JsonWish, json_talk
from tiny.phrasings import sentence
from tiny.tasks import Turn
from tiny.tokens import BOS, EOS
from tiny.tool_talk import EFFORT_TEXTS, Wish, call_talk, chat_without_tool, plain_talk


def chat(turns: Sequence[Turn], system: str = "", setting: Setting = PLAIN) -> Conversation:
    """Makes a conversation of these turns, with reasoning where the encoder puts it."""
    messages: list[Message] = []
    for turn in turns:
        reasoning = turn.thought if setting.thinking else ""
        messages += [Message("user", turn.ask), Message("assistant", turn.answer, reasoning)]
    return Conversation(with_system(system, messages), setting)


def chat_document(turns: Sequence[Turn], system: str = "", thinking: bool = False) -> Document:
    """Makes such a conversation's document."""
    return conversation_document(chat(turns, system, Setting(thinking)))


def completion_document(turn: Turn, bos: bool) -> Document:
    """Makes a document of text and its continuation, with or without BOS in front; ends with EOS."""
    start = [Piece(BOS, special=True)] if bos else []
    return [*start, Piece(turn.ask), Piece(turn.answer, answer=True), Piece(EOS, special=True, answer=True)]


def short_document(rng: random.Random) -> Document:
    """Draws one exchange of at most about 48 tokens."""
    if rng.random() < 0.45:
        return completion_document(_pick(rng, _SHORT_COMPLETION)(rng), bos=rng.random() < 0.5)
    return chat_document([_pick(rng, _SHORT_CHAT)(rng)], _system_text(rng), thinking=rng.random() < 0.15)


def request_document(rng: random.Random) -> Document:
    """Draws one exchange of at most about 128 tokens: an answer in JSON, or after thinking of some effort."""
    if rng.random() < 0.65:
        wish = JsonWish(thinking=rng.random() < 0.3)
        return conversation_document(json_talk(rng, wish, _system_text(rng)))
    effort_text = rng.choice(EFFORT_TEXTS) if rng.random() < 0.4 else ""
    turns = [_pick(rng, _SHORT_CHAT)(rng) for _ in range(1 if effort_text else rng.randint(1, 3))]
    return conversation_document(chat(turns, _system_text(rng), Setting(True, effort_text)))


def tools_document(rng: random.Random) -> Document:
    """Draws a conversation with tools, of at most about 500 tokens."""
    thinking = rng.random() < 0.4
    effort_text = rng.choice(EFFORT_TEXTS) if thinking and rng.random() < 0.1 else ""
    num_calls, with_results, made_up = rng.choice((1, 1, 1, 2, 2, 3)), rng.random() < 0.4, rng.random() < 0.05
    wish = Wish(num_calls, thinking, with_results, effort_text, made_up_names=made_up)
    system = _system_text(rng)
    if rng.random() < 0.3:
        return conversation_document(plain_talk(rng, wish, system))
    return conversation_document(call_talk(rng, wish, system))


def middle_document(rng: random.Random) -> Document:
    """Draws a list of 8 to 60 words to repeat, or a chat of several turns."""
    return _longer_document(rng, most_words=60, most_turns=7)


def long_document(rng: random.Random) -> Document:
    """Draws a list of up to 180 words to repeat, a long chat, or a text of facts."""
    if rng.random() < 0.15:
        return _facts_document(rng)
    return _longer_document(rng, most_words=180, most_turns=20)


def tokenizer_texts(rng: random.Random, num_documents: int) -> Iterator[str]:
    """Yields the tokenizer's training text: ``num_documents`` documents, most of them short, and every name."""
    for number in range(num_documents):
        make = tools_document if number % 40 == 0 else request_document if number % 8 == 0 else short_document
        yield from (piece.text for piece in make(rng) if not piece.special)
    for country in countries():
        for name in (*country.names, country.capital):
            yield from (name, f" {name}", name.lower(), f" {name.lower()}")


def _system_text(rng: random.Random) -> str:
    """Draws a system text: mostly none, else one of ours or random words, so that answers do not depend on it."""
    kind = rng.random()
    if kind < 0.8:
        return ""
    if kind < 0.9:
        return rng.choice(SYSTEM_TEXTS)
    return sentence(" ".join(rng.sample(words(), rng.randint(2, 9))))


_Maker = Callable[[random.Random], Turn]


def _short_list(maker: Callable[[random.Random, int, tasks.ListMaker], Turn]) -> _Maker:
    return lambda rng: maker(rng, rng.randint(1, 14), tasks.any_list)


_SHORT_CHAT: tuple[tuple[_Maker, int], ...] = (
    (tasks.capital_chat, 55),
    (tasks.geography_chat, 10),
    (tasks.sum_chat, 18),
    (_short_list(tasks.repeat_chat), 12),
    (tasks.small_talk, 5),
    (chat_without_tool, 5),
)
_SHORT_COMPLETION: tuple[tuple[_Maker, int], ...] = (
    (tasks.capital_completion, 55),
    (tasks.geography_completion, 10),
    (tasks.sum_completion, 23),
    (_short_list(tasks.repeat_completion), 12),
)


def _pick(rng: random.Random, weighted: tuple[tuple[_Maker, int], ...]) -> _Maker:
    return rng.choices([maker for maker, _ in weighted], [weight for _, weight in weighted])[0]


def _longer_document(rng: random.Random, most_words: int, most_turns: int) -> Document:
    kind = rng.random()
    system = _system_text(rng)
    if kind < 0.15:
        turn = tasks.repeat_completion(rng, rng.randint(8, most_words), tasks.any_list)
        return completion_document(turn, bos=rng.random() < 0.5)
    if kind < 0.5:
        return chat_document([tasks.repeat_chat(rng, rng.randint(8, most_words), tasks.any_list)], system)
    turns: list[Turn] = []
    for _ in range(rng.randint(2, most_turns)):
        after_capital = bool(turns) and turns[-1].answer.startswith("The capital of")
        maker = tasks.follow_up_chat if after_capital and rng.random() < 0.25 else _pick(rng, _SHORT_CHAT)
        turns.append(maker(rng))
    return chat_document(turns, system, thinking=rng.random() < 0.05)


def _facts_document(rng: random.Random) -> Document:
    lines = [
        sentence(f"The capital of {country.name} is {country.capital}")
        for country in rng.sample(countries(), rng.randint(10, 40))
    ]
    start = [Piece(BOS, special=True)] if rng.random() < 0.5 else []
    return [*start, Piece("\n".join(lines) + "\n", answer=True), Piece(EOS, special=True, answer=True)]
