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
from ownpath.conformance.quant_weights import draw_rows, draw_weights
from ownpath.formats import FP8_BLOCK
from ownpath.kernels.contract import StoredLinear
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.fp8.linear import fp8_linear
from ownpath.kernels.fp8.spec import PREFILL_FROM
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.numerics import fake_quantize_fp8
from ownpath.official import OFFICIAL
from ownpath.qtensor import QuantTensor
from ownpath.runners.linear import LinearRunner, QuantizedLinear

pytestmark = pytest.mark.gpu

SMALL = Fp8Case("small", (192,), 512, "e8m0")
QUESTION = "What is the capital of Kenya?"


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model, and of the product with an FP8 weight."""
    yield from model_configs(default_model_dir(), official=OFFICIAL)
    weights, scales = draw_weights(SMALL, 0, torch.device("cpu"))
    shards = StoredLinear(tuple(QuantTensor(w, s, None, FP8_BLOCK) for w, s in zip(weights, scales, strict=True)))
    yield from fp8_linear.planned_configs(shards)


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
@pytest.mark.parametrize("num_rows", [PREFILL_FROM - 1, PREFILL_FROM, 300])
def test_a_kernel_that_rounds_its_input_is_not_given_rounded_ones(num_rows: int, cuda: torch.device) -> None:
    """Either way, a call has the bits of one with the rounded input."""
    weights, scales = draw_weights(SMALL, 0, cuda)
    shards = StoredLinear(tuple(QuantTensor(w, s, None, FP8_BLOCK) for w, s in zip(weights, scales, strict=True)))
    quantized, plain = (one("cute.fp8_linear_sm90", shards) for one in (QuantizedLinear, LinearRunner))
    x = draw_rows(num_rows, SMALL.width, 1.0, cuda)
    assert quantized.kernel.rounds_to_powers(quantized.operand, num_rows) == (num_rows >= PREFILL_FROM)
    assert torch.equal(quantized(x), plain(fake_quantize_fp8(x, 128)))


@pytest.mark.sm90
def test_linears_keep_their_hopper_kernels(cuda: torch.device) -> None:
    plan = plan_model(default_model_dir(), str(cuda), official=OFFICIAL)
    found = {op.choice.kernel.runner: op.choice.kernel.name for op in plan.ops}
    assert found["QuantizedNvfp4Linear"] == "cute.nvfp4_linear"
    assert found["QuantizedFp8Linear"] == "cute.fp8_linear_sm90"
