"""A wrong scale is noticed wherever it stands, whatever the format; sound models raise no alarm."""

import math
import random
from pathlib import Path

import pytest
import torch
from cpu.server.model_folder import VOCAB
from support.broken import Tensors, change_tensors
from support.checkpoints import LAYOUTS, random_checkpoint, read_checkpoint

from ownpath.checkpoint.drafts import carried_draft
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.cli import main
from ownpath.config import ModelConfig
from ownpath.finding import failed
from ownpath.inspect.inspection import inspect_folder
from ownpath.inspect.magnitudes import EXPERT_ROWS, ROWS, Magnitude, read_magnitudes
from ownpath.inspect.peers import compare_magnitudes
from ownpath.inspect.scalars import read_scalars
from ownpath.plan.census import take_census

EPS = 1e-6


def magnitudes_of(folder: Path) -> dict[str, Magnitude]:
    index, config = CheckpointIndex.open(folder), ModelConfig.from_file(folder / "config.json")
    census = take_census(config, index, carried_draft(index))
    scalars = read_scalars(census.modules, index, frozenset(), [])
    found = read_magnitudes(census.modules, census.params, scalars, index, frozenset(), [])
    return {magnitude.name: magnitude for magnitude in found}


def spread(num_rows: int, wanted: int) -> list[int]:
    """Middles of ``wanted`` equal parts."""
    return (
        [int((part + 0.5) * num_rows / wanted) for part in range(wanted)] if num_rows > wanted else [*range(num_rows)]
    )


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_sample_is_decoded_with_all_its_scales(layout: str, tmp_path: Path) -> None:
    """RMS and largest of the same rows of the values that the stored tensors mean."""
    made = random_checkpoint(tmp_path, layout, 4)
    found = magnitudes_of(tmp_path)
    floats = {name: value for name, value in made.decoded.items() if value.is_floating_point()}
    assert set(found) == set(floats)
    for name, value in floats.items():
        rows = value.double().reshape(1, -1) if value.ndim == 1 else value.double()
        chosen = rows[spread(len(rows), EXPERT_ROWS if ".experts." in name and "shared" not in name else ROWS)]
        assert found[name].num_values == chosen.numel()
        assert found[name].rms == pytest.approx(float(chosen.square().mean().sqrt()), rel=1e-5)
        assert found[name].largest == pytest.approx(float(chosen.abs().max()), rel=1e-6)


def odd(folder: Path) -> set[str]:
    return {problem.where for problem in failed(inspect_folder(folder).problems) if problem.id == "weight-magnitude"}


def of_tiny(name: str, factor: float) -> set[str]:
    """Names what is odd in the embedded model, if the values of one weight were ``factor`` times what they are."""
    found = TINY | {name: scaled(TINY[name], factor)}
    return {problem.where for problem in compare_magnitudes(found.values(), EPS).problems}


def scaled(found: Magnitude, factor: float) -> Magnitude:
    return Magnitude(found.name, found.width, found.rms * factor, found.largest * factor, found.num_values)


def _tiny() -> dict[str, Magnitude]:
    from ownpath.loading import default_model_dir

    return magnitudes_of(default_model_dir())


TINY = _tiny()
MATRICES = [name for name, found in TINY.items() if found.width > 1]


def test_the_embedded_model_is_sound() -> None:
    comparison = compare_magnitudes(TINY.values(), EPS)
    assert comparison.problems == ()
    assert 1 < comparison.farthest < 3


@pytest.mark.parametrize("factor", [30, 0.001])
def test_each_matrix_of_the_embedded_model_is_named_alone(factor: float) -> None:
    """All 147: every projection of every layer, every expert, compressors and indexers, and the head."""
    assert len(MATRICES) == 147
    assert {name for name in MATRICES if of_tiny(name, factor) != {name}} == set()


@pytest.mark.parametrize("factor", [8, 1 / 8])
def test_a_factor_of_eight_is_seen_in_most(factor: float) -> None:
    unseen = {name for name in MATRICES if of_tiny(name, factor) != {name}}
    assert len(unseen) <= 13, "the farther a weight is from its peers' median, the larger the factor on that side"


@pytest.mark.parametrize("factor", [1000, 0.001])
def test_norms_and_the_embedding(factor: float) -> None:
    names = [name for name in TINY if name.endswith("norm.weight")] + ["embed.weight"]
    assert {name for name in names if of_tiny(name, factor) != {name}} == set()


@pytest.mark.parametrize("kind", ["attn.wo_b", "attn.wq_a", "ffn.shared_experts.w2", "ffn.gate"])
def test_all_layers_of_a_kind(kind: str) -> None:
    names = [name for name in TINY if name.endswith(kind)]
    found = TINY | {name: scaled(TINY[name], 1000) for name in names}
    assert {p.where for p in compare_magnitudes(found.values(), EPS).problems} == {f"layers.*.{kind}"}


def test_a_layer_of_experts_is_one_finding_and_names_the_layer() -> None:
    found = {name: scaled(it, 30 if name.startswith("layers.2.ffn.experts.") else 1) for name, it in TINY.items()}
    places = {problem.where for problem in compare_magnitudes(found.values(), EPS).problems}
    assert places == {f"layers.2.ffn.experts.{projection}" for projection in ("w1", "w2", "w3")}


