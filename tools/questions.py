"""Writes docs/questions.md: six questions that somebody could not answer, each with a command and what it prints.

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

HEAD = """# Six questions

A team served a DeepSeek-V4 checkpoint in NVFP4. It loaded, graphs were captured, requests ran, and every answer was
empty. Each part was right alone; six questions stayed open, because the engine chose kernels where nobody could look.
Here each is a command. What stands below it is its real output on the embedded model, on a CPU
(`tools/questions.py` writes this page); the same commands take any checkpoint, and `--device cuda` a GPU.
"""


@dataclass(frozen=True)
class Question:
    """keep: words of the lines that are shown, all if there are none. after: what is to be said below the output."""

    asked: str
    before: str
    commands: tuple[str, ...]
    keep: tuple[str, ...] = ()
    after: str = ""


QUESTIONS = (
    Question(
        "Is the kernel we chose the one that runs, for this projection, now?",
        "The plan is written down before; what runs is held against it, call by call, and on a GPU also "
        "against the names that the profiler saw on the device.",
        ("ownpath plan --json > before.json", "ownpath verify --stages ledger --ledger before.json"),
        after="A slot that ran something else, did not run, or ran on another dtype or layout is an error that "
        "names it ([verify](verify.md#the-ledger)). Of a server that is running, `/debug/plan` tells the same "
        "([serving](serving.md)).",
    ),
    Question(
        "Does the BF16 `wo_a` path run, or the FP8 one that expects `weight_scale_inv`?",
        "The format is decided per tensor, from the tensor; the plan says what it found and what follows.",
        ("ownpath plan",),
        keep=("module ", ".attn.wo_a", "ref.grouped_linear on"),
        after="No scale is read where none is stored. That this is what ran, question 1 shows.",
    ),
    Question(
        "Is the activation's global scale right, or inverted twice?",
        "Three looks: do the file's scales look like multipliers (F05, F09), is what kernels were given what "
        "the file says, recomputed in float64 (L03), and do products come out as the weights' values say "
        "(K01).",
        ("ownpath verify --stages file,load,kernels",),
        keep=(" F05 ", " F09 ", " L03 ", " K01 ", "findings"),
        after="A factor that is squared, inverted or left out is named as that, with the tensor.",
    ),
    Question(
        "Are the hyper-connections producing valid streams?",
        "Each boundary alone, against float64 (K08); its streams inside each layer (V01, slots `hc_attn` and "
        "`hc_ffn`); what they grow to over the depth (V03).",
        ("ownpath verify --stages kernels,layers",),
        keep=(" K08 ", " V01 ", " V03 ", "findings"),
    ),
    Question(
        "Is the sparse attention right on this device?",
        "Window edges, sink and hidden keys on the real weights (K09), rotations to a million positions "
        "(K07); then, on a text, every layer's keys, compressed entries, chosen entries and result (V01), in "
        "one go, in chunks and token by token (V05), alone and beside others (V09).",
        ("ownpath verify --stages kernels,layers",),
        keep=(" K07 ", " K09 ", " V01 ", " V05 ", " V09 ", "findings"),
    ),
    Question(
        "Which is the first layer whose output is wrong?",
        "Every layer is fed with the reference's input, so that one wrong layer hides no other (V01, V02).",
        ("ownpath verify --stages layers",),
        keep=("tiny-v4", "findings", "first bad", "worst", " V01 ", " V02 ", " V04 "),
    ),
)


def output_of(command: str, folder: Path) -> str:
    """What a command prints, run in ``folder`` with this interpreter's ownpath. Errors: RuntimeError if it fails."""
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
    """One question as a piece of the page."""
    printed = "".join(output_of(command, folder) for command in question.commands).splitlines()
    shown = [line for line in printed if not question.keep or any(word in line for word in question.keep)]
    lines = [f"$ {command}" for command in question.commands] + [line[:MOST_COLUMNS].rstrip() for line in shown]
    output = "```\n" + "\n".join(lines) + "\n```"
    before, after = (textwrap.fill(text, TEXT_COLUMNS) for text in (question.before, question.after))
    parts = [f"## {number}. {question.asked}", before, output, after]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    """Runs everything and writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        sections = [section(number, asked, Path(folder)) for number, asked in enumerate(QUESTIONS, start=1)]
    PAGE.write_text("\n".join([HEAD, *("\n\n".join(sections),), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
