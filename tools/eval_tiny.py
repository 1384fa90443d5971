r"""Examines a tiny-v4 checkpoint with greedy decoding and writes the scores.

    PYTHONPATH=src python tools/eval_tiny.py --model src/ownpath/assets/tiny-v4 \
        --out src/ownpath/assets/tiny-v4/scores.json
"""

import argparse
import json
import random
import time
from pathlib import Path

from tiny.answer_form import fault
from tiny.answers import answer_prompts
from tiny.batches import ANSWER, Encoder
from tiny.exam import questions
from tiny.question import Question, group_name, scores, totals
from tiny.train import Recipe
from tokenizers import Tokenizer

from ownpath.chat.tokenizer import Tokenizer as ChatTokenizer

# Beyond the right answer's own tokens, so that one that runs on is seen to be wrong.
_SPARE_TOKENS = 2
# Groups whose answers have a form of their own, which is counted too.
_FORMED = ("thinking/", "tools/", "json/")
_Given = list[tuple[Question, list[int], bool]]


def examine(folder: Path, device: str, encoder: Encoder, asked: list[Question]) -> _Given:
    """Returns each question with the greedy answer, and True if that is exactly the right one, EOS included."""
    prompts = [encoder.encode(question.prompt)[0] for question in asked]
    expected = [_answer_ids(encoder, question) for question in asked]
    given = answer_prompts(folder, device, prompts, [len(ids) + _SPARE_TOKENS for ids in expected])
    return [(q, ids, ids == right) for q, ids, right in zip(asked, given, expected, strict=True)]


def _answer_ids(encoder: Encoder, question: Question) -> list[int]:
    ids, roles = encoder.encode(question.document)
    return [token for token, role in zip(ids, roles, strict=True) if role == ANSWER]


def count_forms(tokenizer: ChatTokenizer, given: _Given, table: dict[str, dict[str, int]]) -> list[str]:
    """Adds ``well_formed`` to the groups that have a form; returns the faults."""
    faults = []
    for question, ids, _ in given:
        if question.group.startswith(_FORMED):
            found = fault(tokenizer, question.setting, ids)
            entry = table[group_name(question)]
            entry["well_formed"] = entry.get("well_formed", 0) + (not found)
            faults += [f"{group_name(question)}: {found}"] if found else []
    return faults


def wrong_answers(tokenizer: ChatTokenizer, given: _Given) -> list[str]:
    """Returns every wrong answer: the group, the right answer, and for groups with a form the given answer."""
    found = []
    for question, ids, right in given:
        if not right:
            said = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
            instead = f" | given: {said}" if question.group.startswith(_FORMED) else ""
            found.append(f"{question.group}: {question.answer}{instead}")
    return found


def sample(asked: list[Question], num_others: int, seed: int) -> list[Question]:
    """Returns every question about a capital or with a form, and ``num_others`` of the rest, drawn at random."""
    kept = ("capital/", *_FORMED)
    always = [question for question in asked if question.group.startswith(kept)]
    others = [question for question in asked if not question.group.startswith(kept)]
    return [*always, *random.Random(seed).sample(others, min(num_others, len(others)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-others", type=int, default=10**9, help="sums and lists to ask; default: all")
    parser.add_argument("--every", type=int, default=1, help="ask every n-th question only")
    parser.add_argument("--only", default="", help="ask only the groups whose names begin so, such as tools/")
    arguments = parser.parse_args()
    encoder = Encoder(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    seed = Recipe().seed
    asked = sample([q for q in questions(seed) if q.group.startswith(arguments.only)], arguments.num_others, seed)
    asked = asked[:: arguments.every]
    start = time.perf_counter()
    results = examine(arguments.model, arguments.device, encoder, asked)
    tokenizer = ChatTokenizer.from_folder(arguments.model)
    table = scores([(question, right) for question, _, right in results])
    faults = count_forms(tokenizer, results, table)
    report = {
        "measured with": "ownpath's engine",
        "device": arguments.device,
        "decoding": "greedy; right means exactly the taught answer, then the end of the sequence",
        "questions": len(asked),
        "seconds": round(time.perf_counter() - start, 1),
        "well_formed": "read by ownpath's parser without a fault; calls and JSON as their schemas want them",
        "summary": totals(table),
        "groups": table,
        "wrong": wrong_answers(tokenizer, results),
        "not well-formed": faults,
    }
    arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
