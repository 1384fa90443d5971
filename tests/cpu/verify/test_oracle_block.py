"""The oracle, a layer at a time: against transformers as a whole, and slot by slot against the engine in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYOUTS, random_checkpoint
from support.engine_slots import engine_slots
from support.slots import slots_apart
from support.transformers_v4 import reference_logprobs

from ownpath.checkpoint.schema import Encoding
from ownpath.config import EngineConfig
from ownpath.official import OFFICIAL, PLAIN, Step
from ownpath.oracle.arithmetic import Arithmetic
from ownpath.oracle.block import Choices, LayerTrace, reference_block, reference_embed
from ownpath.oracle.forward import reference_logits
from ownpath.oracle.weights import StoredWeights
from ownpath.verify.layer import load_layer
from ownpath.verify.subject import Subject

FLOAT64_NOISE = 2**16 * torch.finfo(torch.float64).eps
"""As in test_official: only the order of sums differs."""
FLOAT32_ROUNDINGS = 64
"""transformers computes in float32: five layers of a dozen products and norms each, every one rounded once."""
CPU = torch.device("cpu")
NUM_TOKENS = 260


def token_ids(count: int = NUM_TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed))


def subject(folder: Path, layout: str, official: frozenset[Step] = PLAIN, **changes: Any) -> Subject:
    random_checkpoint(folder, layout, seed=1, **changes)
    return Subject.of(folder, EngineConfig(dtype=torch.float64, official=official))


def streams(of: Subject, seed: int = 5) -> torch.Tensor:
    """Something that the streams may be between layers: no two alike."""
    shape = (NUM_TOKENS, of.config.hc_mult, of.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(
    of: Subject, layer_idx: int, x_TSD: torch.Tensor, choices: Choices | None = None, **arithmetic: Any
) -> LayerTrace:
    how = Arithmetic(**arithmetic)
    stored = StoredWeights(of.index, CPU, how.dtype)
    return reference_block(of.config, layer_idx, stored, of.plan, x_TSD, token_ids(len(x_TSD)), how, choices)


def assert_equal_slots(found: dict[str, torch.Tensor], trace: LayerTrace) -> None:
    missing = set(found) - set(trace.values)
    assert not missing, "slots that the oracle does not name"
    for slot, result in found.items():
        expected = trace.values[slot]
        assert result.numel() == expected.numel(), slot
        expected = expected.view(result.shape)
        if result.is_floating_point():
            assert result.isfinite().all(), slot
            assert (result - expected).abs().max() <= FLOAT64_NOISE * expected.abs().max(), slot
        else:
            assert torch.equal(result, expected), slot


def test_logprobs_equal_transformers(tmp_path: Path) -> None:
    """The engine equals transformers in every layout (test_parity), and the oracle the engine, slot by slot (below)."""
    checkpoint = random_checkpoint(tmp_path, "full-nvfp4", seed=1)
    of, ids = Subject.of(tmp_path, EngineConfig()), token_ids(640)
    found = reference_logits(of.plan, StoredWeights(of.index, CPU), ids, Arithmetic()).log_softmax(-1)
    expected = reference_logprobs(checkpoint, ids.tolist(), CPU).double()
    worst = (found - expected).abs().max()
    assert worst <= FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("official", [PLAIN, OFFICIAL], ids=["plain", "official"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_slot_equals_the_engines(layout: str, official: frozenset[Step], tmp_path: Path) -> None:
    """Every layer of the model, each on streams of its own: sliding with hashed experts, CSA, HCA."""
    of = subject(tmp_path, layout, official)
    for layer_idx in of.layer_ids:
        x_TSD = streams(of, seed=layer_idx)
        found = engine_slots(load_layer(of, layer_idx), x_TSD, token_ids(len(x_TSD)))
        own = (slot for slot in slots_apart(of.plan) if slot.startswith(f"layers.{layer_idx}."))
        planned = {slot for slot in own if ".decode." not in slot}
        assert {slot.removesuffix(".x").removesuffix(".ids") for slot in found} >= planned
        trace = block(of, layer_idx, x_TSD, official=official)
        assert_equal_slots(found, trace)
        assert torch.equal(trace.streams_TSD, trace.values[f"layers.{layer_idx}.out"])


@pytest.mark.parametrize("official", [PLAIN, OFFICIAL], ids=["plain", "official"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_sequences_shorter_than_a_compressors_window(count: int, official: frozenset[Step], tmp_path: Path) -> None:
    of = subject(tmp_path, "full-nvfp4", official)
    for layer_idx in of.layer_ids:
        x_TSD = streams(of)[:count]
        assert_equal_slots(
            engine_slots(load_layer(of, layer_idx), x_TSD, token_ids(len(x_TSD))),
            block(of, layer_idx, x_TSD, official=official),
        )


def test_choices_are_taken_over(tmp_path: Path) -> None:
    of = subject(tmp_path, "full-nvfp4", index_topk=16)
    x_TSD, name = streams(of), "layers.3"
    free = block(of, 3, x_TSD)
    ids, mask = free.values[f"{name}.ffn.router.ids"], free.values[f"{name}.attn.indexer.mask"]
    assert mask.sum(1).max() == 16
    same = block(of, 3, x_TSD, Choices(ids.int(), mask))
    assert all(torch.equal(same.values[slot], value) for slot, value in free.values.items())
    other_ids = (ids + 1) % of.config.n_routed_experts
    other = block(of, 3, x_TSD, Choices(expert_ids_TK=other_ids))
    assert torch.equal(other.values[f"{name}.ffn.router.ids"], other_ids)
    weights = other.values[f"{name}.ffn.router.weights"]
    scores = torch.nn.functional.softplus(free.values[f"{name}.ffn.gate"]).sqrt().gather(1, other_ids)
    expected = of.config.routed_scaling_factor * scores / scores.sum(1, keepdim=True)
    assert (weights - expected).abs().max() <= FLOAT64_NOISE
    fewer = block(of, 3, x_TSD, Choices(index_mask_TC=mask & (torch.arange(mask.shape[1]) != 7)))
    first = 4 * 7 + 3
    assert torch.equal(fewer.streams_TSD[:first], free.streams_TSD[:first]), "entry 7 was not there yet"
    assert not torch.equal(fewer.streams_TSD[first:], free.streams_TSD[first:])


def test_narrow_results_are_numbers_of_that_dtype(tmp_path: Path) -> None:
    of = subject(tmp_path, "modelopt-experts-only")
    wide = ("gate", "wkv_wgate", "weights_proj", "weights", "scores", "ids", "mask")
    for layer_idx in of.layer_ids:
        trace = block(of, layer_idx, streams(of), dtype=torch.float32, narrow=torch.bfloat16)
        for slot, value in trace.values.items():
            is_wide = slot.rpartition(".")[2] in wide
            assert (
                torch.equal(value.bfloat16().to(value.dtype), value)
            ) is not is_wide or not value.is_floating_point()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_as_near_as_its_roundings(layout: str, tmp_path: Path, device: torch.device) -> None:
    """On a GPU too: products are IEEE float32 there (TF32 would be 2^13 times further away)."""
    of = subject(tmp_path, layout)
    stored, how = StoredWeights(of.index, device, torch.float32), Arithmetic(torch.float32)
    for layer_idx in of.layer_ids:
        exact = block(of, layer_idx, streams(of))
        ids, mask = (exact.values.get(f"layers.{layer_idx}.{name}") for name in ("ffn.router.ids", "attn.indexer.mask"))
        choices = Choices(ids, mask)
        found = reference_block(of.config, layer_idx, stored, of.plan, streams(of), token_ids(), how, choices)
        assert (found.streams_TSD.dtype, found.streams_TSD.device.type) == (torch.float32, device.type)
        difference = (found.streams_TSD.double().cpu() - exact.streams_TSD).norm() / exact.streams_TSD.norm()
        assert 0 < difference <= FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps


def test_w4a4_is_what_official_numerics_do_to_nvfp4_inputs(tmp_path: Path) -> None:
    of = subject(tmp_path, "full-nvfp4", frozenset({Step.NVFP4_INPUTS}))  # a plan without it holds no input scales
    plain = block(of, 2, streams(of)).streams_TSD
    w4a4 = block(of, 2, streams(of), w4a4=True).streams_TSD
    assert torch.equal(w4a4, block(of, 2, streams(of), official=frozenset({Step.NVFP4_INPUTS})).streams_TSD)
    assert not torch.equal(w4a4, plain)


@pytest.mark.parametrize("fp8_scale", [torch.float8_e8m0fnu, torch.float32], ids=str)
def test_w8a8_rounds_what_enters_fp8_linears_and_nothing_else(fp8_scale: torch.dtype, tmp_path: Path) -> None:
    """Scales of activations are powers of two where those of the weights are."""
    of, name = subject(tmp_path, "deepseek-native", fp8_scale=fp8_scale), "layers.2"
    trace = block(of, 2, streams(of), w8a8=True)
    encodings = {module.name: op.encoding for op in of.plan.ops for module in op.spec.modules}

    def product(entering: str, module: str, quantised: bool) -> torch.Tensor:
        x = trace.values[f"{name}.{entering}"]
        if quantised:
            amax = x.float().abs().amax(1, keepdim=True)  # 64 or 128 columns: one block
            scale = amax / torch.tensor(448.0)
            if fp8_scale is torch.float8_e8m0fnu:
                scale = torch.exp2(scale.log2().ceil())
            x = (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()
        weight = StoredWeights(of.index, CPU).matrix(f"{name}.{module}", encodings[f"{name}.{module}"])
        return x @ weight.T

    def assert_is(slot: str, expected: torch.Tensor) -> None:
        found = trace.values[f"{name}.{slot}"]
        assert (found - expected).abs().max() <= FLOAT64_NOISE * expected.abs().max()

    assert_is("attn.wq_b", product("attn.q_norm", "attn.wq_b", quantised=True))
    assert_is("ffn.shared_experts.w2", product("ffn.shared_experts.swiglu", "ffn.shared_experts.w2", quantised=True))
    assert_is("ffn.gate", product("hc_ffn.h", "ffn.gate", quantised=False))
    fused = torch.cat([product("hc_attn.h", f"attn.{part}", quantised=True) for part in ("wq_a", "wkv")], 1)
    assert_is("attn.wqa_wkv", fused)


def test_experts_that_no_token_goes_to_are_not_read(tmp_path: Path) -> None:
    of = subject(tmp_path, "full-nvfp4")
    read: list[str] = []

    class Watched(StoredWeights):
        def factors(self, module: str, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor | None]:
            read.append(module)
            return super().factors(module, encoding)

    stored = Watched(of.index, CPU)
    trace = reference_block(of.config, 2, stored, of.plan, streams(of)[:1], token_ids(1), Arithmetic())
    chosen = trace.values["layers.2.ffn.router.ids"]
    experts = {f"layers.2.ffn.experts.{expert}.{part}" for expert in chosen[0].tolist() for part in ("w1", "w2", "w3")}
    assert {module for module in read if ".experts." in module} == experts
    assert len(read) == len(set(read)), "each matrix once"


def test_embedding_repeats_a_tokens_row(tmp_path: Path) -> None:
    of = subject(tmp_path, "bf16")
    x_TSD = reference_embed(of.config, StoredWeights(of.index, CPU), torch.tensor([3, 3, 90]), Arithmetic())
    assert x_TSD.shape == (3, of.config.hc_mult, of.config.hidden_size)
    assert torch.equal(x_TSD[0], x_TSD[1])
    assert (x_TSD == x_TSD[:, :1]).all()
    assert not torch.equal(x_TSD[0], x_TSD[2])
