"""A warm start of the embedded model: a tokenizer with more merges, and the weights of a run with fewer tokens."""

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from tiny import corpus, network, start, tokens, train  # noqa: E402
from tiny.batches import Encoder  # noqa: E402

NUM_EARLIER, NUM_TOKENS = 400, 440
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = "model.layers.0.mlp.gate.tid2eid"


def texts(make: str, num_documents: int) -> list[str]:
    rng = random.Random(21)
    documents = [getattr(corpus, f"{make}_document")(rng) for _ in range(num_documents)]
    return [piece.text for document in documents for piece in document if not piece.special]


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer and its extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "VOCAB_SIZE", NUM_EARLIER)
        earlier = tokens.train_tokenizer(texts("short", 400))
        patch.setattr(tokens, "VOCAB_SIZE", NUM_TOKENS)
        return earlier, tokens.extend_tokenizer(earlier, texts("tools", 20))


def test_an_extended_tokenizer_keeps_its_tokens_and_joins_more(pair: tuple[Tokenizer, Tokenizer]) -> None:
    earlier, extended = pair
    assert extended.get_vocab_size() == NUM_TOKENS
    kept = extended.get_vocab(with_added_tokens=True)
    assert all(kept[token] == token_id for token, token_id in earlier.get_vocab(with_added_tokens=True).items())
    added = {token: token_id for token, token_id in kept.items() if token_id >= NUM_EARLIER}
    assert sorted(added.values()) == list(range(NUM_EARLIER, NUM_TOKENS))
    before, after = Encoder(earlier), Encoder(extended)
    for text in texts("tools", 5):
        ids = after.text_ids(text)
        assert tokens.plain_tokenizer(extended).decode(ids) == text
        assert len(ids) <= len(before.text_ids(text))
    assert max(map(max, map(after.text_ids, texts("tools", 5)))) >= NUM_EARLIER


def test_a_text_is_cut_as_before_and_then_joined(pair: tuple[Tokenizer, Tokenizer]) -> None:
    earlier, extended = pair
    spelled = start.spellings(earlier, extended)
    for text in texts("tools", 5):
        cut = [piece for token in Encoder(extended).text_ids(text) for piece in spelled[token]]
        assert cut == Encoder(earlier).text_ids(text)


def test_an_extension_needs_enough_text(pair: tuple[Tokenizer, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=f"{tokens.VOCAB_SIZE} are wanted"):
        tokens.extend_tokenizer(pair[0], ["abc"])


def rows_by_token(num_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        EMBEDDING: torch.randn(num_tokens, 8, generator=generator).bfloat16(),
        HEAD: torch.randn(num_tokens, 8, generator=generator).bfloat16(),
        EXPERTS: network.token_experts(num_tokens, 8, 2, seed=6),
        "another": torch.ones(3),
    }


def test_known_tokens_keep_their_rows_and_new_ones_take_the_mean(pair: tuple[Tokenizer, Tokenizer]) -> None:
    earlier, extended = pair
    trained = rows_by_token(NUM_EARLIER)
    found = start.carry_over(trained, earlier, extended)
    spelled = start.spellings(earlier, extended)
    assert found["another"] is trained["another"]
    for name in (EMBEDDING, HEAD):
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name][:NUM_EARLIER], trained[name])
        for token in range(NUM_EARLIER, NUM_TOKENS):
            assert len(spelled[token]) > 1
            assert torch.equal(found[name][token], trained[name][spelled[token]].float().mean(dim=0).bfloat16())
    assert torch.equal(found[EXPERTS][:NUM_EARLIER], trained[EXPERTS])
    lasts = [ids[-1] for ids in spelled[NUM_EARLIER:]]
    assert torch.equal(found[EXPERTS][NUM_EARLIER:], trained[EXPERTS][lasts])


def test_tokens_are_found_by_their_text_whatever_their_order(pair: tuple[Tokenizer, Tokenizer]) -> None:
    earlier, extended = pair
    shared = rows_by_token(NUM_TOKENS)
    found = start.carry_over(shared, extended, earlier)
    for token, token_id in earlier.get_vocab(with_added_tokens=True).items():
        before = extended.get_vocab(with_added_tokens=True)[token]
        assert torch.equal(found[EMBEDDING][token_id], shared[EMBEDDING][before])


def test_a_start_needs_all_weights(pair: tuple[Tokenizer, Tokenizer], tmp_path: Path) -> None:
    save_file(rows_by_token(NUM_EARLIER), tmp_path / "trained-0.safetensors")
    pair[0].save(str(tmp_path / "tokenizer.json"))
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the weights do not fit: missing"):
        start.start_from(module, tmp_path, pair[1])


def test_copying_is_taught_first_and_stays() -> None:
    recipe = train.Recipe(num_opening_steps=8)
    opening = [recipe.kind_at(step) for step in range(8)]
    assert {kind: opening.count(kind) for kind in opening} == {"brief": 2, "short": 2, "middle": 2, "long": 2}
    later = [recipe.kind_at(step) for step in range(8, 8 + len(train.PATTERN))]
    assert sorted(later) == sorted(train.PATTERN)
    assert set(later) == set(train.NUM_ROWS)
    assert 4 * (later.count("middle") + later.count("long")) >= len(later)


def test_every_pattern_keeps_all_kinds_of_rows() -> None:
    for name, pattern in train.PATTERNS.items():
        assert set(pattern) == set(train.NUM_ROWS), name
