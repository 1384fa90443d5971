"""Official numerics on CUDA: the planned kernels behind quantisers, every planned operation run, the CPU's answers."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.kernels.dsl.cache import Config
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.official import OFFICIAL

pytestmark = pytest.mark.gpu

QUESTION = "What is the capital of Kenya?"


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir(), official=OFFICIAL)


def next_token(device: str, prompt: list[int]) -> tuple[int, set[str]]:
    """The likeliest token after the prompt, and the slots that ran for it and for a decode step behind it."""
    config = replace(EngineConfig.for_device(device, 512), dtype=torch.bfloat16, official=OFFICIAL)
    model = load_model(default_model_dir(), config)
    cache = model.new_cache()
    logits = model.forward(ForwardBatch.of([(prompt, cache)], device))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(model.forward(ForwardBatch.of([([int(logits.argmax())], cache)], device))).all()
    return int(logits.argmax()), set(model.ledger.calls)


def test_the_embedded_model_answers_as_on_the_cpu(cuda: torch.device) -> None:
    tokenizer = Tokenizer.from_folder(default_model_dir())
    prompt = tokenizer.encode_segments(encode_messages([Message("user", QUESTION)]))
    ours, ran = next_token(str(cuda), prompt)
    expected, _ = next_token("cpu", prompt)
    assert ours == expected
    plan = plan_model(default_model_dir(), str(cuda), official=OFFICIAL)
    assert ran == set(plan.slots) - plan.idle_slots


@pytest.mark.sm90
def test_linears_keep_their_hopper_kernels(cuda: torch.device) -> None:
    plan = plan_model(default_model_dir(), str(cuda), official=OFFICIAL)
    found = {op.choice.kernel.runner: op.choice.kernel.name for op in plan.ops}
    assert found["QuantizedNvfp4Linear"] == "cute.nvfp4_linear"
    assert found["QuantizedFp8Linear"] == "cute.fp8_linear_sm90"
