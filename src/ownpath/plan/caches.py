"""Plans the formats of the caches: window keys, compressed entries and index keys, each with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass

from ownpath.config import CSA_RATIO, ModelConfig
from ownpath.formats import (
    FP4_INDEX_BYTES,
    FP8_INDEX_BYTES,
    FP8_INDEX_DIM,
    FP8_KEY_BYTES,
    FP8_KEY_DIM,
    FP8_KEY_ROTARY,
    KeyFormat,
)
from ownpath.official import Step
from ownpath.plan.select import Demands

WINDOW_KEYS, ENTRIES, INDEX_KEYS = "window keys", "compressed entries", "index keys"
_PAGES = {
    (KeyFormat.FP8, False): ("e4m3, a scale per 64; rotary bfloat16", FP8_KEY_BYTES),
    (KeyFormat.FP8, True): ("e4m3, one scale a key", FP8_INDEX_BYTES),
    (KeyFormat.FP4, True): ("e2m1, a scale per 32", FP4_INDEX_BYTES),
}
"""By format, and whether keys are the indexer's: what pages hold, and the bytes of a key."""
ACTIVATION_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class PlannedCache:
    """The format of one kind of keys. stored: the dtype or the pages that hold it. key_bytes: of one key."""

    keys: str
    format: KeyFormat
    stored: str
    key_bytes: int
    why: str


def plan_caches(config: ModelConfig, demands: Demands) -> tuple[PlannedCache, ...]:
    """Returns the planned formats, of the kinds of keys that the model has."""
    return tuple(_planned(config, demands))


def cache_lack(config: ModelConfig, demands: Demands) -> str:
    """Returns why the model's keys do not fit the format that is asked for, naming the option; empty if they do."""
    if not demands.cache_format.in_pages:
        return ""
    dims, wanted = (config.head_dim, config.qk_rope_head_dim), (FP8_KEY_DIM, FP8_KEY_ROTARY)
    if dims != wanted:
        found = f"this model's keys have {dims[0]}, {dims[1]} of them rotary"
        return f"FP8 pages hold keys of {wanted[0]} channels, {wanted[1]} of them rotary; {found}"
    if CSA_RATIO in config.compress_ratios and config.index_head_dim != FP8_INDEX_DIM:
        found = f"this model's have {config.index_head_dim}"
        return f"{demands.cache_format.index_keys.upper()} pages hold index keys of {FP8_INDEX_DIM} channels; {found}"
    return ""


def _planned(config: ModelConfig, demands: Demands) -> Iterator[PlannedCache]:
    has_entries, has_index = any(config.compress_ratios), CSA_RATIO in config.compress_ratios
    for keys in (WINDOW_KEYS, ENTRIES) if has_entries else (WINDOW_KEYS,):
        yield _of_kind(keys, config.head_dim, demands, Step.KV)
    if has_index:
        yield _of_kind(INDEX_KEYS, config.index_head_dim, demands, Step.INDEXER)


def _of_kind(keys: str, width: int, demands: Demands, step: Step) -> PlannedCache:
    is_official, is_index = step in demands.official, step is Step.INDEXER
    key_format = demands.cache_format.index_keys if is_index else demands.cache_format.keys
    if key_format is KeyFormat.BF16:
        why = f"the default; holds what {step} rounds to" if is_official else "the default; as they are computed"
        return PlannedCache(keys, key_format, demands.activations, width * ACTIVATION_BYTES[demands.activations], why)
    why = f"asked for by --cache-format {demands.cache_format}; "
    why += _exactness(demands.activations, key_format, is_index) if is_official else f"rounds them, as {step} is plain"
    return PlannedCache(keys, key_format, *_PAGES[key_format, is_index], why)


def _exactness(activations: str, key_format: KeyFormat, is_index: bool) -> str:
    """Describes what pages lose of keys that official numerics have rounded."""
    if is_index:
        held = ", and E4M3 holds its E2M1 values" if key_format is KeyFormat.FP8 else " and rounds to these values"
        return f"exact: {Step.INDEXER} is official{held}"
    lost = "" if activations == "bfloat16" else f", but for rotary channels, rounded from {activations}"
    return f"exact: {Step.KV} is official and rounds to these values{lost}"
