"""A process that compiles grammars on trial, each in a child of its own: one that takes too long ends with its child.

It reads the vocabulary from the first line of its input, then a grammar a line, and answers each with a line. A child
has the vocabulary from its parent, costs a few milliseconds, and is ended by a clock of the system's in the middle of
whatever it does. Run by ``warden``: ``python -m ownpath.structured.trial``.
"""

import json
import os
import random
import resource
import signal
import sys
from typing import Any

import numpy as np

from ownpath.structured.grammar import compile_grammar, lark_of
from ownpath.structured.limits import TRIAL_BYTES, TRIAL_S, TRIAL_WAIT_S
from ownpath.structured.vocabulary import Vocabulary, library_tokenizer

_NUM_WALKS, _NUM_STEPS = 2, 24
_MAX_MESSAGE = 200


def main() -> None:
    """Answers until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = Vocabulary.from_line(sys.stdin.readline())
    tokenizer = library_tokenizer(vocabulary)
    _tell({})
    for line in sys.stdin:
        _tell(_try(tokenizer, vocabulary, json.loads(line)))


def _tell(answer: dict[str, str]) -> None:
    print(json.dumps(answer), flush=True)


def _try(tokenizer: Any, vocabulary: Vocabulary, asked: dict[str, str]) -> dict[str, str]:
    """Judges a grammar in a child, and returns its answer, or why there is none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, TRIAL_S)
        signal.setitimer(signal.ITIMER_REAL, TRIAL_WAIT_S)
        resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
        answer = json.dumps(_judge(tokenizer, vocabulary, asked["kind"], asked["text"]))
        with os.fdopen(writer, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        told: dict[str, str] = json.loads(text)
        return told
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by == signal.SIGALRM:
        return {"refused": f"takes more than {TRIAL_WAIT_S:g} s to compile", "for_now": "yes"}
    if ended_by == signal.SIGPROF:
        return {"refused": f"takes more than {TRIAL_S:g} s to compile"}
    return {"refused": "takes too much memory to compile, or is nested too deeply"}


def _judge(tokenizer: Any, vocabulary: Vocabulary, kind: str, text: str) -> dict[str, str]:
    """Returns the grammar's text in the library's language, or under ``refused`` why it is none."""
    try:
        grammar = lark_of(kind, text)
    except (ValueError, RecursionError) as error:
        return {"refused": str(error)}
    matcher = compile_grammar(tokenizer, grammar)
    problem = matcher.get_error() or _walk(matcher, vocabulary)
    return {"refused": _in_short(problem)} if problem else {"grammar": grammar}


def _in_short(problem: str) -> str:
    """Returns what a message of the library's says, without where in the text that we made of a schema."""
    first = problem.split("\n")[0].removeprefix("Parser Error: ")
    return first.rpartition("failed to compile JSON schema: ")[2][:_MAX_MESSAGE]


def _walk(fresh: Any, vocabulary: Vocabulary) -> str:
    """Follows the grammar along some answers, for what only shows then. Returns the problem, empty for none."""
    ends = list(vocabulary.end_ids)
    for seed in range(_NUM_WALKS):
        matcher, choose = fresh.deep_copy(), random.Random(seed)
        for num_steps in range(_NUM_STEPS):
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            if matcher.is_error():
                return str(matcher.get_error())
            bits[ends] = 0
            going_on = np.flatnonzero(bits)
            if not len(going_on):
                if num_steps == 0:
                    return "nothing fits it but an empty answer"
                break
            matcher.consume_token(int(going_on[choose.randrange(len(going_on))]))
    return ""


if __name__ == "__main__":
    main()
