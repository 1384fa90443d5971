"""Compiles everything before the first request on CUDA, so that no step waits for a compiler.

It compiles the kernels that the cache on disk lacks. Then it runs a few steps on scratch caches, which compiles what
Triton compiles at a first call, and lets the libraries load and allocate. A step takes most of a second the first time,
so there is one for each form that Triton's kernels have, and one of the largest size.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ownpath.cache.layout import BLOCK_TOKENS
from ownpath.config import EngineConfig
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import compile_missing
from ownpath.kernels.dsl.compilations import COMPILATIONS
from ownpath.kernels.exchange.layout import SHARE_MULTIPLE
from ownpath.kernels.registry import KERNELS
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.runners import Runner
from ownpath.runners.make import compile_configs
from ownpath.terminal.progress import Progress
from ownpath.terminal.text import counted

if TYPE_CHECKING:
    from ownpath.kernels.exchange.window import Window

WARM_UP_SLOT = "the start"
"""The name of exchanges that warm up."""
LAST_TOKENS = 2
"""Tokens of a step that is tried for its context: more than one, as a step of chunks has."""
SCORED_ROWS = 257
"""Rows of the largest step that are scored: one more than the last form but one has."""
WARM_UP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
"""A number of tokens for each form but the last: up to 1, 2, 4, 8, 16, 32, 64, 256, 1,023. A test holds that there are
no others."""


def compile_kernels(runners: Iterable[Runner], others: Iterable[Config] = ()) -> int:
    """Compiles the kernels that the runners may launch, and others, if the cache on disk lacks them; returns how many.

    Errors: CompileError naming the compiler.
    """
    with Progress("compiling kernels") as progress:
        return compile_missing([*compile_configs(runners), *others], progress)


def warm_up(model: Model, engine: EngineConfig) -> None:
    """Runs a step of each of ``warm_up_sizes``, and one of a few tokens behind each of ``warm_up_contexts``, so that no
    later step compiles anything; then clears the ledger."""
    contexts = warm_up_contexts(min(engine.max_model_len, BLOCK_TOKENS * model.caches.slots.num_blocks))
    steps = [*((size, 0) for size in warm_up_sizes(engine)), *((LAST_TOKENS, start) for start in contexts)]
    COMPILATIONS.watch_triton()
    with Progress("warming up") as progress:
        for done, (num_tokens, start) in enumerate(steps):
            progress(done, len(steps), counted(start + num_tokens, "token"))
            _step(model, engine, num_tokens, start)
        if model.window is not None:
            progress(len(steps), len(steps), "exchanges")
            warm_up_exchanges(model.window)
        if torch.device(engine.device).type == "cuda":
            torch.cuda.synchronize()
    model.ledger.clear()


def warm_up_exchanges(window: "Window") -> None:
    """Runs the pushed kernels in every form that exchanges of up to the window's size have; all ranks do at once. Forms
    go by the elements that a program has."""
    layout, block = window.layout, SHARE_MULTIPLE
    reduce, gather = (KERNELS[name] for name in ("triton.reduce", "triton.gather"))
    reducing, gathering = reduce.prepare(window), gather.prepare(window)
    while True:
        num_rows = min(block * layout.num_programs, layout.max_elements) // SHARE_MULTIPLE
        x = torch.zeros(num_rows, SHARE_MULTIPLE, dtype=torch.bfloat16, device=window.words.device)
        for other in (None, x):
            window.note(WARM_UP_SLOT)
            reduce.run(x, reducing, other)
        window.note(WARM_UP_SLOT)
        gather.run(x.view(torch.float32), gathering, dim=-1)
        if layout.share(layout.max_elements) <= block:
            return
        block *= 2


def warm_up_sizes(engine: EngineConfig) -> list[int]:
    """Returns the numbers of tokens to run: one for each form below the largest step, and the largest step."""
    largest = min(engine.max_prefill_tokens + engine.max_num_seqs, engine.max_model_len)
    return sorted({size for size in WARM_UP_TOKENS if size < largest} | {largest})


def warm_up_contexts(most: int) -> list[int]:
    """Returns where a step of ``LAST_TOKENS`` begins in each context: of two blocks, of twice as many each time, and of
    ``most`` tokens. Selections have a form for each power of two of the scores that the longest row of a step may
    have."""
    ends, end = list[int](), 2 * BLOCK_TOKENS
    while end < most:
        ends.append(end)
        end *= 2
    return [end - LAST_TOKENS for end in (*ends, most) if end > BLOCK_TOKENS]


def _step(model: Model, engine: EngineConfig, num_tokens: int, start: int = 0) -> None:
    """start: of the first token; what lies before it is whatever the caches hold."""
    token_ids, sequence = (
        [idx % model.config.vocab_size for idx in range(num_tokens)],
        model.new_cache(start + num_tokens),
    )
    sequence.num_tokens = start
    # As a prompt's log-probs do: what follows the last layer has the forms of the rows that are scored.
    batch = ForwardBatch.of([(token_ids, sequence)], engine.device, all_logits=True)
    scored = replace(batch, logits_ids=batch.logits_ids[-SCORED_ROWS:])
    if not model.drafts:
        model.forward(scored)
        return
    _, hidden = model.forward_drafting(scored)
    model.draft_forward(hidden, batch.token_ids_T, batch, batch.logits_ids[-1:])
