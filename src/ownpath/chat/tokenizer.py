"""Converts between text and token ids with the checkpoint's ``tokenizer.json``.

Two readings of the same vocabulary are kept. ``encode_text`` knows no special tokens, so a marker spelled out in
somebody's text is ordinary text. ``encode_raw`` recognises them: the raw prompt form gives its author full control.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from ownpath.chat.markers import BOS, EOS, Special
from ownpath.files import FileError, is_present, read_json_object

MAX_ENTRIES = 600_000
"""Limit of tokens, and of merges. V4 has 129,000 of each; no public vocabulary is more than half of this."""


class TokenizerError(ValueError):
    """A tokenizer file, or a text, that cannot be used; the message names it."""


class MissingMarkerError(TokenizerError):
    """A marker of the chat format that this vocabulary lacks."""

    def __init__(self, marker: str, source: str) -> None:
        super().__init__(f"{source}: special token {marker!r} is missing")
        self.marker = marker


class Tokenizer:
    """Byte-level BPE with explicit special tokens.

    num_tokens: size of the vocabulary; every token's id is below it. An embedding may have more rows (padding).
    max_token_bytes: bytes of the longest token; n tokens never hold more than n times that.
    """

    def __init__(self, spec: dict[str, Any], add_bos: bool = False, source: str = "tokenizer.json") -> None:
        self.add_bos = add_bos
        self._source = source
        _check_sizes(spec, source)
        self._special_ids, self._hidden_ids = _added_tokens(spec, source)
        self._marker_ids = frozenset(self._special_ids.values())
        self._raw = _backend(spec, source)
        _check_ids(self._raw, self._special_ids, source)
        self._plain = _backend({**spec, "added_tokens": [], "post_processor": None}, source)
        self._token_bytes = _token_bytes(self._raw, self._special_ids)
        self.num_tokens = max(self._token_bytes) + 1
        self.max_token_bytes = max(len(data) for data in self._token_bytes.values())
        self.eos_id = self.special_id(EOS)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` and, if there, ``tokenizer_config.json``. Errors: TokenizerError."""
        spec = _read_json(folder / "tokenizer.json")
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path) if is_present(config_path) else {}
        return cls(spec, config.get("add_bos_token") is True, str(folder / "tokenizer.json"))

    def encode_text(self, text: str) -> list[int]:
        """Encodes text in which nothing is special."""
        ids = self._encode(self._plain, text)
        markers = self._marker_ids.intersection(ids)
        if markers:  # a vocabulary that lists a marker among its ordinary words
            raise TokenizerError(f"{self._source}: cannot write {self.token_text(min(markers))!r} as plain text")
        return ids

    def encode_raw(self, text: str, *, add_special: bool = True) -> list[int]:
        """Encodes text in which special tokens are recognised; puts BOS first iff ``add_bos`` and ``add_special``."""
        bos = [self.special_id(BOS)] if self.add_bos and add_special else []
        return bos + self._encode(self._raw, text)

    def encode_segments(self, segments: Sequence[Special | str]) -> list[int]:
        """Encodes the segments of a conversation."""
        ids: list[int] = []
        for segment in segments:
            ids += [self.special_id(segment.text)] if isinstance(segment, Special) else self.encode_text(segment)
        return ids

    def special_id(self, text: str) -> int:
        """Returns the id of a special token. Errors: MissingMarkerError when this vocabulary has none of that name."""
        if text not in self._special_ids:
            raise MissingMarkerError(text, self._source)
        return self._special_ids[text]

    def has_special(self, text: str) -> bool:
        """Tells whether this vocabulary has a special token of that name."""
        return text in self._special_ids

    @property
    def marker_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        return self._marker_ids

    def is_hidden(self, token_id: int) -> bool:
        """Tells whether a token is a marker that answers do not show."""
        return token_id in self._hidden_ids

    def token_name(self, token_id: int) -> str:
        """Returns a token as the vocabulary spells it (a space is ``Ġ``); empty for an id without a token."""
        return self._raw.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token, not always whole characters; none for an id without a token."""
        return self._token_bytes.get(token_id, b"")

    def join_bytes(self, token_ids: Sequence[int], *, show_hidden: bool) -> bytes:
        """Returns the bytes of tokens, one after the other. show_hidden: also of those that answers do not show."""
        known, hidden = self._token_bytes, self._hidden_ids
        return b"".join([known.get(idx, b"") for idx in token_ids if show_hidden or idx not in hidden])

    def token_text(self, token_id: int) -> str:
        """A token's printable name: its text, or ``bytes:\\x..`` when that is not whole characters."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _encode(self, backend: Any, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode at character {error.start}") from None
        # Unlike encode, this leaves Python's lock to other threads while it works.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileError as error:
        raise TokenizerError(str(error)) from None


def _check_sizes(spec: dict[str, Any], source: str) -> None:
    """Refuses lists that would fill the memory: each entry takes about 1 KB in the backend."""
    model = spec.get("model")
    parts = {name: model.get(name) for name in ("vocab", "merges")} if isinstance(model, dict) else {}
    for name, part in {**parts, "added_tokens": spec.get("added_tokens")}.items():
        if isinstance(part, list | dict) and len(part) > MAX_ENTRIES:
            raise TokenizerError(f"{source}: {name} has {len(part)} entries; at most {MAX_ENTRIES} are read")


def _added_tokens(spec: dict[str, Any], source: str) -> tuple[dict[str, int], frozenset[int]]:
    """Returns added tokens' ids by text, and the ids of those marked special."""
    try:
        tokens = [(str(token["content"]), int(token["id"]), bool(token["special"])) for token in spec["added_tokens"]]
    except (KeyError, TypeError, ValueError):
        raise TokenizerError(f"{source}: added_tokens must list objects with content, id and special") from None
    return {text: i for text, i, _ in tokens}, frozenset(i for _, i, special in tokens if special)


def _backend(spec: dict[str, Any], source: str) -> Any:
    decoder = spec.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"{source}: decoder must be ByteLevel, found {decoder!r}")
    try:
        backend = BackendTokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the backend raises bare Exception for every malformed file
        raise TokenizerError(f"{source}: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_ids(backend: Any, added: dict[str, int], source: str) -> None:
    """Checks that the backend gave added tokens the file's ids; it numbers them itself."""
    for text, token_id in added.items():
        if backend.token_to_id(text) != token_id:
            found = backend.token_to_id(text)
            raise TokenizerError(f"{source}: added token {text!r} has id {token_id}, but would be read as {found}")


def _token_bytes(backend: Any, added: dict[str, int]) -> dict[int, bytes]:
    """Undoes byte-level BPE's alphabet for every token; added tokens stand for their own text."""
    alphabet = _byte_alphabet()
    literal = set(added.values())
    table = {}
    for text, token_id in backend.get_vocab(with_added_tokens=True).items():
        is_literal = token_id in literal or not all(character in alphabet for character in text)
        table[token_id] = text.encode("utf-8") if is_literal else bytes(alphabet[c] for c in text)
    return table


def _byte_alphabet() -> dict[str, int]:
    """Maps characters to bytes: byte-level BPE writes printable Latin-1 bytes as themselves, the others from U+0100
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
