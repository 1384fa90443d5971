"""Greedy answers from prompts, by ownpath's engine."""

import queue
from pathlib import Path

from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.engine.request import Request, SamplingParams, StepOutput
from ownpath.loading import load_model
from tiny.tokens import VOCAB_SIZE

NUM_SEQS = 64


def answer_prompts(folder: Path, device: str, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
    """Returns each answer's token ids, EOS included where it came; ``NUM_SEQS`` prompts at a time.

    folder: of the checkpoint. max_tokens: of each answer. Errors: RuntimeError for a request that the engine gives up.
    """
    default = EngineConfig.for_device(device, max_model_len=1024)
    config = EngineConfig(device, default.dtype, 1024, NUM_SEQS, max_prefill_tokens=1024)
    engine = Engine(load_model(folder, config), config, VOCAB_SIZE, max_num_queued=len(prompts))
    engine.start()
    outputs: queue.SimpleQueue[tuple[int, StepOutput]] = queue.SimpleQueue()
    limits = enumerate(zip(prompts, max_tokens, strict=True))
    engine.submit([_request(number, ids, limit, outputs) for number, (ids, limit) in limits])
    found: list[list[int]] = [[] for _ in prompts]
    num_open = len(prompts)
    while num_open:
        number, output = outputs.get()
        if output.error is not None:
            raise RuntimeError(output.error)
        if output.token is not None:
            found[number].append(output.token.token_id)
        num_open -= output.finish_reason is not None
    engine.stop()
    return found


def _request(number: int, ids: list[int], limit: int, outputs: "queue.SimpleQueue[tuple[int, StepOutput]]") -> Request:
    params = SamplingParams(max_tokens=limit, temperature=0.0)
    return Request(ids, params, lambda output: outputs.put((number, output)))
