"""Writes docs/questions.md: six users' questions, each with the command that answers it and its output.

    PYTHONPATH=src python tools/questions.py

Runs every command on the embedded model, on CPU, and puts its output (cut to 132 columns) into the page.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "questions.md"
TEXT_COLUMNS, MOST_COLUMNS = 118, 132

HEAD = """# Six questions that serving engines leave open

A team served a DeepSeek-V4 checkpoint in NVFP4. It loaded, requests ran, and every answer was empty. Six questions
stayed open, because the engine chose kernels where nobody could look. Here each is a command, with lines of its output
on the embedded model on a CPU (`tools/questions.py` writes this page); they take any checkpoint, and `--device cuda`.
"""


@dataclass(frozen=True)
class Question:
    """A question. before: introduces the output. keep: words of the lines that are shown."""

    asked: str
    before: str
    commands: tuple[str, ...]
    keep: tuple[str, ...]


QUESTIONS = (
    Question(
        "Is the kernel we chose the one that runs, for this projection, now?",
        "Write the plan down first; what runs is held against it, call by call, and on a GPU against the profiler's "
        "record. A slot that ran something else, did not run, or ran on another dtype or layout is named "
        "([verify](verify.md#the-ledger)). `/debug/plan` tells the same of a running server ([serving](serving.md)).",
        ("ownpath plan --json > before.json", "ownpath verify --stages ledger --ledger before.json"),
        keep=("LG01", "LG02", "LG03", "LG04", "LG05", "LG06"),
    ),
    Question(
        "Does the BF16 `wo_a` path run, or the FP8 one that expects `weight_scale_inv`?",
        "The format is decided per tensor, from the tensor; the plan says what it found and what follows. That this "
        "is what ran, question 1 shows.",
        ("ownpath plan",),
        keep=("module ", ".attn.wo_a", "ref.grouped_linear on"),
    ),
    Question(
        "Is the activation's global scale right, or inverted twice?",
        "Do the file's scales look like multipliers (F05, F09), do the kernels get what the file says, recomputed in "
        "float64 (L03), and do products come out as the values say (K01)? A factor that is squared, inverted or left "
        "out is named as that, with the tensor.",
        ("ownpath verify --stages file,load,kernels",),
        keep=(" F05 ", " F09 ", " L03 ", " K01 "),
    ),
    Question(
        "Are the hyper-connections producing valid streams?",
        "Each boundary alone, against float64 (K08); its streams inside each layer (V01, slots `hc_attn` and "
        "`hc_ffn`); what they grow to over the depth (V03).",
        ("ownpath verify --stages kernels,layers",),
        keep=(" K08 ", " V01 ", " V03 "),
    ),
    Question(
        "Is the sparse attention right on this device?",
        "Window edges, sink and hidden keys on the real weights (K09), rotations to a million positions (K07), each "
        "kernel of decode steps over poisoned caches (K11); then every layer on a text, with the entries it picks "
        "(V01), cut in every way (V05), beside others (V09).",
        ("ownpath verify --stages kernels,layers",),
        keep=(" K07 ", " K09 ", " K11 ", " V01 ", " V05 ", " V09 "),
    ),
    Question(
        "Which is the first layer whose output is wrong?",
        "Every layer is fed with the reference's input, so that one wrong layer hides no other (V01, V02).",
        ("ownpath verify --stages layers",),
        keep=("first bad", "largest error", " V01 ", " V02 ", " V04 "),
    ),
)


def output_of(command: str, folder: Path) -> str:
    """Runs a command in ``folder`` with this interpreter's ownpath; returns its output. Errors: RuntimeError."""
    words, _, target = command.partition(" > ")
    arguments = [sys.executable, "-m", *shlex.split(words)]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(arguments, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if target:
        (folder / target).write_text(done.stdout, encoding="utf-8")
    return "" if target else done.stdout


def section(number: int, question: Question, folder: Path) -> str:
    """Returns one question's section of the page."""
    printed = "".join(output_of(command, folder) for command in question.commands).splitlines()
    shown = [line for line in printed if any(word in line for word in question.keep)]
    lines = [f"$ {command}" for command in question.commands] + [line[:MOST_COLUMNS].rstrip() for line in shown]
    output = "```\n" + "\n".join(lines) + "\n```"
    before = textwrap.fill(question.before, TEXT_COLUMNS, break_on_hyphens=False)
    return f"## {number}. {question.asked}\n{before}\n\n{output}"


def main() -> None:
    """Runs everything and writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        sections = [section(number, asked, Path(folder)) for number, asked in enumerate(QUESTIONS, start=1)]
    PAGE.write_text("\n".join([HEAD, *("\n\n".join(sections),), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
