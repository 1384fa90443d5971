"""The start of one of several ranks, from loading to its first step: all do the same in the same order."""

from collections.abc import Callable

import torch

from ownpath.config import EngineConfig
from ownpath.engine.decoder import AnyDecoder, prepared
from ownpath.loading import WindowOpener
from ownpath.model.model import Model
from ownpath.ranks.group import Group
from ownpath.ranks.start import phase, swap_text

_MICRO = 1_000_000


def opener_of(config: EngineConfig, group: Group | None) -> WindowOpener | None:
    """See ``window_opener``."""
    return window_opener(config.device, group)


def window_opener(name: str, group: Group | None) -> WindowOpener | None:
    """Makes this rank's GPU the one that kernels run on, and returns how its window is opened; ``None`` elsewhere."""
    device = torch.device(name)
    if group is None or device.type != "cuda":
        return None
    from ownpath.kernels.exchange.symmetric import open_on_gpus

    torch.cuda.set_device(device)
    return open_on_gpus


def share_number(group: Group, number: int = 0) -> int:
    """Returns rank 0's number on all ranks."""
    return int(swap_text(group, "start: the number of tokens", str(number))[0])


def rank_decoder(model: Model, config: EngineConfig, group: Group, make: Callable[[], AnyDecoder]) -> AnyDecoder | None:
    """Makes a rank's decoder, see ``engine.decoder.prepared``. Errors: PeerLost; another rank's."""
    with phase(group, "capture"):
        return prepared(model, config, make)


def become_ready(model: Model, group: Group, limit_s: float) -> None:
    """Has this rank wait no longer than so many seconds for others from now on. Errors: PeerLost; another rank's."""
    with phase(group, "ready"):
        group.limit_s = limit_s
        if model.window is not None:
            model.window.set_limit(int(limit_s * _MICRO))
            torch.cuda.synchronize(model.window.words.device)
            model.window.check()
