"""Scores from single forwards over prompt and answer: right where every answer token is the most likely one.

Greedy decoding gives the right answer exactly when this holds, so for whole examinations on a GPU it is the same
measure without a decoding loop (up to rounding between the two ways to compute).
"""

from typing import Any

import torch
from torch import Tensor

from tiny.batches import ANSWER, Encoder
from tiny.network import window_mask
from tiny.question import Question, scores

BATCH_TOKENS = 12_288
_WIDTHS = (24, 48, 128, 192, 512, 768)  # the training rows', so that nothing is compiled anew
_Item = tuple[Question, list[int], list[int]]


def teacher_forced_scores(
    network: Any, encoder: Encoder, asked: list[Question], device: str, batch_tokens: int = BATCH_TOKENS
) -> dict[str, dict[str, int]]:
    """Scores of each group, from full batches of ``batch_tokens``: as many tokens as training has in a step.

    Gradients stay on, as in training: compiled parts would be compiled a second time without them, for many minutes.
    Errors: ValueError for a question longer than 768 tokens.
    """
    by_width: dict[int, list[_Item]] = {}
    for question in asked:
        ids, roles = encoder.encode(question.document)
        width = next((width for width in _WIDTHS if len(ids) <= width), None)
        if width is None:
            raise ValueError(f"{question.group}: {len(ids)} tokens, more than {_WIDTHS[-1]}")
        by_width.setdefault(width, []).append((question, ids, roles))
    results = []
    for width, items in by_width.items():
        step = max(1, batch_tokens // width)
        for start in range(0, len(items), step):
            batch = items[start : start + step]
            padded, answer = _padded(batch, step, width, encoder.pad_id)
            mask = window_mask(width, network.config.sliding_window, device).expand(step, -1, -1, -1)
            logits = network(
                input_ids=padded.to(device), attention_mask={"window": mask}, use_cache=False
            ).logits.detach()
            wrong = (logits[:, :-1].argmax(dim=-1).cpu() != padded[:, 1:]) & answer[:, 1:]
            right = (~wrong.any(dim=-1)).tolist()
            results += [(item[0], bool(ok)) for item, ok in zip(batch, right, strict=False)]
    return scores(results)


def _padded(batch: list[_Item], num_rows: int, width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of the batch and empty ones up to ``num_rows``."""
    ids = torch.full((num_rows, width), pad_id)
    answer = torch.zeros(num_rows, width, dtype=torch.bool)
    for row, (_, tokens, roles) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        answer[row, : len(roles)] = torch.tensor(roles) == ANSWER
    return ids, answer
