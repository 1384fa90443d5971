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
from ownpath.commands.rank_options import parallel_of
from ownpath.commands.rank_start import become_ready, opener_of, rank_decoder, share_number
from ownpath.config import EngineConfig, ModelConfig
from ownpath.end_tokens import FIELD, GENERATION_CONFIG, EndTokens, read_end_tokens
from ownpath.engine.data_decoder import LeadingDataDecoder
from ownpath.engine.data_leading import DataLeader, DataLeadingModel
from ownpath.engine.data_steps import DataFollower
from ownpath.engine.decoder import make_decoder
from ownpath.engine.decoding_ranks import LeadingDecoder
from ownpath.engine.draft_decoder import ROWS
from ownpath.engine.drafting import make_drafts
from ownpath.engine.engine import Engine
from ownpath.engine.leading import LeadingModel, LeadingStore
from ownpath.engine.prefix import PrefixCache, PrefixSettings
from ownpath.engine.prompt_graphs import with_prompt_graphs
from ownpath.engine.sampler import warm_up_sampler
from ownpath.loading import default_model_dir, device_caps, leave_a_core, load_model
from ownpath.model.build import ALONE
from ownpath.model.model import Model
from ownpath.ranks.control import Leader
from ownpath.ranks.group import Group
from ownpath.ranks.start import phase
from ownpath.splits import AttentionSplit
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


def model_folder_of(args: argparse.Namespace) -> Path:
    """Returns the folder that the arguments name; without one, the embedded model's."""
    return args.model or default_model_dir()


def engine_config_of(
    args: argparse.Namespace, max_num_seqs: int, num_cache_blocks: int | None = None, group: Group | None = None
) -> EngineConfig:
    """Returns the engine's settings, of this process among the ``group``'s. Errors: ValueError naming the option."""
    least = num_blocks(args.max_model_len)
    if num_cache_blocks is not None and num_cache_blocks < least:
        length = f"a request of --max-model-len {args.max_model_len} tokens needs {least} blocks of {BLOCK_TOKENS}"
        raise ValueError(f"--num-cache-blocks {num_cache_blocks}: {length}")
    device = args.device if group is None or args.device == "cpu" else f"{args.device}:{group.rank}"
    device_caps(device)  # says that a device is not there before torch does
    config = EngineConfig.for_device(device, args.max_model_len)
    config = replace(config, is_batch_invariant=args.batch_invariant, official=args.numerics)
    config = replace(config, reference=frozenset(args.reference), graphs=not args.no_graphs)
    config = replace(config, cache_format=args.cache_format, draws_weights=args.random_weights)
    config = replace(config, max_num_seqs=max_num_seqs, num_cache_blocks=num_cache_blocks)
    if args.max_prefill_tokens is not None:
        config = replace(config, max_prefill_tokens=args.max_prefill_tokens)
    if args.draft:
        config = replace(config, loads_draft=True, rows_per_request=ROWS)
    if group is None:
        return config
    return replace(config, parallel=parallel_of(args, group.rank))


def load_for(
    args: argparse.Namespace,
    max_num_seqs: int = EngineConfig.max_num_seqs,
    num_cache_blocks: int | None = None,
    group: Group | None = None,
) -> LoadedModel:
    """Loads the model that the arguments name (none: the embedded one), ready for its first step.

    max_num_seqs: sequences that its caches have room for. num_cache_blocks: as of ``EngineConfig``. group: the ranks
    that load it together. Errors: ValueError naming the file, field or option.
    """
    peers, folder = group or ALONE, model_folder_of(args)
    with phase(peers, "open"):
        config = engine_config_of(args, max_num_seqs, num_cache_blocks, group)
        leave_a_core(peers.size)
        if args.device == "cpu":
            keep_freed_memory()
        tokenizer = Tokenizer.from_folder(folder)
    with Progress("loading", in_bytes=True) as show_loaded:
        model = load_model(folder, config, show_loaded, peers, opener_of(config, group))
    for contradiction in model.contradictions:
        tell("warning", f": {contradiction}; the tensors are believed")
    end_tokens = read_end_tokens(folder, model.config)
    if tokenizer.eos_id not in end_tokens.ids:
        ids = f"eos_token_id {', '.join(map(str, end_tokens.sources))}, but the tokenizer's EOS is {tokenizer.eos_id}"
        raise ValueError(f"{folder}: config.json says {ids}")
    for token_id in end_tokens.unusable:
        where = f"{folder / GENERATION_CONFIG}: {FIELD}"
        tell("warning", f": {where} has {token_id}, which is no token of this model")
    with phase(peers, "warm up"):
        if torch.device(args.device).type == "cuda":
            warm_up(model, config)
    if torch.device(args.device).type == "cuda":
        warm_up_sampler(config.device, tokenizer.num_tokens, model.config.vocab_size)
    return LoadedModel(folder, tokenizer, model, config, end_tokens)


