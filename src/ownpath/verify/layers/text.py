"""The fixed text that the layers read, long enough to reach the edge cases of every kind of attention."""

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from ownpath.chat.tokenizer import Tokenizer, TokenizerError
from ownpath.config import ModelConfig
from ownpath.verify.subject import Subject, text_length

PARAGRAPH = """\
The ferry leaves the northern harbour at a quarter past six, when the water is still grey and the gulls sleep on the \
roof of the customs house. Its captain, Ines Marlow, has crossed the strait four thousand times and writes down every \
crossing: the wind, the height of the waves, how many passengers came aboard, and one thing that she had never seen \
before. On the 3rd of March 1998 it was a heron on the bridge; in the summer of 2004, a boy who asked whether the sea \
has a back side. Her mate collects the fares in a tin box: 2.50 for a grown person, half of that for a child, nothing \
for a dog. If twelve grown persons, six children and two dogs come aboard, the box holds 37.50 more than before.

def fare(adults: int, children: int) -> float:
    return 2.5 * adults + 1.25 * children

Halfway across, the engine is stopped for a minute. Nobody remembers who began the custom, but everybody keeps it. One \
hears the hull creak, the ropes knock against the mast, and far away the bell of the lighthouse, which rings twice for \
fog and three times for a birth. An old man from the islands used to say that this minute is the only one of the day \
that belongs to no one. Then the engine starts again, the cups tremble on their hooks, and the southern shore comes \
closer: first the hill, then the chapel, then the long wall with the names of the boats painted on it in red, white \
and green. Die Fähre legt an, les voyageurs descendent, y el capitán apunta una línea más en su cuaderno.
"""
_SEED = 20


@dataclass(frozen=True)
class SampleText:
    """token_ids, and a description of them."""

    token_ids: tuple[int, ...]
    what: str

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def text_of(subject: Subject) -> SampleText:
    """Repeats the paragraph in the checkpoint's own tokens; takes seeded random ids where it has no tokenizer.

    Its length lets the indexer choose (more entries than ``index_topk``) where the device can afford that, and never
    exceeds what the engine is configured for.
    """
    return sample_text(subject.folder, subject.config, text_length(subject.config, subject.engine))


def sample_text(folder: Path, config: ModelConfig, num_tokens: int) -> SampleText:
    """Repeats the paragraph up to ``num_tokens``."""
    words = _tokenize(folder, config)
    if words is None:
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, config.vocab_size, (num_tokens,), generator=generator).tolist()
        return SampleText(tuple(ids), f"{num_tokens} random tokens (seed {_SEED})")
    return SampleText(tuple(islice(cycle(words), num_tokens)), f"{num_tokens} tokens of a fixed text")


def _tokenize(folder: Path, config: ModelConfig) -> list[int] | None:
    """Tokenizes BOS and the paragraph; ``None`` where no tokenizer fits this model."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        ids = Tokenizer.from_folder(folder).encode_text(PARAGRAPH)
    except TokenizerError:
        return None
    ids = [config.bos_token_id, *ids]
    return ids if max(ids) < config.vocab_size else None
