"""An engine of a published shape and random weights, for tools that measure steps of real size."""

import argparse
import random
from collections.abc import Collection

import torch

from ownpath.bench.published import SHAPES
from ownpath.bench.request import StepOptions
from ownpath.bench.step import make_model, step_config
from ownpath.commands.session import engine_config_of
from ownpath.engine.decoder import Decoder
from ownpath.engine.engine import Engine
from ownpath.engine.prompt_graphs import with_prompt_graphs

_LETTERS, _DIGITS = b"etaoinshrdlucmfwypvbgkjqxzETAOINS", b"0123456789"
_MARKS = (b'", "', b'": "', b'"}, {"', b".", b",", b":", b"\n  ")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the shape, and how much of it."""
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape in place of a model")
    parser.add_argument("--layers", type=int, help="of the shape, the first ones only (default: all)")
    parser.add_argument("--expert-sets", type=int, default=StepOptions.expert_sets, help="that its layers share")


def shaped_engine(args: argparse.Namespace, max_num_seqs: int, row_counts: Collection[int]) -> Engine:
    """Makes the engine of ``--shape``. On a GPU that plans decode steps, those of so many rows are graphs, fewer rows
    are padded, and the most are ``max_num_seqs``."""
    options, config = StepOptions(layers=args.layers), engine_config_of(args, max_num_seqs)
    model = make_model(step_config(args.shape, options), config, options.export, args.expert_sets).model
    num_vocab, decoder = model.config.vocab_size, None
    if torch.device(config.device).type == "cuda" and model.decodes:
        decoder = Decoder(model, max_num_seqs, num_vocab)
        decoder.buckets = tuple(sorted({*row_counts, max_num_seqs}))
        with torch.inference_mode():
            (decoder.capture if config.graphs else decoder.warm_up)(lambda *_: None)
    return Engine(with_prompt_graphs(model, config), config, num_vocab, end_token_ids=(), decoder=decoder)


def made_up_tokens(known: list[bytes], count: int) -> list[bytes]:
    """Returns so many different tokens: known ones, and made-up words, of which a few have JSON's marks or digits."""
    chance, tokens, seen = random.Random(5), known[:count], {*known[:count]}
    while len(tokens) < count:
        word = bytes(chance.choices(_LETTERS, k=chance.randint(2, 9)))
        kind = chance.random()
        if kind < 0.01:
            word = bytes(chance.choices(_DIGITS, k=3))
        elif kind < 0.5:
            word = b" " + word
        elif kind > 0.97:
            word += chance.choice(_MARKS)
        if word not in seen:
            seen.add(word)
            tokens.append(word)
    return tokens
