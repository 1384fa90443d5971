"""Values of a layer against the reference of each module: a right engine's are within their budgets in every step; a
wrong module is named with the steps in which it is wrong, and no other."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ownpath.checkpoint.writer import write_shard
from ownpath.finding import Verdict
from ownpath.formats import CacheFormat
from ownpath.integrations.vllm.proof.compare import Proof, RankSteps, compare_layer, count_wrong_choices
from ownpath.integrations.vllm.proof.findings import judge_choices, judge_values
from ownpath.integrations.vllm.proof.points import _OF_LAYER
from ownpath.integrations.vllm.proof.reference import ORDER, SequencePart, reference_values
from ownpath.integrations.vllm.proof.seen import StepRun
from ownpath.integrations.vllm.proof.steps import Planned
from ownpath.loading import default_model_dir
from ownpath.oracle.experts import route

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from layer.shards import layer_fields, write_layers

Kept = dict[str, torch.Tensor]
LAYER = 1  # CSA: window, compressor, indexer
FEW, MANY = 3, 21
VALUES = tuple(name for name in ORDER if name != "attn.wo_b.sum")  # of one rank
STEPS = (
    Planned("prefill", FEW, {"a": (0, (5, 6, 7))}, True),
    Planned("prefill", MANY, {"b": (0, tuple(range(40, 40 + MANY)))}, True),
    Planned("decode", 2, {"b": (MANY, (900,)), "a": (FEW, (901,))}, True),
)
ROWS_OF = {"a": [0, 1, 2, FEW + MANY + 1], "b": [*range(FEW, FEW + MANY), FEW + MANY]}
INPUTS = {
    "hc_attn.h": ("attn.in", "attn.wqa_wkv.in", "attn.indexer.weights_proj.in"),
    "attn.q_norm": ("attn.wq_b.in", "attn.indexer.wq_b.in"),
    "attn.core": ("attn.o",),
    "attn.wo_a": ("attn.wo_b.in",),
    "attn.wo_b": ("attn.out",),
    "hc_ffn.h": ("ffn.in", "ffn.gate.in", "ffn.experts.in", "ffn.shared_experts.w13.in"),
    "ffn.shared_experts.swiglu": ("ffn.shared_experts.w2.in",),
    "ffn.sum": ("ffn.out",),
    "out": ("leave.x",),
}
"""A module's output -> the inputs that are the same tensor in vLLM."""
FLOAT32 = ("ffn.gate", "ffn.router.weights", "attn.compressor.wkv_wgate", "attn.indexer.compressor.wkv_wgate")


@cache
def proof() -> Proof:
    return Proof.of(default_model_dir(), torch.bfloat16, CacheFormat.FP8)


