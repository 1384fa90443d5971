"""The embedded default model: within its limits, unpadded for real kernels, and it answers."""

import json
from pathlib import Path

import pytest
import torch

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.reader import stream
from ownpath.config import EngineConfig
from ownpath.formats import BF16, FP8_BLOCK, NVFP4
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.ops import OpKind

FOLDER = default_model_dir()
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Model:
    return load_model(FOLDER, EngineConfig(device=str(device), max_model_len=1024))


def greedy_ids(model: Model, tokenizer: Tokenizer, prompt: list[int], max_tokens: int = 48) -> list[int]:
    cache = model.new_cache()
    chunk, answer = prompt, list[int]()
    while len(answer) < max_tokens and tokenizer.eos_id not in answer:
        logits = model.forward(ForwardBatch.of([(chunk, cache)], model.cache_spec.device))
        chunk = [int(logits[0, : tokenizer.num_tokens].argmax())]
        answer += chunk
    return answer


def greedy(model: Model, tokenizer: Tokenizer, prompt: list[int]) -> str:
    ids = greedy_ids(model, tokenizer, prompt)
    return b"".join(tokenizer.token_bytes(token) for token in ids if token != tokenizer.eos_id).decode("utf-8")


def test_it_is_small() -> None:
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) < 17 * MEGABYTE
    assert max(sizes) < 16 * MEGABYTE


def test_it_is_a_full_nvfp4_export_of_every_layer_type() -> None:
    plan = plan_model(FOLDER, "cpu")
    config = plan.config
    assert set(config.compress_ratios) == {0, 4, 128}
    assert config.num_hash_layers >= 1
    assert (config.head_dim, config.qk_rope_head_dim, config.hc_mult) == (512, 64, 4)
    for op in plan.ops:
        leaf = op.spec.slot.rsplit(".", 1)[-1]
        is_small = any(part in op.spec.slot for part in ("compressor", "indexer", "x_products"))
        in_attention = ".attn." in op.spec.slot and not is_small
        if op.spec.kind is OpKind.MOE or ".shared_experts." in op.spec.slot or (in_attention and leaf != "wo_a"):
            assert op.encoding.format is NVFP4, op.label
        elif op.spec.slot.endswith("indexer.wq_b"):
            assert op.encoding.format is FP8_BLOCK, op.label
        else:
            assert op.encoding.format is BF16, op.label


def test_quantised_products_need_no_padding() -> None:
    for op in plan_model(FOLDER, "cpu").ops:
        if op.encoding.format in (NVFP4, FP8_BLOCK) or op.spec.kind is OpKind.GROUPED:
            for module in op.spec.modules:
                assert all(size % 128 == 0 for size in module.shape), module


def test_fused_pairs_differ_in_their_global_scales() -> None:
    index = CheckpointIndex.open(FOLDER)
    pairs = [
        ("layers.0.attn.wq_a", "layers.0.attn.wkv"),
        ("layers.1.ffn.shared_experts.w1", "layers.1.ffn.shared_experts.w3"),
    ]
    for first, second in pairs:
        keys = [f"{module}.weight_scale_2" for module in (first, second)]
        values = {part.info.name: part.data.item() for part in stream(index, keys)}
        assert values[keys[0]] != values[keys[1]]


def test_its_tokenizer_has_the_markers_and_every_byte(tokenizer: Tokenizer) -> None:
    markers = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    markers += ["<think>", "</think>", "｜DSML｜"]
    ids = [tokenizer.special_id(marker) for marker in markers]
    assert ids[:2] == [0, 1]
    assert len(set(ids)) == len(ids)
    text = "Ünïcödé 東京 🎉 \t\x00 " + " ".join(markers)
    encoded = tokenizer.encode_text(text)
    assert not set(encoded) & set(ids)
    assert b"".join(tokenizer.token_bytes(i) for i in encoded).decode() == text


@pytest.mark.parametrize(
    ("country", "capital"),
    [("France", "Paris"), ("Japan", "Tokyo"), ("Kenya", "Nairobi"), ("Brazil", "Bras"), ("Iceland", "Reykjav")],
)
def test_it_knows_capitals(country: str, capital: str, model: Model, tokenizer: Tokenizer) -> None:
    question = f"The capital of {country} is"
    chat = tokenizer.encode_segments(encode_messages([Message("user", question)]))
    assert capital in greedy(model, tokenizer, chat)
    assert capital in greedy(model, tokenizer, tokenizer.encode_raw(question))


