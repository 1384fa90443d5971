"""Records of calls: told by the runners themselves, one entry for calls that look alike."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.config import EngineConfig
from ownpath.formats import NVFP4
from ownpath.kernels.contract import Routing
from ownpath.kernels.nvfp4.choose import choose_linear, choose_moe
from ownpath.kernels.nvfp4.launch import PackedWeight
from ownpath.kernels.nvfp4.linear import LinearOperand, nvfp4_linear, nvfp4_linear_invariant
from ownpath.kernels.nvfp4.moe import MoeOperand, nvfp4_moe
from ownpath.kernels.nvfp4.moe_sliced import sliced_configs
from ownpath.kernels.registry import KERNELS, SPECS, spec_of
from ownpath.loading import load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.official import OFFICIAL
from ownpath.ops import OpKind
from ownpath.plan.plan import Plan
from ownpath.runners import (
    GroupedLinear,
    HyperBoundary,
    HyperWeights,
    Nvfp4LinearW4A4,
    Nvfp4MoEW4A4,
    PlainLinear,
    RMSNorm,
    Router,
    SwiGLU,
)
from ownpath.trace import Ledger, Record, Records
from ownpath.trace.records import signature
from ownpath.trace.uses import Use, use_of, variant_of

FOLLOWING = EngineConfig(max_model_len=64)


def recorded(folder: Path, engine: EngineConfig, *steps: list[int]) -> dict[str, list[Record]]:
    model = load_model(folder, engine)
    cache = model.new_cache()
    with model.ledger.observe(Records()) as records:
        for token_ids in steps:
            model.forward(ForwardBatch.of([(token_ids, cache)], "cpu"))
    return {slot: records.listed(slot) for slot in model.ledger.calls}


def layouts_of(plan: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for planned in plan.decided:
        found.setdefault(planned.spec.slot, set()).add(planned.choice.kernel.layout)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runners_tell_what_was_planned_of_them(layout: str, tmp_path: Path) -> None:
    """Runner and kernel come from the objects that ran, and are those of the plan, for every way of storing weights."""
    random_checkpoint(tmp_path, layout)
    plan = plan_model(tmp_path, "cpu")
    found = recorded(tmp_path, FOLLOWING, [5, 6, 7, 8], [9])
    assert {slot: (r.use.runner, r.use.kernel) for slot, (r, *_) in found.items()} == plan.slots
    for slot, layouts in layouts_of(plan).items():
        assert layouts <= set(found[slot][0].use.layout.replace("+", " or ").split(" or ")), slot


def test_official_runners_tell_it_too(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    official = OFFICIAL
    engine = dataclasses.replace(FOLLOWING, official=official)
    found = recorded(tmp_path, engine, [5, 6, 7, 8], [9])
    uses = {slot: (r.use.runner, r.use.kernel) for slot, (r, *_) in found.items()}
    assert uses == plan_model(tmp_path, "cpu", official=official).slots


def test_what_looks_alike_is_counted_in_one_entry(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, "full-nvfp4")
    prefill, decode = recorded(tmp_path, FOLLOWING, [5, 6, 7], [8], [9])["layers.1.ffn.experts"]
    config = plan_model(tmp_path, "cpu").config
    dim, chosen = config.hidden_size, config.num_experts_per_tok
    for record, num_tokens, num_calls in ((prefill, 3, 1), (decode, 1, 2)):
        use = Use("Nvfp4MoE", "ref.nvfp4_moe", "row_major")
        arguments = (
            f"float32[{num_tokens}, {dim}]",
            f"int64[{num_tokens}, {chosen}]",
            f"float32[{num_tokens}, {chosen}]",
        )
        results = (f"float32[{num_tokens}, {dim}]",)
        assert record == Record("layers.1.ffn.experts", use, "nvfp4.ref:NVFP4_MOE", arguments, results, num_calls)


def test_a_slot_keeps_a_bounded_number_of_entries() -> None:
    ledger, records = Ledger({"a": ("SwiGLU", "ref.swiglu")}), Records(max_per_slot=3)
    ledger.observers.attach(records)
    swiglu = ledger.watch("a", SwiGLU(8.0))
    for num_tokens in (1, 2, 3, 4, 5, 2):
        swiglu(torch.zeros(num_tokens, 4))
    counts = [(record.arguments, record.num_calls) for record in records.listed("a")]
    assert counts == [(("float32[1, 4]",), 1), (("float32[2, 4]",), 2), (("float32[3, 4]",), 1)]
    assert records.num_unlisted("a") == 2
    ledger.clear()
    assert not list(records)
    assert not ledger.calls
    assert records.num_unlisted("a") == 0
    swiglu(torch.zeros(1, 4))
    assert [record.num_calls for record in records] == [1], "observers stay attached"


def test_dtypes_tell_calls_apart() -> None:
    ledger, records = Ledger({"a": ("RMSNorm", "ref.rms_norm")}), Records()
    ledger.observers.attach(records)
    norm = ledger.watch("a", RMSNorm(None, 1e-6))
    for dtype in (torch.float32, torch.bfloat16):
        norm(torch.ones(2, 4, dtype=dtype))
    assert [record.results for record in records] == [("float32[2, 4]",), ("bfloat16[2, 4]",)]


def test_tensors_are_found_inside_tuples_and_dataclasses() -> None:
    @dataclasses.dataclass(frozen=True)
    class Pair:
        first: torch.Tensor
        rest: tuple[Any, ...]

    one, two = torch.zeros(1), torch.zeros(2, 3, dtype=torch.int64)
    found = signature((None, 7, Pair(one, (two, "text", [one])), {"not": one}))
    assert found == (((1,), torch.float32), ((2, 3), torch.int64), ((1,), torch.float32))


def test_what_is_no_runner_of_ours_says_so() -> None:
    def of_somebody_else(x: torch.Tensor) -> torch.Tensor:
        return x

    name = "test_what_is_no_runner_of_ours_says_so.<locals>.of_somebody_else"
    assert use_of(of_somebody_else) == Use(name, f"unregistered {__name__}.{name}", "unknown")
    assert variant_of(of_somebody_else, (torch.zeros(1),)) == "unknown"
    with pytest.raises(ValueError, match=r"there is no kernel 'somebody.elses'"):
        RMSNorm(None, 1e-6, kernel="somebody.elses")


def test_names_and_implementations_are_one_to_one() -> None:
    places = {spec.name: spec.entry for spec in SPECS}
    assert len(set(places.values())) == len(places)
    assert {spec.entry for spec in SPECS} == set(places.values()), "specs of one name share an implementation"


@pytest.mark.parametrize("num_tokens", [1, 16, 129, 3000])
def test_a_dense_call_names_the_kernel_that_is_chosen_for_its_sizes(num_tokens: int) -> None:
    empty = torch.empty(0)
    operand = LinearOperand(PackedWeight(empty, empty, empty, 2048, 4096), empty)
    x = torch.empty(num_tokens, 4096, dtype=torch.bfloat16, device="meta")
    assert nvfp4_linear.variant(x, operand) == choose_linear(num_tokens, 2048, 4096, False).gemm.name
    assert nvfp4_linear_invariant.variant(x, operand) == choose_linear(num_tokens, 2048, 4096, True).gemm.name


@pytest.mark.parametrize("num_tokens", [1, 64, 2000])
def test_a_call_of_experts_names_both_products(num_tokens: int) -> None:
    empty = torch.empty(0)
    w13, w2 = PackedWeight(empty, empty, empty, 4096, 4096), PackedWeight(empty, empty, empty, 4096, 2048)
    ids = torch.empty(num_tokens, 6, dtype=torch.int64, device="meta")
    choice = choose_moe(6 * num_tokens, 256, 4096, 2048, False)
    named = nvfp4_moe.variant(ids, Routing(ids, empty), MoeOperand(w13, w2, 256, 7.0))
    launched = [choice.gate_up, choice.down]
    if choice.sliced:
        launched = [*sliced_configs(choice.sliced, True, False, 0)]
    assert named.split() == [config.name for config in launched]


def test_nobody_asked_nothing_is_recorded() -> None:
    ledger = Ledger({"a": ("SwiGLU", "ref.swiglu")})
    swiglu: Callable[..., Any] = ledger.watch("a", SwiGLU(8.0))
    swiglu(torch.zeros(1, 4))
    assert not ledger.observers.attached
    assert dict(ledger.calls) == {"a": 1}


BF16 = torch.bfloat16


def rows(num_tokens: int, *dims: int) -> torch.Tensor:
    return torch.zeros(num_tokens, *dims, dtype=BF16)


def boundary(name: str) -> HyperBoundary:
    dim = 64
    fn, base, scale = torch.zeros(24, 4 * dim), torch.zeros(24), torch.zeros(3)
    weights = HyperWeights(fn, base, scale, torch.ones(dim, dtype=BF16), 4, 1e-6, 1e-6, 1e-6)
    return HyperBoundary(weights, kernel=name)


def experts_w4a4(name: str) -> Nvfp4MoEW4A4:
    codes13, codes2 = (torch.zeros(4, n, k // 2, dtype=torch.uint8) for n, k in ((512, 256), (256, 256)))
    scales = [torch.ones(4, c.shape[1], c.shape[2] // 8).to(torch.float8_e4m3fn) for c in (codes13, codes2)]
    ones = torch.ones(4)
    w13, w2 = ((codes, scale, ones, ones) for codes, scale in zip((codes13, codes2), scales, strict=True))
    return Nvfp4MoEW4A4(w13, w2, 7.0, kernel=name)


def linear_w4a4(name: str) -> Nvfp4LinearW4A4:
    codes, scale = torch.zeros(256, 128, dtype=torch.uint8), torch.ones(256, 16).to(torch.float8_e4m3fn)
    return Nvfp4LinearW4A4(codes, scale, torch.tensor(1.0), torch.tensor(1.0), kernel=name)


def routed(num_tokens: int) -> tuple[torch.Tensor, ...]:
    ids = torch.zeros(num_tokens, 2, dtype=torch.int64)
    return rows(num_tokens, 256), ids, torch.ones(num_tokens, 2)


def turned(num_tokens: int) -> tuple[Any, ...]:
    return rows(num_tokens, 4, 128), (torch.ones(num_tokens, 32), torch.zeros(num_tokens, 32))


def grouped(name: str) -> GroupedLinear:
    return GroupedLinear(torch.zeros(128, 256, dtype=BF16), 2, kernel=name)


def by_score(name: str) -> Router:
    return Router(PlainLinear(torch.zeros(8, 64)), 6, 1.0, torch.zeros(8), None, kernel=name)


def linear(name: str) -> PlainLinear | Nvfp4LinearW4A4:
    is_stored_in_nvfp4 = NVFP4 in spec_of(name).formats
    return linear_w4a4(name) if is_stored_in_nvfp4 else PlainLinear(torch.zeros(8, 256, dtype=BF16), kernel=name)


RUNNERS: dict[OpKind, tuple[Callable[[str], Any], Callable[[int], tuple[Any, ...]]]] = {
    OpKind.LINEAR: (linear, lambda t: (rows(t, 256),)),
    OpKind.MOE: (experts_w4a4, routed),
    OpKind.GROUPED: (grouped, turned),
    OpKind.HYPER: (boundary, lambda t: (rows(t, 4, 64), None, None)),
    OpKind.NORM: (lambda name: RMSNorm(None, 1e-6, kernel=name), lambda t: (rows(t, 64),)),
    OpKind.ROUTER: (by_score, lambda t: (rows(t, 64), torch.zeros(t, dtype=torch.int64))),
    OpKind.SWIGLU: (lambda name: SwiGLU(7.0, kernel=name), lambda t: (rows(t, 128),)),
}
"""Operation -> its runner around a kernel, and the arguments of a call of so many tokens."""


@pytest.mark.parametrize(
    "name", [name for name in KERNELS if name.startswith("triton.") and spec_of(name).kind in RUNNERS]
)
def test_a_triton_kernel_names_the_tile_for_its_sizes(name: str) -> None:
    """Few tokens and many take the tiles that the launchers choose: one where bits must not depend on the number."""
    spec = spec_of(name)
    make, arguments = RUNNERS[spec.kind]
    runner = make(name)
    assert use_of(runner).kernel == name
    few, many = (variant_of(runner, arguments(num_tokens)) for num_tokens in (1, 3000))
    assert (few == many) == spec.is_batch_invariant
    assert re.fullmatch(r"[a-z0-9_]+", few)


def test_a_replayed_step_counts_like_the_calls_that_were_captured() -> None:
    ledger, x = Ledger({"a": ("SwiGLU", "ref.swiglu"), "b": ("SwiGLU", "ref.swiglu")}), torch.ones(1, 8)
    calls: dict[str, Callable[..., Any]] = {slot: ledger.watch(slot, SwiGLU(8.0)) for slot in ("a", "b")}
    with ledger.counting_apart() as made:
        calls["a"](x)
        calls["a"](x)
        calls["b"](x)
    captured = ledger.captured(made)
    assert not ledger.calls
    captured.num_replays += 3
    calls["b"](x)
    assert dict(ledger.calls) == {"a": 6, "b": 4}
    ledger.clear()
    assert not ledger.calls
    captured.num_replays += 1
    assert dict(ledger.calls) == {"a": 2, "b": 1}
