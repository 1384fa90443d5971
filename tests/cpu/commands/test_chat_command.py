"""``ownpath chat``: what the model reads and what people see, by pipe and at a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu.commands.chat_sessions import Scripted, serve_session
from support.terminals import Terminal

from ownpath.chat.effort import RELEASES
from ownpath.chat.markers import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER
from ownpath.cli import main
from ownpath.model.batch import ForwardBatch
from ownpath.runners import SwiGLU
from ownpath.trace import Ledger

Typed = Callable[..., int]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Typed:
    """Pipes lines into a chat with a model; returns the exit code."""

    def piped(model: Scripted, lines: str | bytes, *options: str, ledger: Ledger | None = None) -> int:
        data = lines.encode() if isinstance(lines, str) else lines
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        serve_session(monkeypatch, model, tmp_path, ledger)
        return main(["chat", *options])

    return piped


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, Terminal]]:
    """Types lines at a terminal; returns the exit code and what the terminal shows."""

    def typed(model: Scripted, lines: str, *options: str) -> tuple[int, Terminal]:
        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(lines))
        monkeypatch.setattr(sys, "stdout", shown)
        serve_session(monkeypatch, model, tmp_path)
        return main(["chat", *options]), shown

    return typed


def test_the_model_reads_the_whole_conversation(talk: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted("one", "zwei é", "three", "four", "five")
    lines = "hello\n\n  \nwörter\r\n/system Be\tbrief. \nthird\n/clear\n/system\n//fourth\n/exit\nnever\n"
    assert talk(model, lines, "--system", "Begin.") == 0
    first = f"{BOS}Begin.{USER}hello{ASSISTANT}{THINK_END}"
    second = f"one{EOS}{USER}wörter{ASSISTANT}{THINK_END}"
    third = f"zwei é{EOS}{USER}third{ASSISTANT}{THINK_END}"
    assert [model.read(n) for n in range(len(model.prompts))] == [
        first,
        first + second,
        (first + second + third).replace("Begin.", "Be\tbrief."),
        f"{BOS}{USER}/fourth{ASSISTANT}{THINK_END}",
    ]
    told = capsys.readouterr()
    assert told.out == "one\nzwei é\nthree\nfour\n"
    assert "the system message is set" in told.err
    assert "there is no system message" in told.err
    assert "the conversation is empty" in told.err


def test_the_options_of_generate_hold(talk: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(Scripted("hello stop world", "hello"), "a\nb\n", "--stop", "stop", "--max-tokens", "3") == 0
    told = capsys.readouterr()
    assert told.out == "hello \nhello\n"
    assert "cut off" not in told.err
    model = Scripted("hello...", "hello", max_model_len=32)
    assert talk(model, "a\nb\n") == 2, "the first answer fills the context"
    told = capsys.readouterr()
    assert told.out == "hello" * (32 - len(model.prompts[0])) + "\n"
    assert "cut off after" in told.err
    assert "the context 32: /clear begins a new one" in told.err


def test_reasoning_is_dimmed_at_a_terminal_and_left_out_of_a_pipe(
    talk: Typed, screen: Callable[..., tuple[int, Terminal]], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = (f"I \x1b[2Jthink.{THINK_END}Hello.", f"Again.{THINK_END}Bye.")
    model = Scripted(*texts, max_model_len=4096)
    assert talk(model, "a\nb\n", "--reasoning-effort", "max") == 0
    assert capsys.readouterr().out == "Hello.\nBye.\n"
    opening = f"{BOS}{RELEASES['v4']['max']}{USER}a{ASSISTANT}"
    assert model.read(0) == opening + THINK_START
    assert model.read(1) == f"{opening}{THINK_END}Hello.{EOS}{USER}b{ASSISTANT}{THINK_START}"
    code, shown = screen(Scripted(texts[0]), "a\n", "--reasoning-effort", "high")
    assert code == 0
    assert "I \\x1b[2Jthink.\nHello.\n" in shown.page()


def test_sequences_are_shown_at_a_terminal_and_passed_on_by_a_pipe(
    talk: Typed, screen: Callable[..., tuple[int, Terminal]], capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;taken\x07\x1b[31m\u202e[bold]\tend"
    assert talk(Scripted(hostile), "a\n") == 0
    assert capsys.readouterr().out == hostile + "\n"
    code, shown = screen(Scripted(hostile), "a\n")
    assert code == 0
    assert "> \\x1b]0;taken\\x07\\x1b[31m\\u202e[bold]\tend\n" in shown.getvalue()


def test_the_plan_is_what_ran(talk: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger({"a": ("SwiGLU", "ref.swiglu"), "b": ("SwiGLU", "triton.swiglu"), "c": ("x", "x")})
    watched = [ledger.watch(slot, SwiGLU(8.0)) for slot in ("a", "b")]

    class Running(Scripted):
        def forward(self, batch: ForwardBatch) -> torch.Tensor:
            for slot in watched:
                slot(torch.zeros(1, 4))
            return super().forward(batch)

    watched[0](torch.zeros(1, 4))
    assert talk(Running("one"), "/plan\nhello\n/plan\n/help\n/nothing\n", ledger=ledger) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[:2] == ["nothing has run yet", "one"], "what ran before the chat is not counted"
    assert lines[2].split() == ["kernel", "runner", "slots", "calls"]
    num_steps = 4  # the prompt, then each of the answer's three tokens
    assert lines[3].split() == ["ref.swiglu", "SwiGLU", "2", str(2 * num_steps)]
    assert lines[4] == "warning: b ran on ref.swiglu, planned was triton.swiglu"
    assert lines[5].startswith("/plan ")
    assert "there is no command '/nothing'" in told.err


def test_what_fails_is_told_and_taken_back(
    talk: Typed, screen: Callable[..., tuple[int, Terminal]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(Scripted("one", "", "three"), "a\nb\nc\n") == 1
    told = capsys.readouterr()
    assert told.out == "one\n\n"
    assert "not finite" in told.err
    model = Scripted("one", "", "three")
    code, shown = screen(model, "a\nb\nc\n")
    assert code == 0
    assert "three" in shown.getvalue()
    assert model.read(2) == f"{BOS}{USER}a{ASSISTANT}{THINK_END}one{EOS}{USER}c{ASSISTANT}{THINK_END}"
    assert talk(Scripted("one"), b"a\n\xff\xfe\n") == 2
    assert "standard input: line 2 is not UTF-8 text" in capsys.readouterr().err


def test_an_answer_that_ctrl_c_stops_stays_in_the_conversation(screen: Callable[..., tuple[int, Terminal]]) -> None:
    class Interrupted(Scripted):
        def forward(self, batch: ForwardBatch) -> torch.Tensor:
            if len(self.step_sizes) == 9:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return super().forward(batch)

    model = Interrupted("hello ...", "two", max_model_len=4096)
    shells = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, shown = screen(model, "a\nb\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, shells)
    assert code == 0
    assert "two" in shown.getvalue()
    before, after = f"{BOS}{USER}a{ASSISTANT}{THINK_END}", f"{EOS}{USER}b{ASSISTANT}{THINK_END}"
    said = model.read(1).removeprefix(before).removesuffix(after)
    assert said.startswith("hello hello ")
    assert f"> {said}\n" in shown.getvalue(), "what is kept is what was shown"


def test_wrong_values_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--reasoning-effort", "some"], ["--max-tokens", "-1"], ["--stop", ""], ["/no/such/model"]):
        assert main(["chat", *options]) == 2
        assert options[0] in capsys.readouterr().err


def test_the_embedded_model_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The capital of France is\n/plan\n")))
    assert main(["chat"]) == 0
    told = capsys.readouterr().out
    assert "Paris" in told
    assert "ref.nvfp4_moe" in told


CHILD = """
import fcntl, termios, threading
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ownpath.commands.keyboard import Keyboard
from ownpath.terminal.console import write_aside, write_data, write_prose
with Keyboard() as keyboard:
    for line in keyboard.lines():
        write_aside("I \\x1b[2Jthink")
        stopped = threading.Event()
        with keyboard.while_working(stopped.set):
            write_prose(f"about \\x1b[7m{line}")
            while not stopped.wait(0.01):
                pass
        write_data("")
