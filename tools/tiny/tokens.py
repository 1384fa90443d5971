"""The tokenizer of tiny-v4: byte-level BPE over our corpus, with DeepSeek-V4's special tokens."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
_TASKS = ("action", "query", "authority", "domain", "title", "read_url", "extracted_url")
# BOS, EOS and padding are control tokens; the others are ordinary added tokens that show in decoded text.
CONTROL_TOKENS = (BOS, EOS, PAD)
ADDED_TOKENS = (USER, ASSISTANT, THINK, END_THINK, "｜DSML｜", "<｜latest_reminder｜>", *(f"<｜{t}｜>" for t in _TASKS))
SPECIAL_TOKENS = (*CONTROL_TOKENS, *ADDED_TOKENS)
VOCAB_SIZE = 2560


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer of exactly ``VOCAB_SIZE`` tokens: the special ones first, all 256 bytes, then merges.

    Digits are single tokens, so that sums are digit by digit. Errors: ValueError when the texts hold too few merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} are wanted")
    return Tokenizer.from_str(json.dumps(_mark_added_tokens(json.loads(tokenizer.to_str()))))


def extend_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """Adds merges learnt from ``texts`` behind the tokenizer's own, up to ``VOCAB_SIZE`` tokens; ids do not change.

    New merges come last, so a text is first cut as before and then joined further, and most texts keep the tokens that
    the model knows. Errors: ValueError when the texts hold too few merges.
    """
    counts: Counter[str] = Counter()
    for text, num in Counter(texts).items():
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            counts[part] += num
    pieces = {part: tuple(piece.value for piece in tokenizer.model.tokenize(part)) for part in counts}
    fields = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = fields["model"]["vocab"]
    while len(vocab) < VOCAB_SIZE:
        pairs: Counter[tuple[str, str]] = Counter()
        for part, cut in pieces.items():
            for pair in pairwise(cut):
                pairs[pair] += counts[part]
        if not pairs:
            raise ValueError(f"the texts give {len(vocab)} tokens, {VOCAB_SIZE} are wanted")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        fields["model"]["merges"].append(list(best))
        vocab.setdefault("".join(best), len(vocab))
        pieces = {part: _join(cut, best) for part, cut in pieces.items()}
    return Tokenizer.from_str(json.dumps(fields))


def _join(cut: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Joins every ``pair`` in ``cut`` into one piece."""
    if pair[0] not in cut:
        return cut
    found: list[str] = []
    place = 0
    while place < len(cut):
        is_pair = cut[place : place + 2] == pair
        found.append("".join(pair) if is_pair else cut[place])
        place += 2 if is_pair else 1
    return tuple(found)


def _mark_added_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    for token in fields["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return fields


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer without added tokens, so that a special token's string is ordinary text."""
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(fields))


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` in the published model's form."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 65536,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(fields, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