def test_two_layers_are_a_pair_and_one_is_held_against_other_kinds(tmp_path: Path) -> None:
    for ratios, factor in (([0, 4], 30.0), ([4], 1000.0)):
        folder = tmp_path / str(len(ratios))
        random_checkpoint(folder, "full-nvfp4", 2, num_hidden_layers=len(ratios), compress_ratios=ratios)
        name = f"layers.{len(ratios) - 1}.attn.wo_b"
        assert odd(folder) == set()
        change_tensors(folder, times(f"{name}.weight_scale_2", factor))
        assert odd(folder) == {name}


def times(key: str, factor: float):  # type: ignore[no-untyped-def]
    def change(tensors: Tensors) -> None:
        tensors[key] = (tensors[key].float() * factor).to(tensors[key].dtype)

    return change


@pytest.mark.parametrize(
    ("layout", "key", "factor", "where"),
    [
        ("compressed-tensors", "layers.2.ffn.experts.5.w1.weight_global_scale", 1 / 30, "layers.2.ffn.experts.5.w1"),
        ("compressed-tensors", "layers.3.attn.wq_b.weight_scale", 32, "layers.3.attn.wq_b"),
        ("fp8-experts", "layers.1.ffn.experts.2.w3.scale", 1 / 30, "layers.1.ffn.experts.2.w3"),
        ("bf16", "layers.4.attn.wo_a.weight", 30, "layers.4.attn.wo_a"),
        ("bf16", "head.weight", 1000, "head"),
        (
            "modelopt-experts-only",
            "layers.1.attn.indexer.weights_proj.weight",
            30,
            "layers.1.attn.indexer.weights_proj",
        ),
    ],
)
def test_every_format(layout: str, key: str, factor: float, where: str, folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    random_checkpoint(folder, layout, 1, vocab_size=VOCAB)
    change_tensors(folder, times(key, factor))
    assert odd(folder) == {where}
    assert main(["inspect", str(folder)]) == 1


def test_the_draft_is_compared_with_itself(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    made = random_checkpoint(folder, "full-nvfp4", 1, draft="full-nvfp4", vocab_size=VOCAB)
    assert made.config.num_nextn_predict_layers == 1
    change_tensors(folder, times("mtp.0.ffn.experts.3.w2.weight_scale_2", 30))
    assert odd(folder) == set()
    problems = inspect_folder(folder, with_draft=True).problems
    assert {problem.where for problem in failed(problems)} == {"mtp.0.ffn.experts.3.w2"}


def test_values_that_are_no_numbers_are_odd(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["layers.1.ffn.gate.weight"][:] = math.nan

    change_tensors(folder, change)
    assert odd(folder) == {"layers.1.ffn.gate"}


@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.4, 0.5])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 43])
def test_models_whose_layers_differ_raise_no_alarm(num_layers: int, deviation: float) -> None:
    """Log-normal from layer to layer, with a trend over depth and kinds of different gains."""
    draw = random.Random(num_layers)
    for _ in range(20 if num_layers < 43 else 3):
        gains = {kind: math.exp(draw.gauss(0, 0.4)) for kind in ("attn.wq_a", "attn.wo_b", "ffn.gate", "w1", "w2")}
        found = [Magnitude("head", 4096, 1 / 64, 5 / 64, 1)]
        for idx in range(num_layers):
            trend = math.exp(1.5 * (idx / 42 - 0.5))
            for kind, gain in gains.items():
                names = [f"ffn.experts.{e}.{kind}" for e in range(8)] if kind in ("w1", "w2") else [kind]
                for name in names:
                    rms = gain * trend * math.exp(draw.gauss(0, deviation)) / 64
                    largest = rms * 4 * math.exp(abs(draw.gauss(0, 0.4)))
                    found.append(Magnitude(f"layers.{idx}.{name}", 4096, rms, largest, 1))
        assert compare_magnitudes(found, EPS).problems == ()


def test_expert_matrices_of_zeros_are_sound(folder: Path) -> None:
    """A quantiser gives them scales of 1."""

    def change(tensors: Tensors) -> None:
        tensors["layers.1.ffn.experts.3.w2.weight"].zero_()
        tensors["layers.1.ffn.experts.3.w2.weight_scale"] = torch.ones_like(
            tensors["layers.1.ffn.experts.3.w2.weight_scale"].float()
        ).to(torch.float8_e4m3fn)
        tensors["layers.1.ffn.experts.3.w2.weight_scale_2"] = torch.ones(())

    change_tensors(folder, change)
    assert odd(folder) == set()


def test_the_tiny_models_values_are_its_own() -> None:
    """The sample's RMS is near that of the whole matrix, of which it is a part."""
    from ownpath.loading import default_model_dir

    decoded = read_checkpoint(default_model_dir()).decoded
    whole = {name: float(decoded[name].double().square().mean().sqrt()) for name in MATRICES}
    assert max(abs(math.log(TINY[name].rms / rms)) for name, rms in whole.items()) < math.log(1.5)