"""
"""A chat's keyboard and colours, without a model: it starts in a tenth of the time."""


def test_ctrl_c_stops_what_is_at_hand_and_ctrl_d_ends_at_a_real_terminal() -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(its)
    screen = Screen(ours)
    try:
        screen.shows(b"> ")
        screen.insists(b"\x03", b"Ctrl-D or /exit ends the chat")
        for text in (b"this", b"that"):
            screen.shows(b"> ")
            screen.type(text + b"\n")
            screen.shows(b"\x1b[2mI \\x1b[2Jthink\x1b[0mabout \\x1b[7m" + text)
            screen.type(b"\x03")
        screen.shows(b"> ")
        screen.type(b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Screen:
    """Our end of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._unread = descriptor, b""

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def insists(self, key: bytes, wanted: bytes) -> None:
        """Presses a key until this is shown: between showing a prompt and waiting, readline notes no signal."""
        for _ in range(60):
            self.type(key)
            if self._has(wanted, 0.5):
                return
        raise AssertionError(self._unread[-500:])

    def shows(self, *wanted: bytes) -> None:
        """Waits until all of this was shown, in this order, behind what was waited for before."""
        for text in wanted:
            assert self._has(text, 30), (text, self._unread[-500:])

    def _has(self, text: bytes, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self._unread:
            if not select.select([self._descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                return False
            self._unread += os.read(self._descriptor, 4096)
        self._unread = self._unread.partition(text)[2]
        return True
