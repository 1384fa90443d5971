"""The tokens as the grammar library sees them: bytes, with markers apart, so that no text ever spells one."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ownpath.structured.errors import NoGrammarLibrary

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class Vocabulary:
    """tokens: the bytes of each id; empty for an id without a token. markers: ids that are no text.

    end_ids: tokens that end an answer, at least one.
    """

    tokens: Sequence[bytes] = field(repr=False)
    markers: tuple[int, ...]
    end_ids: tuple[int, ...]

    def to_line(self) -> str:
        """Writes the vocabulary on one line of text."""
        tokens = [base64.b85encode(token).decode() for token in self.tokens]
        return json.dumps([tokens, self.markers, self.end_ids])

    @classmethod
    def from_line(cls, line: str) -> "Vocabulary":
        """Reads what ``to_line`` wrote."""
        tokens, markers, end_ids = json.loads(line)
        return cls([base64.b85decode(token) for token in tokens], tuple(markers), tuple(end_ids))


class _LibrarySource:
    """The vocabulary under the names that the library's wrapper reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(vocabulary.markers)
        self.eos_token_id, self.bos_token_id = vocabulary.end_ids[0], None

    def __call__(self, text: bytes | str) -> list[int]:
        # The library asks for this only to find one way of writing a text; masks allow them all.
        return []


def library_tokenizer(vocabulary: Vocabulary) -> "LLTokenizer":
    """Makes the library's form of a vocabulary. Errors: NoGrammarLibrary."""
    library = load_library()
    wrapped = library.TokenizerWrapper(_LibrarySource(vocabulary))
    tokenizer: LLTokenizer = library.LLTokenizer(
        wrapped, n_vocab=len(vocabulary.tokens), eos_token=list(vocabulary.end_ids)
    )
    return tokenizer


def load_library() -> Any:
    """Imports the library, which only servers with the extra have. Errors: NoGrammarLibrary."""
    try:
        import llguidance
    except ImportError:
        raise NoGrammarLibrary from None
    return llguidance