@cache
def right_values() -> Kept:
    """The values that a right engine of BF16 holds of all steps' rows: each module's output from the ones before."""
    positions = torch.tensor([*range(FEW), *range(MANY), MANY, FEW])
    ids = torch.tensor([5, 6, 7, *range(40, 40 + MANY), 900, 901])
    streams = torch.randn(len(ids), 4, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    complete = (positions + 1) // 4
    entries = torch.arange(8).expand(len(ids), 8)
    v = {
        "enter.x": streams,
        "positions": positions,
        "token_ids": ids,
        "attn.entry_ids": torch.where(entries < complete[:, None], entries, -1),
    }
    return propagated(v, VALUES)


def steps_of(values: Mapping[str, torch.Tensor], folder: Path) -> list[StepRun]:
    """Writes the values as taps would, a file for each step."""
    keys = {name: key for key, name in _OF_LAYER.items()}
    steps, first = [], 0
    for number, planned in enumerate(STEPS):
        rows = slice(first, first + planned.num_rows)
        first = rows.stop
        path = folder / f"{number}.safetensors"
        kept = {
            f"model.layers.{LAYER}.{keys[name]}": value[rows].contiguous()
            for name, value in values.items()
            if name in keys
        }
        write_shard(path, kept, {})
        steps.append(StepRun(planned, "eager", {str(LAYER): path}, {}, (), True))
    return steps


def named(values: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """Returns the failing places with their messages."""
    steps = steps_of(values, folder)
    compared = compare_layer(proof(), LAYER, [RankSteps(steps, {"attn.wq_b": "SomeMethod"})])
    found = [*judge_values("layers.1", compared)]
    found += judge_choices("layers.1", [(step, count_wrong_choices(proof(), LAYER, step)) for step in steps])
    return {finding.where: finding.message for finding in found if finding.verdict is Verdict.FAIL}


def test_a_right_engine_is_within_its_budgets(tmp_path: Path) -> None:
    compared = compare_layer(proof(), LAYER, [RankSteps(steps_of(right_values(), tmp_path), {})])
    assert {one.measured.slot for one in compared} == set(VALUES)
    assert len(compared) == len(STEPS) * len(VALUES)
    # The engine is the reference rounded, and a budget is four times what that does.
    assert max(one.measured.excess for one in compared) <= 0.5
    assert not named(right_values(), tmp_path)


def few(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Applies a change to the step of few rows alone."""
    return lambda value: torch.cat((change(value[:FEW]), value[FEW:]))


def everywhere(value: torch.Tensor) -> torch.Tensor:
    return value * 1.05


def exchange(value: torch.Tensor) -> torch.Tensor:
    return value.roll(1, dims=-1)


@pytest.mark.parametrize("module", ["attn.core", "hc_ffn.h", "ffn.experts", "out"])
def test_a_module_that_is_wrong_for_few_rows_is_named_with_them(module: str, tmp_path: Path) -> None:
    changed = few(exchange)(right_values()[module])
    same = dict.fromkeys((module, *INPUTS.get(module, ())), changed)
    found = named(propagated(right_values() | same, behind(module)), tmp_path)
    assert list(found) == [f"layers.1.{module}"]
    assert (
        "off in prefill of 3 rows (eager); right in prefill of 21 rows, decode of 2 rows (eager)"
        in found[f"layers.1.{module}"]
    )


def behind(module: str) -> tuple[str, ...]:
    return VALUES[VALUES.index(module) + 1 :]


def propagated(values: Kept, modules: Sequence[str]) -> Kept:
    """Computes modules from what those before them gave, as an engine does."""
    layer, run = proof().layers[LAYER], proof().run(is_narrow=True)
    segments = [SequencePart(torch.tensor(rows), torch.tensor(rows)) for rows in ROWS_OF.values()]
    stale = {name for module in modules for name in (module, *INPUTS.get(module, ()))} | {"ffn.router.ids"}
    v = {name: value for name, value in values.items() if name not in stale or "ffn.router.weights" not in modules}
    v = {name: value for name, value in v.items() if name not in stale - {"ffn.router.ids"}}
    while set(modules) - v.keys():
        made = reference_values(layer, run, v, segments)
        for name in [name for name in modules if name in made and name not in v]:
            v[name] = made[name] if name in FLOAT32 else made[name].bfloat16()
            v |= dict.fromkeys(INPUTS.get(name, ()), v[name])
            if name == "ffn.router.weights":
                v["ffn.router.ids"] = run.values[f"{layer.name}.ffn.router.ids"]
    return v


def test_a_wrong_weight_is_named_in_every_step_with_what_ran(tmp_path: Path) -> None:
    values = propagated(right_values() | {"attn.wq_b": everywhere(right_values()["attn.wq_b"])}, behind("attn.wq_b"))
    steps = steps_of(values, tmp_path)
    (failure,) = judge_values(
        "layers.1", compare_layer(proof(), LAYER, [RankSteps(steps, {"attn.wq_b": "SomeMethod"})])
    )
    assert (failure.where, failure.kernel) == ("layers.1.attn.wq_b", "SomeMethod")
    assert "right in no step; worst: relative error 5" in failure.message


def test_nan_is_blamed_on_the_module_that_made_it(tmp_path: Path) -> None:
    """A module that gets NaN gives NaN: that is no other module's fault."""
    broken = right_values()["attn.wo_b"].clone()
    broken[1, 3] = torch.nan
    found = named(propagated(right_values() | {"attn.wo_b": broken, "attn.out": broken}, behind("attn.wo_b")), tmp_path)
    assert list(found) == ["layers.1.attn.wo_b"]
    assert "0.1% not finite" in found["layers.1.attn.wo_b"]


def test_a_row_with_other_experts_is_a_wrong_choice_and_no_wrong_product(tmp_path: Path) -> None:
    ids = right_values()["ffn.router.ids"].clone()
    ids[0] = torch.tensor([left for left in range(8) if left not in ids[0].tolist()][:2])
    run = proof().run(is_narrow=True)
    weights = route(run, proof().layers[LAYER], right_values()["ffn.gate"], right_values()["token_ids"], ids)[1]
    changed = right_values() | {"ffn.router.ids": ids, "ffn.router.weights": weights}
    found = named(propagated(changed, ("ffn.experts", "ffn.sum", "out")), tmp_path)
    assert list(found) == ["layers.1.ffn.router"]
    assert found["layers.1.ffn.router"] == "1 row with other experts: prefill of 3 rows (eager)"


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer whose dense weights are FP8 in blocks."""
    folder = tmp_path_factory.mktemp("fp8") / "layers"
    write_layers(folder, layer_fields("small", [0], 1))
    return folder


def fp8_step(
    model: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor], rounding: bool | None
) -> list[StepRun]:
    """Writes one step in which wq_b multiplies an input that is rounded: ``None``: not at all; else by powers of two or
    not. The products are float64's of values that this test decodes by torch's own types."""
    stored = load_file(next(model.glob("*.safetensors")))
    codes, scale = (stored[f"layers.0.attn.wq_b.{part}"] for part in ("weight", "scale"))
    blocks = torch.exp2(scale.view(torch.uint8).double() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = codes.double() * blocks[: codes.shape[0], : codes.shape[1]]
    x = torch.randn(MANY, codes.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    used = x.double()
    if rounding is not None:
        unit = x.float().unflatten(-1, (-1, 128)).abs().amax(-1, keepdim=True) / 448
        unit = torch.exp2(unit.log2().ceil()) if rounding else unit
        used = ((x.float().unflatten(-1, (-1, 128)) / unit).to(torch.float8_e4m3fn).double() * unit).flatten(-2)
    prefix = "model.layers.0"
    kept = {f"{prefix}.attn.wq_b.forward:in": x, f"{prefix}.attn.wq_b.forward:out": change(used @ weight.T).bfloat16()}
    kept[f"{prefix}.forward:positions"] = torch.arange(MANY)
    kept[f"{prefix}.forward:input_ids"] = torch.arange(MANY)
    path = folder / "0.safetensors"
    write_shard(path, kept, {})
    planned = Planned("prefill", MANY, {"a": (0, tuple(range(MANY)))}, True)
    return [StepRun(planned, "eager", {"0": path}, {}, (), True)]


@pytest.mark.parametrize(
    ("rounding", "label"), [(None, ""), (False, "E4M3 inputs"), (True, "E4M3 inputs, powers of two")]
)
def test_an_fp8_product_may_round_its_input_and_the_report_says_how(
    rounding: bool | None, label: str, fp8_folder: Path, tmp_path: Path
) -> None:
    fp8 = Proof.of(fp8_folder, torch.bfloat16, CacheFormat.FP8)
    compared = compare_layer(fp8, 0, [RankSteps(fp8_step(fp8_folder, tmp_path, lambda y: y, rounding), {})])
    (product,) = [one.measured for one in compared if one.measured.slot == "attn.wq_b"]
    assert product.is_within
    assert product.kernel == label
    assert product.budget < 0.01  # BF16's, not E4M3's


@pytest.mark.parametrize("rounding", [None, False, True])
def test_a_factor_is_near_none_of_the_three(rounding: bool | None, fp8_folder: Path, tmp_path: Path) -> None:
    fp8 = Proof.of(fp8_folder, torch.bfloat16, CacheFormat.FP8)
    compared = compare_layer(fp8, 0, [RankSteps(fp8_step(fp8_folder, tmp_path, everywhere, rounding), {})])
    (product,) = [one.measured for one in compared if one.measured.slot == "attn.wq_b"]
    assert not product.is_within
