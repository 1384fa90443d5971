"""Loads a model folder: headers, plan, weights, runners, model, in that order."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ownpath.assembly import load_part
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.config import EngineConfig, ModelConfig
from ownpath.formats import CacheFormat
from ownpath.kernels.exchange.layout import SHARE_MULTIPLE, WindowLayout
from ownpath.model.build import ALONE
from ownpath.model.model import Model
from ownpath.official import PLAIN, Step
from ownpath.plan.exports import drawn_checkpoint
from ownpath.plan.facts import rank_facts
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Caps, Demands
from ownpath.plan.sharding import ShardingError
from ownpath.plan.tiling import tiling_faults
from ownpath.ranks.peers import Peers
from ownpath.ranks.start import phase, require_same
from ownpath.runners.window import expert_layout
from ownpath.splits import AttentionSplit
from ownpath.weights.load import find_lossless_casts
from ownpath.weights.readers import LoadProgress

if TYPE_CHECKING:  # needs triton
    from ownpath.kernels.exchange.window import Window

WindowOpener = Callable[[WindowLayout], "Window"]
"""Opens this rank's window; every rank calls it."""


def default_model_dir() -> Path:
    """Returns the folder of the embedded model, ``assets/tiny-v4``."""
    return Path(str(files("ownpath"))) / "assets" / "tiny-v4"


