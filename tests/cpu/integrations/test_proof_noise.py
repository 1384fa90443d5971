"""The noise of few elements: how often a right engine would be named, and that wrong ones still are."""

from pathlib import Path

import pytest
import torch
from cpu.integrations.test_proof_compare import LAYER, proof

from ownpath.checkpoint.writer import write_shard
from ownpath.integrations.vllm.proof.compare import Compared, RankSteps, compare_layer
from ownpath.integrations.vllm.proof.noise import FEW_ELEMENTS, Noise, total
from ownpath.integrations.vllm.proof.seen import StepRun
from ownpath.integrations.vllm.proof.steps import Planned
from ownpath.oracle.formulas import swiglu
from ownpath.verify.budgets import NOISE_FACTOR

WIDTH, MANY, TRIALS = 256, 24, 20_000
SWIGLU, ONE_ROUNDING = "ffn.shared_experts.swiglu", torch.finfo(torch.bfloat16).eps / 2


def rounded_once(x: torch.Tensor) -> torch.Tensor:
    return swiglu(*x.double().chunk(2, -1), proof().config.swiglu_limit)


def rounded_twice(x: torch.Tensor) -> torch.Tensor:
    """As an engine whose activation and product are operations of their own."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).bfloat16() * up


def drawn_rows() -> torch.Tensor:
    """Gate and up, of which few channels of a row are large: bfloat16 [rows, 2 * width]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4000, 2 * WIDTH, generator=generator).mul(1.5).exp().clamp(max=9.0).bfloat16()


def in_own_budgets(x: torch.Tensor) -> torch.Tensor:
    """The error of an engine that rounds twice, each row in units of the budget that the row itself tells."""
    right = rounded_once(x)
    own, off = ((y.double() - right).norm(dim=1) / right.norm(dim=1) for y in (right.bfloat16(), rounded_twice(x)))
    return off / torch.maximum(NOISE_FACTOR * own, torch.tensor(ONE_ROUNDING))


def unlucky_row() -> torch.Tensor:
    """The first row whose own noise names a right engine: [1, 2 * width]."""
    x = few_large(drawn_rows())
    return x[in_own_budgets(x) > 1.05][:1]


def few_large(x: torch.Tensor) -> torch.Tensor:
    """All channels but two are small."""
    scale = torch.full((WIDTH,), 2.0**-6)
    scale[:2] = 1
    return x * scale.repeat(2).bfloat16()


def steps_of(rows: list[torch.Tensor], values: list[torch.Tensor], folder: Path) -> list[StepRun]:
    """A prefill of many rows, and a decode of one behind it."""
    prefix = f"model.layers.{LAYER}"
    kinds = (("prefill", 0), ("decode", len(rows[0])))
    steps = []
    for number, ((kind, start), x, y) in enumerate(zip(kinds, rows, values, strict=True)):
        positions = torch.arange(start, start + len(x))
        kept = {
            f"{prefix}.ffn.shared_experts.gate_up_proj.forward:out": x,
            f"{prefix}.ffn.shared_experts.down_proj.forward:in": y,
            f"{prefix}.ffn.shared_experts.act_fn.forward:out": y,
            f"{prefix}.forward:positions": positions,
            f"{prefix}.forward:input_ids": positions,
        }
        path = folder / f"{number}.safetensors"
        write_shard(path, kept, {})
        planned = Planned(kind, len(x), {"a": (start, tuple(positions.tolist()))}, True)
        steps.append(StepRun(planned, "eager", {str(LAYER): path}, {}, (), True))
    return steps


def compared(folder: Path, factor: float = 1.0) -> list[Compared]:
    """SwiGLU of 24 rows as they come, and of the unlucky row alone, times a factor."""
    rows = [drawn_rows()[:MANY], unlucky_row()]
    values = [rounded_twice(rows[0]), (rounded_twice(rows[1]).float() * factor).bfloat16()]
    found = compare_layer(proof(), LAYER, [RankSteps(steps_of(rows, values, folder), {})])
    return [one for one in found if one.measured.slot == SWIGLU]


