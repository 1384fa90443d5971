"""Loads a model folder for ``generate``, ``serve`` and ``diff``: tokenizer and model, or a running engine."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ownpath.allocator import keep_freed_memory
from ownpath.cache.layout import BLOCK_TOKENS, num_blocks
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig, ModelConfig
from ownpath.end_tokens import FIELD, GENERATION_CONFIG, EndTokens, read_end_tokens
from ownpath.engine.decoder import make_decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.sampler import warm_up_sampler
from ownpath.loading import default_model_dir, device_caps, leave_a_core, load_model
from ownpath.model.model import Model
from ownpath.startup import warm_up
from ownpath.terminal.console import tell
from ownpath.terminal.progress import Progress
from ownpath.trace import Ledger


@dataclass(frozen=True)
class Session:
    """A loaded model, ready for requests."""

    folder: Path
    tokenizer: Tokenizer
    engine: Engine
    ledger: Ledger
    lossless_casts: tuple[str, ...]
    model_config: ModelConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and configuration."""

    folder: Path
    tokenizer: Tokenizer
    model: Model
    config: EngineConfig
    end_tokens: EndTokens


def load_for(
    args: argparse.Namespace, max_num_seqs: int = EngineConfig.max_num_seqs, num_cache_blocks: int | None = None
) -> LoadedModel:
    """Loads the model that the arguments name (none: the embedded one), ready for its first step.

    max_num_seqs: sequences that its caches have room for. num_cache_blocks: as of ``EngineConfig``. Errors: ValueError
    naming the file, field or option.
    """
    least = num_blocks(args.max_model_len)
    if num_cache_blocks is not None and num_cache_blocks < least:
        length = f"a request of --max-model-len {args.max_model_len} tokens needs {least} blocks of {BLOCK_TOKENS}"
        raise ValueError(f"--num-cache-blocks {num_cache_blocks}: {length}")
    folder = args.model or default_model_dir()
    device_caps(args.device)  # says that a device is not there before torch does
    leave_a_core()
    if args.device == "cpu":
        keep_freed_memory()
    tokenizer = Tokenizer.from_folder(folder)
    config = EngineConfig.for_device(args.device, args.max_model_len)
    config = replace(config, is_batch_invariant=args.batch_invariant, official=args.numerics)
    config = replace(config, reference=frozenset(args.reference), graphs=not args.no_graphs)
    config = replace(config, cache_format=args.cache_format)
    config = replace(config, max_num_seqs=max_num_seqs, num_cache_blocks=num_cache_blocks)
    with Progress("loading", in_bytes=True) as show_loaded:
        model = load_model(folder, config, show_loaded)
    for contradiction in model.contradictions:
        tell("warning", f": {contradiction}; the tensors are believed")
    end_tokens = read_end_tokens(folder, model.config)
    if tokenizer.eos_id not in end_tokens.ids:
        ids = f"eos_token_id {', '.join(map(str, end_tokens.sources))}, but the tokenizer's EOS is {tokenizer.eos_id}"
        raise ValueError(f"{folder}: config.json says {ids}")
    for token_id in end_tokens.unusable:
        where = f"{folder / GENERATION_CONFIG}: {FIELD}"
        tell("warning", f": {where} has {token_id}, which is no token of this model")
    if torch.device(args.device).type == "cuda":
        warm_up(model, config)
        warm_up_sampler(args.device, tokenizer.num_tokens, model.config.vocab_size)
    return LoadedModel(folder, tokenizer, model, config, end_tokens)


@contextlib.contextmanager
def open_session(
    args: argparse.Namespace,
    max_num_seqs: int,
    prefix: PrefixSettings | None = None,
    num_cache_blocks: int | None = None,
) -> Iterator[Session]:
    """Loads the model that the arguments name and runs its engine, for so many requests at a time.

    prefix: of the prefix cache; ``None``: every prompt is computed. num_cache_blocks, errors: as of ``load_for``.
    """
    loaded = load_for(args, max_num_seqs, num_cache_blocks)
    model, tokenizer = loaded.model, loaded.tokenizer
    decoder = make_decoder(model, loaded.config, tokenizer.num_tokens)
    end_token_ids = loaded.end_tokens.ids
    kept = None if prefix is None else _prefix_cache(loaded, prefix)
    engine = Engine(
        model, loaded.config, tokenizer.num_tokens, end_token_ids=end_token_ids, decoder=decoder, prefix=kept
    )
    engine.start()
    try:
        yield Session(loaded.folder, tokenizer, engine, model.ledger, model.lossless_casts, model.config)
    finally:
        engine.stop()


def _prefix_cache(loaded: LoadedModel, settings: PrefixSettings) -> PrefixCache:
    config = loaded.config
    numerics = sorted(config.official), sorted(config.reference), config.is_batch_invariant
    of = repr((str(loaded.folder.resolve()), loaded.model.config, *numerics))
    return PrefixCache(loaded.model.caches, settings, of)
