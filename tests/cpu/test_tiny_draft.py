"""The training of the embedded model's draft: the module's formula, its learning, and what is written of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Checkpoint, read_checkpoint
from support.mtp_reference import MtpReference
from tiny import draft, draft_export, draft_train, streams
from tiny.batches import ANSWER, Rows
from tiny.network import FIELDS

from ownpath.checkpoint.names import draft_params
from ownpath.config import ModelConfig
from ownpath.inspect.inspection import inspect_folder
from ownpath.loading import default_model_dir, plan_model
from ownpath.plan.opspec import draft_ops

FOLDER = default_model_dir()


@pytest.fixture(scope="module")
def weights() -> draft.Weights:
    return draft.first_weights(streams.decoded_weights(FOLDER), seed=1)


def calibration() -> draft_export.DraftCalibration:
    """The largest inputs of two tokens that use three experts."""
    found = draft_export.DraftCalibration()
    for name in draft.STORED:
        if not name.startswith("ffn.experts."):
            found.see(name.removesuffix(".weight"), torch.tensor([1.0, -2.0]))
    weight_TE = torch.zeros(2, 8)
    weight_TE[0, 3], weight_TE[0, 5], weight_TE[1, 6] = 0.5, 1.0, 1.5
    found.see("ffn.experts", torch.tensor([[3.0], [-4.0]]), torch.full((8, 2, 1), 5.0), weight_TE)
    return found


def as_checkpoint(weights: draft.Weights) -> Checkpoint:
    """The module's weights under their names in a checkpoint, with the backbone's embedding and head."""
    backbone = streams.decoded_weights(FOLDER)
    decoded = {"embed.weight": backbone["embed.weight"], "head": backbone["head.weight"]}
    for name, value in weights.items():
        if name == draft.EXPERTS_W13:
            for expert, pair in enumerate(value):
                decoded |= dict(
                    zip((f"mtp.0.ffn.experts.{expert}.{w}" for w in ("w1", "w3")), pair.chunk(2), strict=True)
                )
        elif name == draft.EXPERTS_W2:
            decoded |= {f"mtp.0.ffn.experts.{expert}.w2": one for expert, one in enumerate(value)}
        else:
            is_matrix = value.dim() == 2 and name.endswith(".weight")
            decoded[f"mtp.0.{name.removesuffix('.weight') if is_matrix else name}"] = value
    return Checkpoint(FOLDER, ModelConfig.from_file(FOLDER / "config.json"), dict(FIELDS), decoded)


def test_what_is_trained_is_an_mtp_module(weights: draft.Weights) -> None:
    """In float64, past the window's end. Its rotation is of float32, as trained: 2^-24 of what it turns."""
    doubled = {name: value.double() for name, value in weights.items()}
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(150, 4, 256, generator=generator).double()
    ids = torch.randint(0, FIELDS["vocab_size"], (150,), generator=generator)
    checkpoint = as_checkpoint(doubled)
    embedded = checkpoint.decoded["embed.weight"][ids].double()
    places = draft.Places.of(150, torch.device("cpu"))
    found = draft.draft_hidden(doubled, given[None], embedded[None], places, draft.unseen)[0]
    _, expected = MtpReference(checkpoint).draft(given, ids)
    logits = found @ checkpoint.decoded["head"].double().T
    assert (logits - expected).abs().max() <= 8 * 2**-24 * expected.abs().max()


def test_it_learns_what_the_backbone_says(weights: draft.Weights) -> None:
    """A few rows by heart: the loss falls, through the stored formats too; a step that is over leaves no gradient."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, FIELDS["vocab_size"], (4, 8), generator=generator).short()
    rows = Rows(ids, torch.full((4, 8), ANSWER, dtype=torch.uint8))
    data = streams.Streams(rows, torch.randn(4, 8, 4, 256, generator=generator).bfloat16(),
                           6 * torch.randn(4, 8, 256, generator=generator).bfloat16())  # fmt: skip
    backbone = streams.decoded_weights(FOLDER)
    shared = backbone["embed.weight"], backbone["head.weight"]
    recipe = draft_train.DraftRecipe(num_steps=20, num_warmup_steps=2, row_share=0.02, quantised_from=0.5)
    trainer = draft_train.DraftTrainer(weights, shared, {"short": data}, recipe)
    saved: list[int] = []
    trainer.run(lambda line: None, lambda: saved.append(len(trainer.curve)), log_every=5)
    assert [point["step"] for point in trainer.curve] == [5, 10, 15, 20]
    assert trainer.curve[-1]["short_loss"] < 0.5 * trainer.curve[0]["short_loss"]
    assert trainer.curve[-1]["short_agreed"] > 0.5
    assert saved == [1, 2, 3, 4, 4]
    assert not any(trainer.used[name].grad.abs().max() for name in trainer.trained)
    assert not torch.equal(trainer.masters["ffn.gate.bias"], weights["ffn.gate.bias"])
    trained = draft_train.trained_weights(trainer)
    assert trained["e_proj.weight"].dtype == torch.bfloat16
    assert trained["hc_attn_fn"].dtype == trained["ffn.gate.bias"].dtype == torch.float32


def test_the_shard_is_what_a_reader_of_config_json_expects(weights: draft.Weights, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    tensors = dict(draft_export.draft_tensors(weights, calibration()))
    for _ in range(2):  # in the place of the one before
        draft_export.add_draft(folder, tensors)
    assert {path.name: path.read_bytes() for path in folder.glob("model-*.safetensors")} == before
    config = ModelConfig.from_file(folder / "config.json")
    modules = [module.name for op in draft_ops(config) for module in op.modules]
    stems = {key.removesuffix(".weight") for key in tensors}
    assert set(modules) <= stems
    assert {param.key for param in draft_params(config)} <= tensors.keys()
    assert not inspect_folder(folder, with_draft=True).problems
    assert not plan_model(folder, "cpu", loads_draft=True).contradictions
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (fields["num_nextn_predict_layers"], fields["compress_ratios"]) == (1, [0, 4, 128, 4, 0])
    values, decoded = draft.stored_values(weights), read_checkpoint(folder).decoded
    expected = as_checkpoint(values).decoded
    for name in (key for key in expected if key.startswith("mtp.")):
        assert torch.equal(decoded[name].float(), expected[name].float()), name
    scales = {name: tensors[f"mtp.0.ffn.experts.{name}.input_scale"].item() * 2688 for name in ("3.w1", "5.w2", "6.w3")}
    assert scales == pytest.approx({"3.w1": 3.0, "5.w2": 5.0, "6.w3": 4.0})
    assert tensors["mtp.0.ffn.experts.0.w1.input_scale"].item() * 2688 == pytest.approx(4.0)  # used by nobody: the most
