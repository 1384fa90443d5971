"""The conversation of ``ownpath chat``: reads lines, answers them, and keeps what was said."""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType

from ownpath.chat.answer import Answer
from ownpath.chat.effort import RELEASES, find_release
from ownpath.chat.encode import PLAIN, Setting, encode_messages
from ownpath.chat.levels import level_for
from ownpath.chat.messages import Message
from ownpath.chat.parse import AnswerParser
from ownpath.chat.parts import AnswerPart, Content, Reasoning
from ownpath.commands.answers import GenerationFailed, Reports, answer_parts
from ownpath.commands.keyboard import Keyboard
from ownpath.commands.sampling_options import sampling_of
from ownpath.commands.session import Session
from ownpath.engine.request import FinishReason
from ownpath.terminal.console import is_terminal, show, tell, write_aside, write_data, write_prose
from ownpath.terminal.page import Listing, facts, line
from ownpath.terminal.text import quoted
from ownpath.trace import Ledger

HELP = (
    ("/plan", "which kernels ran since the chat began, and how often"),
    ("/clear", "forget what was said; the system message stays"),
    ("/system TEXT", "set the system message; without TEXT, take it away"),
    ("/help", "show this list"),
    ("/exit", "end, as Ctrl-D does; Ctrl-C stops an answer"),
    ("//", "begin a message with one slash"),
)


class Dialogue:
    """A conversation with a loaded model.

    messages: what was said, without the system message. system: empty for none.
    """

    def __init__(self, session: Session, args: argparse.Namespace) -> None:
        self.messages: list[Message] = []
        self.system: str = args.system
        self._session, self._args = session, args
        self._setting = _setting(session, args.reasoning_effort)
        self._keyboard = Keyboard() if is_terminal(sys.stdin) else None

    def talk(self) -> int:
        """Answers lines until there are no more; returns 1 if the engine could not go on.

        Errors: ValueError for a piped line that cannot be answered.
        """
        if self._keyboard is None:
            return self._take(_piped_lines())
        name, limit = self._session.folder.resolve().name, self._session.engine.config.max_model_len
        tell(f"{name}, a context of {limit:,} tokens; /help shows the commands")
        with self._keyboard:
            return self._take(self._keyboard.lines())

    def _take(self, lines: Iterable[str]) -> int:
        for said in filter(str.strip, lines):
            if said.strip() == "/exit":
                break
            if said.startswith("/") and not said.startswith("//"):
                self._obey(said)
            elif not self._answer(said.removeprefix("/")):
                return 1
        return 0

    def _obey(self, said: str) -> None:
        """Runs a command."""
        word, _, rest = said.strip().partition(" ")
        if word == "/plan":
            show(*_ran_page(self._session.ledger))
        elif word == "/clear":
            self.messages.clear()
            tell("the conversation is empty")
        elif word == "/system":
            self.system = rest.strip()
            tell("the system message is set" if self.system else "there is no system message")
        elif word == "/help":
            show(facts(HELP))
        else:
            tell(f"there is no command {quoted(word)}; /help shows them, and // begins a message with a slash")

    def _answer(self, text: str) -> bool:
        """Answers a message; returns False if the chat cannot go on. What cannot be answered is taken back."""
        self.messages.append(Message("user", text))
        reports, keyboard = Reports(), self._keyboard
        try:
            with contextlib.nullcontext() if keyboard is None else keyboard.while_working(lambda: reports.put(None)):
                answer = self._generate(reports)
        except GenerationFailed as error:
            self.messages.pop()
            tell(f"ownpath: {error}")
            return keyboard is not None and self._session.engine.is_alive
        except ValueError as error:
            self.messages.pop()
            if keyboard is None:
                raise
            tell(f"ownpath: {error}")
            return True
        if answer.content or answer.reasoning:
            self.messages.append(answer)
        else:
            self.messages.pop()
        return True

    def _generate(self, reports: Reports) -> Message:
        """Generates and prints the answer to what was said. Errors: GenerationFailed; ValueError for what was said."""
        engine, tokenizer = self._session.engine, self._session.tokenizer
        system = [Message("system", self.system)] if self.system else []
        prompt_ids = tokenizer.encode_segments(encode_messages([*system, *self.messages], self._setting))
        room = engine.config.max_model_len - len(prompt_ids)
        if room < 1:
            told = f"the conversation has {len(prompt_ids):,} tokens, and the context {engine.config.max_model_len:,}"
            raise ValueError(f"{told}: /clear begins a new one, --max-model-len makes room")
        asked = self._args.max_tokens
        params = sampling_of(self._args, room if asked is None else min(asked, room))
        answer = Answer(tokenizer, self._args.stop, AnswerParser(self._setting.thinking))
        printer, reason = _Printer(), None
        try:
            for output, parts in answer_parts(engine, prompt_ids, params, answer, reports):
                printer.show(parts)
                reason = output.finish_reason
            if reason is None and not answer.is_stopped:
                printer.show(answer.finish())
        finally:
            write_data("")
        if reason is FinishReason.LENGTH and not answer.is_stopped:
            tell(f"cut off after {params.max_tokens:,} tokens")
        return Message("assistant", "".join(printer.content), "".join(printer.reasoning))


class _Printer:
    """Prints the parts of an answer as they come, and keeps them. Reasoning is for people: only a terminal shows it."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []

    def show(self, parts: Sequence[AnswerPart]) -> None:
        for part in parts:
            if isinstance(part, Reasoning):
                self.reasoning.append(part.text)
                write_aside(part.text)
            elif isinstance(part, Content):
                if self.reasoning and not self.content:
                    write_aside("\n")
                self.content.append(part.text)
                write_prose(part.text)


def _setting(session: Session, word: str) -> Setting:
    """Returns the options of the conversation. word: for the reasoning effort."""
    if word == "none":
        return PLAIN
    release = find_release(session.folder).name
    return Setting(thinking=True, effort_text=RELEASES[release][level_for(word, release)])


def _piped_lines() -> Iterator[str]:
    """Yields the lines of standard input. Errors: ValueError naming the line that is not UTF-8."""
    for number, data in enumerate(sys.stdin.buffer if sys.stdin else (), start=1):
        try:
            yield data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"standard input: line {number} is not UTF-8 text") from None


def _ran_page(ledger: Ledger) -> list[RenderableType]:
    """Returns a table of the kernels that ran, told by what runs, and a warning for each slot that was planned
    otherwise."""
    slots: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    otherwise = []
    for slot, count in ledger.calls.items():
        use, planned = ledger.uses[slot], ledger.kernels[slot]
        slots[use.kernel, use.runner] += 1
        calls[use.kernel, use.runner] += count
        if (use.runner, use.kernel) != planned:
            otherwise.append(line("warning", f": {slot} ran on {use.kernel}, planned was {planned[1]}"))
    if not slots:
        return [line("nothing has run yet")]
    rows = [(*kind, f"{slots[kind]:,}", f"{calls[kind]:,}") for kind in sorted(slots)]
    return [Listing(("kernel", "runner", "slots", "calls"), rows, to_right=frozenset({2, 3})), *otherwise]