def test_a_right_row_whose_largest_element_was_rounded_by_little_is_right(tmp_path: Path) -> None:
    """Stock vLLM's SwiGLU on half a width, in a decode of one row, was 1.13 budgets off by the row's own noise."""
    found = compared(tmp_path)
    assert [one.step.planned.kind for one in found] == ["prefill", "decode"]
    assert max(one.measured.excess for one in found) < 1


def test_the_same_row_two_percent_too_large_is_named(tmp_path: Path) -> None:
    prefill, decode = compared(tmp_path, 1.02)
    assert prefill.measured.is_within
    assert not decode.measured.is_within


def test_how_often_a_right_engine_is_named() -> None:
    """One row at a time, of which two channels are large: by each row's own noise, and by that of all."""
    x = few_large(drawn_rows())
    right, engine = rounded_once(x), rounded_twice(x).double()
    noises = [Noise.of(y.bfloat16(), y) for y in right]
    every = total(noises)
    off = ((engine - right).norm(dim=1) / right.norm(dim=1)).tolist()
    named = [rel > noise.budget(every, torch.bfloat16) for rel, noise in zip(off, noises, strict=True)]
    assert float((in_own_budgets(x) > 1).double().mean()) > 0.01
    assert not any(named)


def test_many_elements_are_judged_by_their_own_noise() -> None:
    """However noisy other rows are: their budgets do not widen this one."""
    wide = torch.ones(3, 100, dtype=torch.float64)
    quiet, loud = Noise.of(wide + 2e-3, wide), Noise.of(wide + 1e-1, wide)
    assert quiet.elements == pytest.approx(300)
    assert quiet.budget(total([quiet, loud]), torch.bfloat16) == pytest.approx(NOISE_FACTOR * 2e-3)
    exact = Noise.of(wide, wide)
    assert exact.budget(total([exact, loud]), torch.bfloat16) == ONE_ROUNDING


def test_few_elements_are_judged_by_the_larger_noise() -> None:
    one = torch.tensor([[1.0, 1e-4, 1e-4]], dtype=torch.float64)
    lucky, noisy = Noise.of(one + 1e-5, one), Noise.of(one * 1.01, one)
    every = total([lucky, noisy])
    assert lucky.elements == pytest.approx(1, rel=1e-4)
    assert lucky.budget(every, torch.bfloat16) == pytest.approx(NOISE_FACTOR * 1e-2 / 2**0.5, rel=1e-2)
    assert noisy.budget(every, torch.bfloat16) == pytest.approx(NOISE_FACTOR * 1e-2, rel=1e-2)
    assert lucky.budget(lucky, torch.bfloat16) == 2 * ONE_ROUNDING


def test_zeros_and_values_that_rounding_makes_infinite_have_a_number() -> None:
    assert Noise.of(torch.zeros(2, 3), torch.zeros(2, 3)).relative == 0
    assert Noise.of(torch.tensor([torch.inf, 1.0]), torch.tensor([2.0, 1.0])).relative == pytest.approx(0.8**0.5)


def test_how_often_the_noise_of_few_elements_is_less_than_half() -> None:
    """As ``FEW_ELEMENTS`` says: equal elements with any mantissa, rounded to nearest."""
    generator, found = torch.Generator().manual_seed(7), {}
    for count in (3, 10, int(FEW_ELEMENTS)):
        mantissa = torch.exp2(torch.rand(TRIALS, count, generator=generator, dtype=torch.float64))
        error = (2 * torch.rand(TRIALS, count, generator=generator, dtype=torch.float64) - 1) / mantissa
        rms = error.square().mean().sqrt()
        found[count] = float((error.square().mean(1).sqrt() < rms / 2).double().mean())
    assert found[3] > 0.05 > 1e-2 > found[10] > 1e-4 > found[20]
