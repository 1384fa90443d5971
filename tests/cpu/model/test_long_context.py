"""A decode step at 128k tokens of context beside the torch reference, layer by layer over the same caches."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ownpath.attention.decode import PagedAttention
from ownpath.cache.pools import CachePool
from ownpath.cache.tables import StepTables
from ownpath.config import EngineConfig
from ownpath.loading import default_model_dir, load_model
from ownpath.model.model import Model

CONTEXT = 131072
LENGTHS = (CONTEXT - 1, CONTEXT - 257, 100_003)
"""A full context; one whose last block and windows end with this row; one in the middle of a window."""
SCALES = (1.0, 0.3, 2.0)
NUM_STEPS, BF16_ROUND, FLOAT32_WALK = 10, 2**-9, 2048**0.5 * 2**-24
"""Operations of a layer; the error of rounding once; that of a sum of up to 2,048 terms, as a random walk."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Model:
    """The embedded model, told that it reads 128k."""
    folder: Path = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(default_model_dir(), folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_model(folder, EngineConfig(str(device), dtype, CONTEXT, max_num_seqs=len(LENGTHS)))


def fill(pool: CachePool, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(7)
    for tensor in pool.tensors.values():
        tensor.normal_(generator=generator)


@torch.inference_mode()
def test_every_layer_is_close_to_the_reference(model: Model, device: torch.device) -> None:
    """A layer has about ten operations behind each other. In float32 they differ by the order of sums alone; in BF16
    they round at different places. A key missed or an angle off by a token moves a row by a tenth and more."""
    paged, pool, caches = model.paged, model.caches, [model.new_cache() for _ in LENGTHS]
    assert isinstance(paged, PagedAttention)
    tolerance = NUM_STEPS * (BF16_ROUND if model.cache_spec.dtype is torch.bfloat16 else FLOAT32_WALK)
    for cache, length in zip(caches, LENGTHS, strict=True):
        cache.num_tokens = length
    tables = StepTables.of(caches, [1] * len(caches))
    assert tables.decode is not None
    generator = torch.Generator(device).manual_seed(8)
    rows = torch.randn(len(LENGTHS), model.config.hidden_size, generator=generator, device=device)
    x_TD = (rows * torch.tensor(SCALES, device=device)[:, None]).to(model.cache_spec.dtype)
    for block, ratio in zip(model.blocks, model.config.compress_ratios, strict=False):
        fill(pool, device)
        step = paged.prepare_decode(tables.decode)
        sliding, compress = step.rotations
        found = block.attn(x_TD, compress if ratio else sliding, step)
        fill(pool, device)
        rope = model.compress_rope if ratio else model.sliding_rope
        wanted = block.attn(x_TD, rope.at(tables.positions_T), paged.reference.prepare(tables)).double()
        errors = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert errors.max() < tolerance, (ratio, errors.tolist())
    for cache in caches:
        cache.release()