def leave_a_core(num_ranks: int = 1) -> None:
    """Limits torch to all cores but one (at least one), for the whole process; entry points call it once. Ranks of one
    host share them.

    Torch's threads spin while they wait for each other. With as many threads as cores, any other running code (the
    HTTP server, another process) stalls all of them: on two cores, decode of the embedded model fell from 39 to
    7 tokens/s.
    """
    torch.set_num_threads(max(1, ((os.cpu_count() or 2) - 1) // num_ranks))


def device_caps(device: str) -> Caps:
    """Returns the capabilities of ``device``. Errors: ValueError when torch does not know it or it is absent."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one torch knows") from None
    if parsed.type == "cpu":
        return Caps("cpu", "CPU")
    if parsed.type != "cuda":
        raise ValueError(f"device {device!r}: ownpath runs on cpu and cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no CUDA device here")
    major, minor = torch.cuda.get_device_capability(parsed)
    return Caps("cuda", torch.cuda.get_device_name(parsed), 10 * major + minor, _packages())


def planned_caps(device: str) -> Caps:
    """Returns the capabilities of ``device``, or, for a name such as ``sm_100``, those of a GPU that need not be here.

    Errors: as ``device_caps``.
    """
    named = re.fullmatch(r"sm_(\d{2,3})", device)
    return device_caps(device) if named is None else Caps("cuda", device, int(named[1]), _packages())


def _packages() -> frozenset[str]:
    """Returns the kernel toolchains that can be imported here."""
    return frozenset(name for name in ("triton",) if find_spec(name) is not None)


def plan_model(
    folder: Path,
    device: str,
    *,
    batch_invariant: bool = False,
    official: frozenset[Step] = PLAIN,
    loads_draft: bool = False,
    reference: frozenset[str] = frozenset(),
    cache_format: CacheFormat = CacheFormat.BF16,
) -> Plan:
    """Plans the checkpoint in ``folder`` with a device's default engine configuration, from headers alone.

    device: a torch device, or ``sm_100`` and the like for a GPU that need not be here.
    loads_draft: plan the MTP modules too. reference, cache_format: see ``EngineConfig``.
    Errors: as ``make_plan`` and ``ModelConfig``.
    """
    caps = planned_caps(device)  # before torch, for a clearer error about the device's name
    engine_config = replace(
        EngineConfig.for_device(caps.device_type),
        is_batch_invariant=batch_invariant,
        official=official,
        loads_draft=loads_draft,
        reference=reference,
        cache_format=cache_format,
    )
    return planned(folder, engine_config, caps)[0]


def planned_ranks(
    folder: Path, engine_config: EngineConfig, caps: Caps | None = None
) -> tuple[list[Plan], CheckpointIndex]:
    """Returns the plans of all ranks that run the checkpoint together, and its index, from headers alone.

    Errors: as ``planned``; ShardingError naming a tensor that the ranks together do not hold.
    """
    parallel = engine_config.parallel
    first, index = planned(folder, replace(engine_config, parallel=replace(parallel, rank=0)), caps)
    others = (replace(parallel, rank=rank) for rank in range(1, parallel.size))
    drafts = engine_config.loads_draft
    plans = [first]
    plans += (make_plan(first.config, index, first.caps, first.demands, loads_draft=drafts, parallel=r) for r in others)
    faults = tiling_faults(plans)
    if faults:
        raise ShardingError(f"{faults[0]}; {len(faults)} tensors are not held as they should")
    return plans, index


def load_model(
    folder: Path,
    engine_config: EngineConfig,
    progress: LoadProgress | None = None,
    peers: Peers | None = None,
    open_window: "WindowOpener | None" = None,
) -> Model:
    """Loads the checkpoint in ``folder`` as its plan says.

    progress: called a few times a second with the bytes loaded and their total. peers: the ranks that run the model
    together, as many as ``engine_config.parallel`` says; each of them loads its part. open_window: opens this rank's,
    if the plan has kernels that push into the others'; called by all ranks at once.
    Errors: ConfigError, CheckpointError or PlanError (all ValueError), naming the file, field, tensor or op; RankFailed
        with another rank's; RanksDiffer naming a rank that is about to run something else.
    """
    parallel, peers = engine_config.parallel, peers or ALONE
    if (peers.rank, peers.size) != (parallel.rank, parallel.size):
        wanted, found = f"rank {parallel.rank} of {parallel.size}", f"rank {peers.rank} of {peers.size}"
        raise ValueError(f"the settings are those of {wanted}, and this is {found}")
    with phase(peers, "plan"):
        plan, index = planned(folder, engine_config)
        if engine_config.max_model_len > plan.config.max_position_embeddings:
            limit = f"max_position_embeddings {plan.config.max_position_embeddings}"
            raise ValueError(f"max_model_len {engine_config.max_model_len} exceeds {folder / 'config.json'}: {limit}")
    if peers.size > 1:
        require_same(peers, rank_facts(plan, index))
    with phase(peers, "load"):
        window = planned_window(plan, engine_config, open_window)
        part = load_part(plan, index, engine_config, progress, peers=peers, window=window)
    casts, contradictions = part.weights.lossless_casts, plan.contradictions
    return replace(part.builder.model(), lossless_casts=casts, contradictions=contradictions)


def planned_window(plan: Plan, engine_config: EngineConfig, open_window: WindowOpener | None) -> "Window | None":
    """Opens this rank's window if the plan has kernels that push into the others'; all ranks call it at once."""
    if open_window is None or not any(one.choice.kernel.is_pushed for one in plan.companions):
        return None
    return open_window(window_layout(plan, engine_config))


def window_layout(plan: Plan, engine_config: EngineConfig) -> WindowLayout:
    """Returns the layout of windows with room for the sums of any step, and for the logits of a row at least: of more
    than it has room for, some go at a time. By data also for the rows of any step with their experts and weights."""
    config, size = plan.config, plan.parallel.size
    num_rows = engine_config.max_prefill_tokens + engine_config.max_num_seqs
    logits = 2 * -(-config.vocab_size // size)  # in words of 16 bits
    most = -(-max(num_rows * config.hidden_size, logits) // SHARE_MULTIPLE) * SHARE_MULTIPLE
    if plan.parallel.attention is AttentionSplit.HEADS:
        return WindowLayout(size, most)
    rows = expert_layout(size, config.hidden_size, num_rows, config.num_experts_per_tok)
    return WindowLayout(size, max(most, rows.max_elements), row_elements=rows.row_elements)


def lossless_casts(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Returns the slots whose NVFP4 weights were cast from MXFP4 without loss, judged by their scales on disk."""
    return find_lossless_casts(plan, CheckpointIndex.open(folder))


def planned(folder: Path, engine_config: EngineConfig, caps: Caps | None = None) -> tuple[Plan, CheckpointIndex]:
    """Returns the plan of the checkpoint in ``folder`` and its index, from headers alone; where weights are drawn, of
    its config.json as NVIDIA's export has it. caps: of the engine's device.

    Errors: ConfigError, CheckpointError, PlanError, naming the file, field, tensor or op.
    """
    caps = caps or device_caps(engine_config.device)
    config = ModelConfig.from_file(folder / "config.json")
    drafts = engine_config.loads_draft
    draws = engine_config.draws_weights
    index = drawn_checkpoint(config, with_drafts=drafts) if draws else CheckpointIndex.open(folder)
    dtype = str(engine_config.dtype).removeprefix("torch.")
    asked = engine_config.official, engine_config.reference, engine_config.cache_format
    demands = Demands(dtype, engine_config.is_batch_invariant, *asked)
    return make_plan(config, index, caps, demands, loads_draft=drafts, parallel=engine_config.parallel), index
