"""Grammars over a vocabulary of single bytes: whether a text fits one, whatever its tokens."""

import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from ownpath.structured.grammar import compile_grammar, schema_rule
from ownpath.structured.vocabulary import Vocabulary, library_tokenizer

END = 256
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], (END,), (END,))


@cache
def byte_tokenizer() -> Any:
    return library_tokenizer(BYTES)


def compiled(schema: Any) -> Any:
    """The matcher of a schema; may be one with an error."""
    return compile_grammar(byte_tokenizer(), f"start: {schema_rule(schema)}")


def fits(matcher: Any, text: str) -> bool:
    """True if the whole text fits, and may end there."""
    matcher.reset()
    data = list(text.encode())
    if matcher.validate_tokens(data) < len(data):
        return False
    return bool(matcher.consume_tokens(data) and matcher.is_accepting())


def spellings(value: Any, most: int = 200) -> Iterator[Any]:
    """Yields a value with the keys of its objects in every order, up to a number."""
    return itertools.islice(_orders(value), most)


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        parts = {name: list(itertools.islice(_orders(item), 24)) for name, item in value.items()}
        for names in itertools.permutations(parts):
            for items in itertools.product(*(parts[name] for name in names)):
                yield dict(zip(names, items, strict=True))
    elif isinstance(value, list):
        for items in itertools.product(*(list(itertools.islice(_orders(item), 24)) for item in value)):
            yield list(items)
    else:
        yield value


def whole_numbers(value: Any) -> Any:
    """The same value, with numbers like 1.0 written as whole ones."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: whole_numbers(item) for name, item in value.items()}
    return [whole_numbers(item) for item in value] if isinstance(value, list) else value


def as_json(value: Any, *, compact: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else (", ", ": "))
