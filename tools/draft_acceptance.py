r"""Measures how often the draft of tiny-v4 guesses the token that the model itself gives next.

    PYTHONPATH=src python tools/draft_acceptance.py --model src/ownpath/assets/tiny-v4

Asks questions of the examination, drawn at random (``--questions``; the draft's training has drawn its own), takes the
model's own greedy answer, and runs question and answer through backbone and draft once more, each row with the token
that truly follows it. Counted are the places from the question's last token to the answer's third last: the draft's
largest logit there against the answer's token two places on. That is the share of drafts that greedy decoding accepts.
``--answers FILE`` keeps the answers in a file, or takes them from it where it exists.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import torch
from tiny.answers import answer_prompts
from tiny.batches import ANSWER, Encoder
from tiny.exam import questions
from tiny.question import Question
from tiny.train import Recipe
from tokenizers import Tokenizer

from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model

MAX_TOKENS = 1024
Answered = tuple[str, bool, list[int], list[int]]
"""(group, held out, ids of the question, ids of the answer)"""


def answered(folder: Path, device: str, asked: list[Question]) -> list[Answered]:
    """Returns the greedy answer to each question."""
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    prompts = [encoder.encode(question.prompt)[0] for question in asked]
    lengths = [encoder.encode(question.document)[1].count(ANSWER) + 2 for question in asked]
    given = answer_prompts(folder, device, prompts, lengths)
    return [(q.group, q.held_out, ids, answer) for q, ids, answer in zip(asked, prompts, given, strict=True)]


def accepted(model: Model, question: list[int], answer: list[int]) -> tuple[int, int]:
    """Returns how many of the answer's tokens the draft guessed, and how many it could have."""
    ids = question + answer
    device, cache = model.cache_spec.device, model.new_cache(len(ids))
    batch = ForwardBatch.of([(ids[:-2], cache)], device)
    next_ids = torch.tensor(ids[1:-1], device=device)
    hidden = model.drafts[0].hidden(model.hidden(batch), next_ids, batch)
    rows = torch.arange(len(question) - 1, len(ids) - 2, device=device)
    guessed = model.logits(hidden, rows).argmax(-1).tolist()
    cache.release()
    return sum(one == other for one, other in zip(guessed, answer[1:], strict=True)), len(guessed)


def form(group: str) -> str:
    return "/".join(group.split("/")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_model_dir(), help="checkpoint folder, with a draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=500, help="of the examination, to ask")
    parser.add_argument("--answers", type=Path, help="file of the model's answers")
    arguments = parser.parse_args()
    if arguments.answers and arguments.answers.exists():
        found = json.loads(arguments.answers.read_text(encoding="utf-8"))
    else:
        asked = random.Random(Recipe().seed).sample(questions(Recipe().seed), arguments.questions)
        found = answered(arguments.model, arguments.device, asked)
        if arguments.answers:
            arguments.answers.write_text(json.dumps(found), encoding="utf-8")
    default = EngineConfig.for_device(arguments.device)
    engine = EngineConfig(arguments.device, default.dtype, MAX_TOKENS, 1, MAX_TOKENS, loads_draft=True, graphs=False)
    model = load_model(arguments.model, engine)
    right: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for group, held_out, question, answer in found:
        hits, total = accepted(model, question, answer) if len(answer) > 1 else (0, 0)
        for name in (form(group), "all held out" if held_out else "all trained", "all"):
            right[name] += hits
            counted[name] += total
    for name in sorted(counted):
        print(f"{name:34} {right[name]:6} / {counted[name]:6}  {right[name] / max(1, counted[name]):.3f}")


if __name__ == "__main__":
    main()
