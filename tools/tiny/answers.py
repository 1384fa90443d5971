"""Greedy answers from prompts: by ownpath's engine, or by transformers on the checkpoint's read-back values."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from tiny.tokens import VOCAB_SIZE

EOS_ID = 1
# Prompts and how many tokens each answer may have -> the answers' token ids, EOS included where it came.
Answerer = Callable[[list[list[int]], list[int]], list[list[int]]]


def ownpath_answerer(folder: Path, device: str, num_seqs: int = 64) -> Answerer:
    """Returns an answerer: ownpath's engine on the checkpoint in ``folder``, ``num_seqs`` prompts at a time."""
    default = EngineConfig.for_device(device, max_model_len=1024)
    config = EngineConfig(device, default.dtype, 1024, num_seqs, max_prefill_tokens=1024)
    model = load_model(folder, config)

    def answer(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        engine = Engine(model, config, VOCAB_SIZE, max_num_queued=len(prompts))
        engine.start()
        outputs: queue.SimpleQueue[tuple[int, StepOutput]] = queue.SimpleQueue()
        engine.submit([_request(i, ids, limit, outputs) for i, (ids, limit) in _numbered(prompts, max_tokens)])
        found: list[list[int]] = [[] for _ in prompts]
        num_open = len(prompts)
        while num_open:
            i, output = outputs.get()
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.token is not None:
                found[i].append(output.token.token_id)
            num_open -= output.finish_reason is not None
        engine.stop()
        return found

    return answer


def _numbered(prompts: list[list[int]], max_tokens: list[int]) -> list[tuple[int, tuple[list[int], int]]]:
    return list(enumerate(zip(prompts, max_tokens, strict=True)))


def _request(number: int, ids: list[int], limit: int, outputs: "queue.SimpleQueue[tuple[int, StepOutput]]") -> Request:
    params = SamplingParams(max_tokens=limit, temperature=0.0)
    return Request(ids, params, lambda output: outputs.put((number, output)))


def transformers_answerer(network: Any) -> Answerer:
    """Returns an answerer: transformers' network, one prompt at a time, without a cache; slow."""

    @torch.no_grad()
    def answer(prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        found = []
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            ids = list(prompt)
            while len(ids) < len(prompt) + limit and ids[-1] != EOS_ID:
                logits = network(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits
                ids.append(int(logits[0, -1].argmax()))
            found.append(ids[len(prompt) :])
        return found

    return answer
