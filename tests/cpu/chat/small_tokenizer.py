"""A byte-level tokenizer small enough to read: 256 bytes, a few merges, the format's special tokens."""

from typing import Any

from ownpath.chat.markers import DSML, SPECIALS, THINK_END, THINK_START
from ownpath.chat.tokenizer import Tokenizer

FIRST_BYTE_ID = 16
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "s t", "o p", "st op", "i n")
NUM_TOKENS = FIRST_BYTE_ID + 256 + len(MERGES)
USER_ID, ASSISTANT_ID, THINK_END_ID = 2, 3, 5


def byte_letters() -> list[str]:
    """Byte-level BPE's letter of every byte, as the GPT-2 paper's code lays them out: printable ones are themselves."""
    letters, shift = [], 0
    for byte in range(256):
        is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        letters.append(chr(byte) if is_printable else chr(256 + shift))
        shift += not is_printable
    return letters


def tokenizer_spec(
    vocabulary: dict[str, int] | None = None,
    merges: tuple[str, ...] = MERGES,
    specials: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` in the published one's shape: special tokens are in the vocabulary too."""
    specials = specials or {text: n for n, text in enumerate(SPECIALS)}
    if vocabulary is None:
        vocabulary = {letter: FIRST_BYTE_ID + byte for byte, letter in enumerate(byte_letters())}
        for merge in merges:
            vocabulary[merge.replace(" ", "")] = len(vocabulary) + FIRST_BYTE_ID
    added = [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text not in (THINK_START, THINK_END, DSML),
        }
        for text, token_id in specials.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": specials | vocabulary,
            "merges": list(merges),
        },
    }


def small_tokenizer(add_bos: bool = False) -> Tokenizer:
    """Ids 0..14: the format's special tokens in ``SPECIALS``' order; 16 + b: byte b; then one id per merge."""
    return Tokenizer(tokenizer_spec(), add_bos)
