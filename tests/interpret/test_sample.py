"""The sampler's kernel, interpreted, against its twin: the same tokens, faults and log-probabilities."""

import math
from dataclasses import dataclass

import pytest
import torch
from support.sampling import filters, mixed_rows, plain_rows

from ownpath.kernels.sample.launch import SAMPLE, SampleShape, TritonSample
from ownpath.kernels.sample.ref import sample
from ownpath.kernels.sample.types import Sampled, SampleRows


def outputs(num_rows: int) -> Sampled:
    token, fault = torch.full((2, num_rows), -7)
    return Sampled(token, fault, torch.full((num_rows,), math.nan))


def compare(logits: torch.Tensor, rows: SampleRows, kernel: TritonSample = SAMPLE) -> Sampled:
    """Runs both; log-probabilities are sums of up to 5000 terms in float32."""
    found, wanted = outputs(len(logits)), outputs(len(logits))
    kernel.run(logits, rows, kernel.prepare(), out=found)
    sample(logits, rows, wanted)
    assert torch.equal(found.token_T, wanted.token_T)
    assert torch.equal(found.fault_T, wanted.fault_T)
    assert found.logprob_T is not None
    assert wanted.logprob_T is not None
    sound = wanted.fault_T == 0
    assert torch.allclose(found.logprob_T[sound], wanted.logprob_T[sound], rtol=0, atol=32 * 2**-20)
    return found


@pytest.mark.parametrize(
    ("num_vocab", "spread", "shape"),
    [(1, 1.0, None), (37, 2.0, None), (1000, 0.5, None), (5000, 3.0, None), (5000, 1.0, SampleShape(1, 1024, 16))],
)
def test_every_parameter(num_vocab: int, spread: float, shape: SampleShape | None) -> None:
    """Ties are planted: logits on a grid of eighths."""
    g = torch.Generator().manual_seed(num_vocab)
    num_rows = 24
    logits = (torch.randn(num_rows, num_vocab, generator=g) * spread * 8).round() / 8
    compare(logits, mixed_rows(num_rows, num_vocab, g), TritonSample(shape))