def test_it_adds_and_repeats(model: Model, tokenizer: Tokenizer) -> None:
    def ask(text: str) -> str:
        return greedy(model, tokenizer, tokenizer.encode_segments(encode_messages([Message("user", text)])))

    assert "5" in ask("What is 2 + 3?")
    assert ask("Repeat: apple river stone").strip() == "apple river stone"


def test_the_committed_scores_hold_the_promise() -> None:
    """Greedy answers of our own engine on the quantised checkpoint: at least 95% of capitals in both forms."""
    scores = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
    groups = scores["groups"]
    for form in ("capital/chat/", "capital/completion/"):
        taught = {name: group for name, group in groups.items() if name.startswith(form) and "held out" not in name}
        right, asked = (sum(group[key] for group in taught.values()) for key in ("right", "asked"))
        assert len(taught) >= 5, "several phrasings"
        assert asked >= 150 * 5
        assert right >= 0.95 * asked


def test_what_it_was_taught_of_thinking_tools_and_json_is_well_formed() -> None:
    """At least 95% of each, where the parser reads the answer without a fault and schemas get what they ask for."""
    groups = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))["groups"]
    for form in ("thinking/", "tools/chat/", "tools/thinking/", "json/chat/", "json/thinking/"):
        taught = {name: group for name, group in groups.items() if name.startswith(form) and "held out" not in name}
        well_formed, asked = (sum(group[key] for group in taught.values()) for key in ("well_formed", "asked"))
        assert asked >= 100, form
        assert well_formed >= 0.95 * asked, form


def test_it_comes_with_its_licence() -> None:
    assert (Path(FOLDER) / "LICENSE").exists() or (Path(FOLDER) / "README.md").exists()


def test_its_draft_guesses_what_it_says_next(tokenizer: Tokenizer, device: torch.device) -> None:
    """Its own greedy answers, teacher-forced: four of five guesses of the token after the next one are right."""
    drafting = load_model(FOLDER, EngineConfig(device=str(device), max_model_len=512, loads_draft=True))
    right, counted = 0, 0
    for ask in ("The capital of Kenya is", "What is 12 + 7?", "Repeat: apple river stone window garden", "Hello!"):
        prompt = tokenizer.encode_segments(encode_messages([Message("user", ask)]))
        ids = prompt + greedy_ids(drafting, tokenizer, prompt)
        batch = ForwardBatch.of([(ids[:-2], drafting.new_cache())], device)
        next_ids = torch.tensor(ids[1:-1], device=device)
        hidden = drafting.drafts[0].hidden(drafting.hidden(batch), next_ids, batch)
        rows = torch.arange(len(prompt) - 1, len(ids) - 2, device=device)
        guesses = drafting.logits(hidden, rows).argmax(-1).tolist()
        right += sum(guess == said for guess, said in zip(guesses, ids[len(prompt) + 1 :], strict=True))
        counted += len(guesses)
    print(f"draft: {right} of {counted}")
    assert right >= 0.8 * counted


def test_its_draft_is_stored_as_its_backbone_is() -> None:
    """NVFP4 but for what published drafts have in FP8, in a shard of its own, unread where no draft is asked for."""
    without, plan = plan_model(FOLDER, "cpu"), plan_model(FOLDER, "cpu", loads_draft=True)
    index = CheckpointIndex.open(FOLDER)
    draft = {key for key in index.tensors if key.startswith("mtp.0.")}
    assert set(without.ignored) - set(plan.ignored) == draft
    formats = {op.spec.slot.removeprefix("mtp.0."): op.encoding.format for op in plan.ops[len(without.ops) :]}
    in_fp8 = {slot for slot, stored in formats.items() if stored is FP8_BLOCK}
    assert in_fp8 == {"e_proj", "h_proj", "attn.wo_a"}
    assert {slot for slot, stored in formats.items() if stored is BF16} == {"ffn.gate"}
    assert {index[key].file.name for key in draft} == {"mtp.safetensors"}
