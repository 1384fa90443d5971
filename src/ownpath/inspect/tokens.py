"""Checks the tokenizer: markers are single tokens, text survives, prompts are as the chat format says."""

from collections.abc import Iterator
from pathlib import Path

from ownpath.chat.encode import encode_messages
from ownpath.chat.markers import ASSISTANT, BOS, EOS, SPECIALS, THINK_END, THINK_START, USER
from ownpath.chat.tokenizer import MissingMarkerError, Tokenizer, TokenizerError
from ownpath.checkpoint.problems import make_problem
from ownpath.config import ModelConfig
from ownpath.finding import Finding
from ownpath.inspect.golden_prompts import GOLDEN_PROMPTS, ROUND_TRIPS, GoldenPrompt
from ownpath.inspect.metadata import json_object

NEEDED = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)
"""Markers that every conversation needs; the others serve tools and tasks."""


def missing_markers(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the chat format's markers that a vocabulary has no token for."""
    return tuple(marker for marker in SPECIALS if _id_of(tokenizer, marker) is None)


def token_problems(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yields markers, texts and prompts that the tokenizer gets wrong."""
    missing = missing_markers(tokenizer)
    for marker in SPECIALS:
        if marker in missing:
            if marker in NEEDED:
                yield make_problem("marker", marker, f"tokenizer.json: special token {marker!r} is missing")
            continue
        ids = _without_bos(tokenizer, tokenizer.encode_raw(marker))
        if ids != [tokenizer.special_id(marker)]:
            yield make_problem("marker", marker, f"tokenizer.json: {marker!r} is read as {len(ids)} tokens, {ids[:8]}")
    for text in ROUND_TRIPS:
        yield from _round_trip(tokenizer, text)
    for golden in GOLDEN_PROMPTS:
        if not any(marker in golden.prompt for marker in missing):
            yield from _prompt(tokenizer, golden)


def _id_of(tokenizer: Tokenizer, marker: str) -> int | None:
    try:
        return tokenizer.special_id(marker)
    except MissingMarkerError:
        return None


def _without_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids[1:] if tokenizer.add_bos else ids


def _round_trip(tokenizer: Tokenizer, text: str) -> Iterator[Finding]:
    try:
        back = b"".join(map(tokenizer.token_bytes, tokenizer.encode_text(text)))
    except TokenizerError as error:
        yield make_problem("round-trip", "tokenizer.json", f"{text!r}: {error}")
        return
    if back != text.encode("utf-8"):
        shown = back.decode("utf-8", "backslashreplace")
        yield make_problem("round-trip", "tokenizer.json", f"tokenizer.json: {text!r} comes back as {shown!r}")


def _prompt(tokenizer: Tokenizer, golden: GoldenPrompt) -> Iterator[Finding]:
    """Compares our encoder's ids with those of the prompt's own text, and decodes them back to that text."""
    try:
        ours = tokenizer.encode_segments(encode_messages(golden.messages, golden.setting))
        theirs = _without_bos(tokenizer, tokenizer.encode_raw(golden.prompt))
    except TokenizerError as error:
        yield make_problem("prompt", golden.name, f"prompt {golden.name!r}: {error}")
        return
    text = b"".join(map(tokenizer.token_bytes, ours)).decode("utf-8", "backslashreplace")
    if text != golden.prompt:
        yield make_problem(
            "prompt", golden.name, f"prompt {golden.name!r} is written as {text!r}, not {golden.prompt!r}"
        )
    elif ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        found = f"{ours[place : place + 4]} instead of {theirs[place : place + 4]}"
        yield make_problem("prompt", golden.name, f"prompt {golden.name!r}: token {place} on is {found}")


def generation_problems(folder: Path, config: ModelConfig) -> Iterator[Finding]:
    """Compares generation_config.json and tokenizer_config.json (where they exist) with config.json and the format."""
    said = yield from json_object(folder / "generation_config.json", "generation-config")
    bos, pad = said.get("bos_token_id"), said.get("pad_token_id")
    if bos is not None and bos != config.bos_token_id:
        message = f"generation_config.json: bos_token_id is {bos!r}, config.json says {config.bos_token_id}"
        yield make_problem("token-id", "bos_token_id", message)
    if pad is not None and not (type(pad) is int and 0 <= pad < config.vocab_size):
        message = f"generation_config.json: pad_token_id is {pad!r}, the embedding has {config.vocab_size} rows"
        yield make_problem("token-id", "pad_token_id", message)
    said = yield from json_object(folder / "tokenizer_config.json", "generation-config")
    for field, marker in (("bos_token", BOS), ("eos_token", EOS)):
        value = said.get(field)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and text != marker:
            message = f"tokenizer_config.json: {field} is {text!r}, the chat format's is {marker!r}"
            yield make_problem("token-id", field, message)
