"""Documents as padded token rows, from which the training loop samples."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from tiny.chat import Document
from tiny.tokens import PAD, plain_tokenizer

PADDING, PROMPT, ANSWER = 0, 1, 2


@dataclass(frozen=True)
class Rows:
    """Token rows of one width.

    Shapes: ids int16 [num_rows, width], padded with the pad token; role uint8 [num_rows, width]: PADDING, PROMPT or
    ANSWER, of the token at that place.
    """

    ids: torch.Tensor
    role: torch.Tensor

    def to(self, device: str) -> "Rows":
        return Rows(self.ids.to(device), self.role.to(device))


class Encoder:
    """Encodes documents to token ids, piece by piece without special tokens, as the chat encoder does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._plain = plain_tokenizer(tokenizer)
        self.pad_id = self._special[PAD]

    def text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Returns token ids and the role of each."""
        ids: list[int] = []
        roles: list[int] = []
        for piece in document:
            piece_ids = [self._special[piece.text]] if piece.special else self.text_ids(piece.text)
            ids += piece_ids
            roles += [ANSWER if piece.answer else PROMPT] * len(piece_ids)
        return ids, roles


def make_rows(
    encoder: Encoder, make: Callable[[random.Random], Document], widths: tuple[int, ...], num_rows: int, seed: int
) -> list[Rows]:
    """Makes rows of ``num_rows`` documents, each in the narrowest of ``widths`` that holds it; draws longer ones again.

    widths: ascending.
    """
    rng = random.Random(seed)
    sorted_in: dict[int, list[tuple[list[int], list[int]]]] = {width: [] for width in widths}
    for _ in range(num_rows):
        tokens, roles = encoder.encode(make(rng))
        while len(tokens) > widths[-1]:
            tokens, roles = encoder.encode(make(rng))
        width = next(width for width in widths if len(tokens) <= width)
        sorted_in[width].append((tokens, roles))
    return [_pad(items, width, encoder.pad_id) for width, items in sorted_in.items()]


def _pad(items: list[tuple[list[int], list[int]]], width: int, pad_id: int) -> Rows:
    ids = torch.full((len(items), width), pad_id, dtype=torch.int16)
    role = torch.full((len(items), width), PADDING, dtype=torch.uint8)
    for row, (tokens, roles) in enumerate(items):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
        role[row, : len(roles)] = torch.tensor(roles, dtype=torch.uint8)
    return Rows(ids, role)
