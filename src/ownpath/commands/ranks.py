"""Several ranks behind one command: rank 0 starts the others, or torchrun has started all; rank 0 alone serves."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from ownpath.ranks.started import RANK_LOST, end_with_parent, is_rank
from ownpath.splits import AttentionSplit

if TYPE_CHECKING:
    from ownpath.engine.prefix import PrefixSettings
    from ownpath.ranks.group import Group

_LINGER_S = 10.0
"""The longest that a rank goes on after SIGTERM, so that rank 0, which may have been sent one too, can end answers."""


def rank_of(args: argparse.Namespace, *, takes_data: bool = False) -> int:
    """Returns this process's rank, and settles ``args.ranks``. takes_data: each rank may have tokens of its own.

    A rank that another process has started ends with it from here on. Errors: ValueError for options that do not fit.
    """
    end_with_parent(os.environ)
    if is_rank(os.environ):
        size = int(os.environ["WORLD_SIZE"])
        if args.ranks not in (1, size):
            raise ValueError(f"--ranks {args.ranks}: {size} were started")
        args.ranks = size
    if args.ranks == 1:
        return 0
    if args.attention == AttentionSplit.DATA and not takes_data:
        raise ValueError("--attention data: every rank computes all requests here; plan, serve and bench step take it")
    if args.device.startswith("cuda:"):
        raise ValueError(f"--device {args.device}: of several ranks each has a device of its own; name it cuda")
    return int(os.environ["RANK"]) if is_rank(os.environ) else 0


@contextmanager
def leading(args: argparse.Namespace) -> "Iterator[Group | None]":
    """Yields the group that rank 0 leads, whose other ranks it starts unless torchrun has; ``None`` for one rank."""
    if args.ranks == 1:
        yield None
        return
    from ownpath.ranks.group import join, leave
    from ownpath.ranks.launch import launched

    if not is_rank(os.environ):
        with launched(args.ranks, args.command_line) as group:
            yield group
        return
    try:
        yield join(os.environ)
    finally:
        leave()


@contextmanager
def beside(args: argparse.Namespace, rank: int) -> "Iterator[Group | None]":
    """Yields the group of a rank that does what all others do; ``None`` for one rank. Others than the first end with
    the process that has started them."""
    if rank == 0:
        with leading(args) as group:
            yield group
        return
    from ownpath.ranks.group import join, leave

    try:
        yield join(os.environ)
    finally:
        leave()


def follow(args: argparse.Namespace, prefix: "PrefixSettings | None") -> NoReturn:
    """Runs a rank that is not the first, until that has no more to do, and ends the process.

    0 after a clean end; 2 where a rank could not start, which rank 0 tells; ``RANK_LOST``.
    """
    from ownpath.commands.rank_start import become_ready, opener_of, rank_decoder, share_number
    from ownpath.commands.session import engine_config_of, model_folder_of
    from ownpath.engine.data_decoder import FollowingDataDecoder
    from ownpath.engine.data_steps import DataFollower
    from ownpath.engine.decoding_ranks import FollowingDecoder
    from ownpath.engine.following import Follower
    from ownpath.loading import leave_a_core, load_model
    from ownpath.ranks.control import Listener
    from ownpath.ranks.group import join
    from ownpath.ranks.peers import PeerLost
    from ownpath.ranks.start import phase
    from ownpath.startup import warm_up

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_later())
    group = join(os.environ)
    try:
        with phase(group, "open"):
            leave_a_core(group.size)
        config = engine_config_of(args, args.max_num_seqs, args.num_cache_blocks, group)
        model = load_model(model_folder_of(args), config, peers=group, open_window=opener_of(config, group))
        with phase(group, "warm up"):
            if config.device != "cpu":
                warm_up(model, config)
        num_tokens, most = share_number(group), config.max_num_seqs
        by_data, own = config.parallel.attention is AttentionSplit.DATA, (group.rank, group.size)

        def made() -> FollowingDecoder:
            rows = model, most, num_tokens
            return FollowingDataDecoder(*rows, *own) if by_data else FollowingDecoder(*rows)

        decoder = rank_decoder(model, config, group, made)
        places = (0, 0) if prefix is None else (prefix.num_snapshots, prefix.num_tails)
        follower = DataFollower(model, *own, places, decoder) if by_data else Follower(model, *places, decoder)
        become_ready(model, group, args.rank_timeout)
        follower.follow(Listener(group).hear)
    except PeerLost as error:
        print(f"ownpath: rank {group.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(RANK_LOST)
    except ValueError:
        os._exit(2)
    os._exit(0)


def _end_later() -> None:
    timer = threading.Timer(_LINGER_S, os._exit, (0,))
    timer.daemon = True
    timer.start()
