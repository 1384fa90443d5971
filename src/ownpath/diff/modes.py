"""The ways in which the model's own format opens an answer, and the ways to ask a server not to think."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ownpath.chat.effort import RELEASES
from ownpath.chat.encode import Setting, encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer

WISHES: tuple[Mapping[str, object], ...] = (
    {"chat_template_kwargs": {"thinking": False, "enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
)
"""Fields that ask for an answer without thinking, as servers read them: vLLM and SGLang (the template's own name and
the usual one), servers that refuse a name they do not know, DeepSeek's API, OpenAI's."""


@dataclass(frozen=True)
class ChatMode:
    """One way of the model's format to open an answer. ids: a conversation written so, up to the answer."""

    name: str
    thinks: bool
    ids: tuple[int, ...]


def modes_of(tokenizer: Tokenizer, text: str) -> tuple[ChatMode, ...]:
    """Returns every mode in which the format writes a conversation of one user's message; plain answers first."""
    words: dict[str, list[str]] = {}
    for release, efforts in RELEASES.items():
        for word, effort_text in efforts.items():
            words.setdefault(effort_text, []).append(f"{word} of {release}")
    settings = [("without thinking", Setting()), ("thinking", Setting(thinking=True))]
    for effort_text, named in words.items():
        if effort_text:
            settings.append((f"thinking with effort {' or '.join(named)}", Setting(True, effort_text)))
    return tuple(_mode(tokenizer, text, name, setting) for name, setting in settings)


def _mode(tokenizer: Tokenizer, text: str, name: str, setting: Setting) -> ChatMode:
    segments = encode_messages([Message("user", text)], setting)
    return ChatMode(name, setting.thinking, tuple(tokenizer.encode_segments(segments)))


@dataclass(frozen=True)
class ModeMatch:
    """A server's conversation held against the modes. candidates: those it may be; empty for none. off: tokens by which
    the nearest is missed. says: what was seen."""

    candidates: tuple[ChatMode, ...]
    off: int
    says: str


def match_ids(ids: Sequence[int], modes: Sequence[ChatMode]) -> ModeMatch:
    """Matches the conversation's tokens, as the server told them."""
    nearest = min(modes, key=lambda mode: ids_apart(ids, mode.ids)[0])
    off, says = ids_apart(ids, nearest.ids)
    return ModeMatch(() if off else (nearest,), off, f"{says}, {nearest.name}")


def match_count(count: int, modes: Sequence[ChatMode]) -> ModeMatch:
    """Matches the number of the conversation's tokens, where the server tells no more."""
    fitting = tuple(mode for mode in modes if len(mode.ids) == count)
    off = min(abs(count - len(mode.ids)) for mode in modes)
    lengths = ", ".join(map(str, sorted({len(mode.ids) for mode in modes})))
    return ModeMatch(fitting, off, f"the server counts {count} prompt tokens, the model's format {lengths}")


def ids_apart(theirs: Sequence[int], ours: Sequence[int]) -> tuple[int, str]:
    """Counts the places that differ, and describes the first of them."""
    num_common = min(len(theirs), len(ours))
    places = [n for n in range(num_common) if theirs[n] != ours[n]]
    off = len(places) + abs(len(theirs) - len(ours))
    if not off:
        return 0, f"the same {len(ours)} tokens"
    first = places[0] if places else num_common
    shown = [str(list(ids[first : first + 4])) for ids in (theirs, ours)]
    return off, f"{len(theirs)} tokens, ours {len(ours)}; from place {first} {shown[0]}, ours {shown[1]}"