@contextlib.contextmanager
def open_session(
    args: argparse.Namespace,
    max_num_seqs: int,
    prefix: PrefixSettings | None = None,
    num_cache_blocks: int | None = None,
    group: Group | None = None,
) -> Iterator[Session]:
    """Loads the model that the arguments name and runs its engine, for so many requests at a time.

    prefix: of the prefix cache; ``None``: every prompt is computed. group: the ranks that run the model, of which this
    is the first. num_cache_blocks, errors: as of ``load_for``.
    """
    loaded = load_for(args, max_num_seqs, num_cache_blocks, group)
    engine, leader = _alone(loaded, prefix) if group is None else _led(loaded, prefix, group, args.rank_timeout)
    engine.start()
    if leader is not None:
        leader.start(lambda error: engine.give_up(str(error)))
    model = loaded.model
    try:
        yield Session(loaded.folder, loaded.tokenizer, engine, model.ledger, model.lossless_casts, model.config)
    finally:
        engine.stop()
        if leader is not None:
            leader.stop()


def _alone(loaded: LoadedModel, prefix: PrefixSettings | None) -> tuple[Engine, None]:
    """Makes the engine of a model that one process runs."""
    model, num_tokens = loaded.model, loaded.tokenizer.num_tokens
    decoder = make_decoder(model, loaded.config, num_tokens)
    kept = None if prefix is None else PrefixCache(model.caches, prefix, _prefix_root(loaded))
    ends = loaded.end_tokens.ids
    drafts, config = make_drafts(model, loaded.config, num_tokens), loaded.config
    reader = with_prompt_graphs(model, config)
    if drafts is not None:
        drafts = drafts._replace(model=reader)
    return Engine(reader, config, num_tokens, end_token_ids=ends, decoder=decoder, prefix=kept, drafts=drafts), None


def _led(
    loaded: LoadedModel, prefix: PrefixSettings | None, group: Group, limit_s: float
) -> tuple[Engine, Leader | None]:
    """Makes the engine of a model that several ranks run."""
    leader, num_tokens = Leader(group), share_number(group, loaded.tokenizer.num_tokens)
    by_data = loaded.config.parallel.attention is AttentionSplit.DATA
    engine = (_led_by_data if by_data else _led_by_heads)(loaded, prefix, group, leader, num_tokens)
    become_ready(loaded.model, group, limit_s)
    return engine, leader


def _led_by_heads(
    loaded: LoadedModel, prefix: PrefixSettings | None, group: Group, leader: Leader, num_tokens: int
) -> Engine:
    """Makes the engine of ranks that all compute all requests."""
    most, ends = loaded.config.max_num_seqs, loaded.end_tokens.ids
    decoder = rank_decoder(
        loaded.model, loaded.config, group, lambda: LeadingDecoder(loaded.model, most, num_tokens, leader)
    )
    model, caches = LeadingModel(loaded.model, leader), loaded.model.caches
    kept = None
    if prefix is not None:
        store = LeadingStore(caches, prefix.num_snapshots, leader, model.passed, prefix.num_tails)
        kept = PrefixCache(caches, prefix, _prefix_root(loaded), store)
    return Engine(model, loaded.config, num_tokens, end_token_ids=ends, decoder=decoder, prefix=kept)


def _led_by_data(
    loaded: LoadedModel, prefix: PrefixSettings | None, group: Group, leader: Leader, num_tokens: int
) -> Engine:
    """Makes the engine of ranks that have requests of their own."""
    places = (0, 0) if prefix is None else (prefix.num_snapshots, prefix.num_tails)
    own = DataFollower(loaded.model, group.rank, group.size, places)
    model, ends = DataLeadingModel(loaded.model, DataLeader(leader, own)), loaded.end_tokens.ids
    rows = loaded.config.max_num_seqs, num_tokens
    decoder = rank_decoder(
        loaded.model, loaded.config, group, lambda: LeadingDataDecoder(loaded.model, *rows, leader, model.caches)
    )
    kept = None if prefix is None else model.prefixes(prefix, _prefix_root(loaded))
    return Engine(model, loaded.config, num_tokens, end_token_ids=ends, decoder=decoder, prefix=kept)


def _prefix_root(loaded: LoadedModel) -> str:
    config = loaded.config
    numerics = sorted(config.official), sorted(config.reference), config.is_batch_invariant
    return repr((str(loaded.folder.resolve()), loaded.model.config, *numerics))
