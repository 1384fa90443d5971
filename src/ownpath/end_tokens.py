"""The tokens that end an answer: those that config.json names, and those of generation_config.json, with their source.

Publishers add an end token in either file and leave the other as it was, so that the tokens of both count.
"""

from dataclasses import dataclass
from pathlib import Path

from ownpath.config import ConfigError, ModelConfig, token_ids
from ownpath.files import FileError, MissingFileError, read_json_object

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
FIELD = "eos_token_id"


@dataclass(frozen=True)
class EndTokens:
    """sources: token id -> the files that name it. unusable: ids of generation_config.json that are no token."""

    sources: dict[int, tuple[str, ...]]
    unusable: tuple[int, ...] = ()

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all end tokens."""
        return frozenset(self.sources)


def read_end_tokens(folder: Path, config: ModelConfig) -> EndTokens:
    """Reads the end tokens of a model folder. Errors: ConfigError naming the file and the field."""
    sources: dict[int, tuple[str, ...]] = dict.fromkeys(config.eos_token_id, (CONFIG,))
    path = folder / GENERATION_CONFIG
    try:
        fields = read_json_object(path)
    except MissingFileError:
        return EndTokens(sources)
    except FileError as error:
        raise ConfigError(f"{error}; it may name end tokens") from None
    value = fields.get(FIELD)
    if value is None:
        return EndTokens(sources)
    unusable = []
    for token_id in token_ids(value, f"{path}: {FIELD}"):
        if 0 <= token_id < config.vocab_size:
            sources[token_id] = (*sources.get(token_id, ()), GENERATION_CONFIG)
        else:
            unusable.append(token_id)
    return EndTokens(sources, tuple(unusable))
