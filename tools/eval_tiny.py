r"""Examines a tiny-v4 checkpoint with greedy decoding and writes the scores.

    PYTHONPATH=src python tools/eval_tiny.py --model src/ownpath/assets/tiny-v4 \
        --out src/ownpath/assets/tiny-v4/scores.json

With ``--trained FOLDER`` transformers answers, on the values that the checkpoint made from FOLDER holds (an oracle).
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from tiny.answers import EOS_ID, Answerer, ownpath_answerer, transformers_answerer
from tiny.batches import Encoder
from tiny.exam import Question, questions, scores
from tiny.export import read_trained, stored_network
from tiny.train import Recipe
from tokenizers import Tokenizer

# Beyond the right answer's own tokens, so that one that runs on is seen to be wrong.
_SPARE_TOKENS = 2


def examine(answerer: Answerer, encoder: Encoder, asked: list[Question]) -> list[tuple[Question, bool]]:
    """Each question with whether the greedy answer is exactly the right one, EOS included."""
    prompts = [encoder.encode(question.prompt)[0] for question in asked]
    expected = [[*encoder.text_ids(question.answer), EOS_ID] for question in asked]
    given = answerer(prompts, [len(ids) + _SPARE_TOKENS for ids in expected])
    return [(q, ids == right) for q, ids, right in zip(asked, given, expected, strict=True)]


def sample(asked: list[Question], num_others: int, seed: int) -> list[Question]:
    """Every question about a capital, and ``num_others`` of the rest, drawn once."""
    capitals = [question for question in asked if question.group.startswith("capital/")]
    others = [question for question in asked if not question.group.startswith("capital/")]
    return [*capitals, *random.Random(seed).sample(others, min(num_others, len(others)))]


def summary(table: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Totals by form, questions seen in training apart from those held out."""
    totals: dict[str, dict[str, Any]] = {}
    for group, entry in table.items():
        kind = "/".join(group.split("/")[:2]) + (" (held out)" if group.endswith("(held out)") else "")
        total = totals.setdefault(kind, {"right": 0, "asked": 0})
        total["right"] += entry["right"]
        total["asked"] += entry["asked"]
    for total in totals.values():
        total["share"] = round(total["right"] / total["asked"], 4)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--trained", type=Path, help="let transformers answer, from this folder of train_tiny.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-others", type=int, default=10**9, help="sums and lists to ask; default: all")
    parser.add_argument("--every", type=int, default=1, help="ask every n-th question only")
    arguments = parser.parse_args()
    encoder = Encoder(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    if arguments.trained:
        answerer = transformers_answerer(stored_network(read_trained(arguments.trained)))
    else:
        answerer = ownpath_answerer(arguments.model, arguments.device)
    seed = Recipe().seed
    asked = sample(questions(seed), arguments.num_others, seed)[:: arguments.every]
    start = time.perf_counter()
    results = examine(answerer, encoder, asked)
    table = scores(results)
    wrong = [f"{question.group}: {question.answer}" for question, right in results if not right]
    report = {
        "measured with": "transformers" if arguments.trained else "ownpath's engine",
        "device": arguments.device,
        "decoding": "greedy; right means exactly the taught answer, then the end of the sequence",
        "questions": len(asked),
        "seconds": round(time.perf_counter() - start, 1),
        "summary": summary(table),
        "groups": table,
        "wrong": wrong,
    }
    arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
