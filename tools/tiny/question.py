"""A question of the examination, and the counting of answers."""

from dataclasses import dataclass

from ownpath.chat.encode import PLAIN, Setting
from tiny.chat import Conversation, Document, conversation_document


@dataclass(frozen=True)
class Question:
    """One prompt with its right answer.

    group: the name under which it is counted, such as "capital/chat/What is the capital of {c}?".
    held_out: training never saw this question.
    setting: the chat prompt's tools, format and effort.
    """

    group: str
    document: Document
    answer: str
    held_out: bool
    setting: Setting = PLAIN

    @property
    def prompt(self) -> Document:
        return [piece for piece in self.document if not piece.answer]


def talk_question(group: str, conversation: Conversation, held_out: bool = False) -> Question:
    """Makes the question for the last answer of a conversation."""
    document = conversation_document(conversation, last_only=True)
    answer = "".join(piece.text for piece in document[:-1] if piece.answer)
    return Question(group, document, answer, held_out, conversation.setting)


def scores(results: list[tuple[Question, bool]]) -> dict[str, dict[str, int]]:
    """Counts right answers and questions per group; held-out questions have their own group, marked "(held out)"."""
    table: dict[str, dict[str, int]] = {}
    for question, right in results:
        entry = table.setdefault(group_name(question), {"right": 0, "asked": 0})
        entry["right"] += right
        entry["asked"] += 1
    return table


def group_name(question: Question) -> str:
    return question.group + (" (held out)" if question.held_out else "")


def totals(table: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Sums by form (the first two parts of a group's name), held-out questions separately."""
    found: dict[str, dict[str, float]] = {}
    for group, entry in table.items():
        kind = "/".join(group.split("/")[:2]) + (" (held out)" if group.endswith("(held out)") else "")
        total = found.setdefault(kind, dict.fromkeys(entry, 0))
        for key, value in entry.items():
            total[key] += value
    for total in found.values():
        total["share"] = round(total["right"] / total["asked"], 4)
    return found
