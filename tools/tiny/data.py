"""Draws the training rows of every kind, in several processes. The rows do not depend on the number of processes."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random
from typing import Any

import torch

from tiny import corpus
from tiny.batches import Encoder, Rows, make_rows
from tiny.chat import Document

NUM_CHUNKS = 32


@dataclass(frozen=True)
class Source:
    """Documents of one maker, sorted into rows. kinds: the rows' kind and width, ascending."""

    make: Callable[[Random], Document]
    kinds: dict[str, int]
    num_documents: int


SOURCES = (
    Source(corpus.tools_document, {"tools": 512, "many tools": 768}, 64_000),
    Source(corpus.short_document, {"brief": 24, "short": 48}, 150_000),
    Source(corpus.request_document, {"request": 128}, 96_000),
    Source(corpus.long_document, {"long": 512}, 12_000),
    Source(corpus.middle_document, {"middle": 192}, 48_000),
)


def make_data(encoder: Encoder, seed: int, share: float) -> dict[str, Rows]:
    """Makes rows of each kind. share: of the full number of documents (less for a short trial)."""
    global _ENCODER
    _ENCODER = encoder
    jobs = [(source_idx, chunk, seed, share) for source_idx in range(len(SOURCES)) for chunk in range(NUM_CHUNKS)]
    found: dict[str, list[Any]] = {}
    # Forked before the process uses the GPU.
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        for chunk_rows in pool.map(_draw, jobs):
            for kind, arrays in chunk_rows.items():
                found.setdefault(kind, []).append(arrays)
    return {kind: _join(arrays) for kind, arrays in found.items()}


_ENCODER: Encoder


def _draw(job: tuple[int, int, int, float]) -> dict[str, tuple[Any, Any]]:
    """Draws one chunk of one source, as arrays: tensors passed between processes would keep files open."""
    source_idx, chunk, seed, share = job
    source = SOURCES[source_idx]
    num_documents = int(source.num_documents * share / NUM_CHUNKS)
    seed = seed + 10_000 * (source_idx + 1) + chunk
    rows = make_rows(_ENCODER, source.make, tuple(source.kinds.values()), num_documents, seed)
    return {kind: (r.ids.numpy(), r.role.numpy()) for kind, r in zip(source.kinds, rows, strict=True)}


def _join(arrays: list[tuple[Any, Any]]) -> Rows:
    ids, role = (torch.cat([torch.from_numpy(array) for array in column]) for column in zip(*arrays, strict=True))
    return Rows(ids, role)
