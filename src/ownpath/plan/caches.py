"""Plans the formats of the caches: window keys, compressed entries and index keys, each with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass

from ownpath.config import CSA_RATIO, ModelConfig
from ownpath.formats import FP8_INDEX_BYTES, FP8_INDEX_DIM, FP8_KEY_BYTES, FP8_KEY_DIM, FP8_KEY_ROTARY, CacheFormat
from ownpath.official import Step
from ownpath.plan.select import Demands

WINDOW_KEYS, ENTRIES, INDEX_KEYS = "window keys", "compressed entries", "index keys"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class PlannedCache:
    """The format of one kind of keys. stored: the dtype or the pages that hold it. key_bytes: of one key."""

    keys: str
    format: CacheFormat
    stored: str
    key_bytes: int
    why: str


def plan_caches(config: ModelConfig, demands: Demands) -> tuple[PlannedCache, ...]:
    """Returns the planned formats, of the kinds of keys that the model has."""
    return tuple(_planned(config, demands))


def cache_lack(config: ModelConfig, demands: Demands) -> str:
    """Returns why the model's keys do not fit the format that is asked for, naming the option; empty if they do."""
    if demands.cache_format is CacheFormat.BF16:
        return ""
    dims, wanted = (config.head_dim, config.qk_rope_head_dim), (FP8_KEY_DIM, FP8_KEY_ROTARY)
    what = "FP8 pages hold"
    if dims != wanted:
        found = f"this model's keys have {dims[0]}, {dims[1]} of them rotary"
        return f"{what} keys of {wanted[0]} channels, {wanted[1]} of them rotary; {found}"
    if CSA_RATIO in config.compress_ratios and config.index_head_dim != FP8_INDEX_DIM:
        return f"{what} index keys of {FP8_INDEX_DIM} channels; this model's have {config.index_head_dim}"
    return ""


def _planned(config: ModelConfig, demands: Demands) -> Iterator[PlannedCache]:
    has_entries, has_index = any(config.compress_ratios), CSA_RATIO in config.compress_ratios
    for keys in (WINDOW_KEYS, ENTRIES) if has_entries else (WINDOW_KEYS,):
        yield _of_kind(keys, config.head_dim, demands, Step.KV)
    if has_index:
        yield _of_kind(INDEX_KEYS, config.index_head_dim, demands, Step.INDEXER)


def _of_kind(keys: str, width: int, demands: Demands, step: Step) -> PlannedCache:
    is_official, is_index = step in demands.official, step is Step.INDEXER
    if demands.cache_format is CacheFormat.FP8:
        stored = "e4m3, one scale a key" if is_index else "e4m3, a scale per 64; rotary bfloat16"
        why = "asked for by --cache-format fp8; "
        why += _exactness(demands.activations, is_index) if is_official else f"rounds them, as {step} is plain"
        return PlannedCache(keys, demands.cache_format, stored, FP8_INDEX_BYTES if is_index else FP8_KEY_BYTES, why)
    why = f"the default; holds what {step} rounds to" if is_official else "the default; as they are computed"
    return PlannedCache(keys, demands.cache_format, demands.activations, width * _BYTES[demands.activations], why)


def _exactness(activations: str, is_index: bool) -> str:
    """Describes what pages lose of keys that official numerics have rounded."""
    if is_index:
        return f"exact: {Step.INDEXER} is official, and E4M3 holds its E2M1 values"
    lost = "" if activations == "bfloat16" else f", but for rotary channels, rounded from {activations}"
    return f"exact: {Step.KV} is official and rounds to these values{lost}"
