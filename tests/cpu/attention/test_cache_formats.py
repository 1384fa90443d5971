"""The caches' formats in the model: FP8 pages and BF16, plain and official numerics, however steps are cut.

Prompts run on the attention reference and decode steps on the twins of the kernels, over one pool. A model in float64
leaves no room for a difference between them but a rounding at the edge of a code.
"""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import THREE_LAYERS, random_checkpoint

from ownpath.cache.layout import NAN_BYTE
from ownpath.cache.pools import CachePool
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.loading import load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.numerics import (
    FP4_INDEX_PAGES,
    INDEX_FORMS,
    KEY_PAGES,
    PageForm,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard,
    index_form,
)
from ownpath.official import PLAIN, Step

MAX_TOKENS = 300
CHUNKS = (100, 150, *[1] * 8)
"""The steps pass the ends of windows of 4 and of 128 tokens and of a block of 256, with more entries than are selected.
"""
FLOAT64_TOLERANCE = 1e-9
"""As in ``test_decode``."""
ATTENTION = frozenset({Step.KV, Step.INDEXER, Step.Q_HEAD_NORM})


SIZES = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
"""Those that FP8 pages are made for."""


@pytest.fixture(scope="module", params=[PLAIN, ATTENTION], ids=["plain", "official"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("formats")
    random_checkpoint(folder, "full-nvfp4", seed=9, **SIZES, **THREE_LAYERS)
    engine = EngineConfig(dtype=torch.float64, max_model_len=MAX_TOKENS, max_num_seqs=2, official=request.param)
    return load_model(folder, engine)


def new_pool(model: Model, cache_format: CacheFormat) -> CachePool:
    """A pool full of NaN."""
    pool = CachePool(replace(model.cache_spec, cache_format=cache_format))
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(NAN_BYTE)
    return pool


def in_chunks(model: Model, pool: CachePool, chunks: tuple[int, ...]) -> torch.Tensor:
    """The logits of all rows of one sequence, cut into chunks."""
    ids = torch.randint(0, 96, (sum(chunks),), generator=torch.Generator().manual_seed(3)).tolist()
    cache, device, logits = pool.new_sequence(), pool.spec.device, []
    for size in chunks:
        batch = ForwardBatch.of([(ids[cache.num_tokens : cache.num_tokens + size], cache)], device, all_logits=True)
        logits.append(model.forward(batch))
    return torch.cat(logits)


@pytest.mark.parametrize("cache_format", list(CacheFormat))
def test_chunks_and_decode_steps_equal_one_shot(model: Model, cache_format: CacheFormat) -> None:
    before = model.ledger.calls["layers.1.attn.decode.attend"]
    whole = in_chunks(model, new_pool(model, cache_format), (sum(CHUNKS),))
    found = in_chunks(model, new_pool(model, cache_format), CHUNKS)
    assert model.ledger.calls["layers.1.attn.decode.attend"] == before + CHUNKS.count(1)
    assert bool(found.isfinite().all())
    assert (found - whole).abs().max() < FLOAT64_TOLERANCE


@pytest.mark.parametrize("model", [ATTENTION], ids=["official"], indirect=True)
def test_under_official_numerics_all_formats_have_the_same_bits(model: Model) -> None:
    """Pages hold the keys that ``kv`` and ``indexer`` round to; rotary channels are BF16 where activations are."""
    narrow = replace(model, cache_spec=replace(model.cache_spec, dtype=torch.bfloat16))
    expected, *found = (in_chunks(narrow, new_pool(narrow, cache_format), CHUNKS) for cache_format in CacheFormat)
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)


def keys_of_steps() -> torch.Tensor:
    """Keys of several magnitudes, some of them zeros, as activations in BF16."""
    g = torch.Generator().manual_seed(5)
    keys = torch.randn(64, 512, generator=g) * 10 ** (4 * torch.rand(64, 1, generator=g) - 2)
    keys[0], keys[1, :64] = 0, 0
    return keys.bfloat16()


def test_pages_keep_what_official_numerics_round_to() -> None:
    keys, rows = keys_of_steps(), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    official = torch.cat((fake_quantize_fp8(keys[:, :448], 64), keys[:, 448:]), 1)
    pages = torch.full((2, 32 * 584), NAN_BYTE, dtype=torch.uint8)
    KEY_PAGES.write(pages, rows, official)
    assert torch.equal(KEY_PAGES.read(pages, rows, torch.bfloat16), official)
    assert torch.equal(KEY_PAGES.rounded(keys), official), "pages round as the step kv does"
    assert torch.equal(KEY_PAGES.rounded(official), official)


@pytest.mark.parametrize("form", INDEX_FORMS.values(), ids=INDEX_FORMS.keys())
@pytest.mark.parametrize("count", [0, 1, 64])
def test_index_pages_keep_fp4_exactly(count: int, form: PageForm) -> None:
    keys = fake_quantize_fp4(hadamard(keys_of_steps()[:count, :128]), 32)
    pages, rows = torch.full((1, 64 * form.key_bytes), NAN_BYTE, dtype=torch.uint8), torch.arange(count)
    form.write(pages, rows, keys)
    assert torch.equal(form.read(pages, rows, torch.bfloat16), keys)
    assert bool(form.read(pages, torch.arange(count, 64), torch.float64).isnan().all())
    assert index_form(pages, 64) is form


def test_fp4_pages_round_as_the_step_does() -> None:
    """Keys of all sizes, in the step's values; a block that is not finite is NaN, and no other."""
    keys = keys_of_steps()[:, :128].double()
    keys[5, 40] = torch.inf
    found = FP4_INDEX_PAGES.rounded(keys)
    assert torch.equal(found.nan_to_num(7.5), fake_quantize_fp4(keys, 32).nan_to_num(7.5))
    assert found.isnan().nonzero().tolist() == [[5, channel] for channel in range(32, 64)]


def test_an_fp4_page_is_laid_out_as_described() -> None:
    """Codes of key 1, two to a byte, the even channel low; then four scales of each key."""
    key = torch.zeros(1, 128)
    key[0, :8] = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -3.0, 4.0, -6.0])
    key[0, 32], key[0, 127] = 12.0, -0.375
    pages = torch.full((1, 2 * 68), NAN_BYTE, dtype=torch.uint8)
    FP4_INDEX_PAGES.write(pages, torch.tensor([1]), key)
    codes, scales = pages[0, :128].view(2, 64), pages[0, 128:].view(2, 4)
    assert codes[1, :4].tolist() == [0x10, 0x32, 0xD4, 0xF6]
    assert (int(codes[1, 16]), int(codes[1, 63])) == (0x07, 0xF0)
    assert scales[1].tolist() == [127, 128, 127, 123], "6 = 6 * 2^0, 12 = 6 * 2^1, zeros 2^0, 0.375 = 6 * 2^-4"
    assert bool((codes[0] == NAN_BYTE).all() & (scales[0] == NAN_BYTE).all()), "nor another key"


def test_pages_of_no_known_form_are_refused() -> None:
    with pytest.raises(ValueError, match="a page of 64 index keys has 132 or 68 bytes a key, found 6400 in all"):
        index_form(torch.zeros(1, 6400, dtype=torch.uint8), 64)


def test_a_page_is_laid_out_as_published() -> None:
    """One key of ones times its row, byte by byte: codes, rotary channels, then all scales."""
    pages = torch.full((2, 2 * 584), NAN_BYTE, dtype=torch.uint8)
    KEY_PAGES.write(pages, torch.tensor([3]), torch.full((1, 512), 1.5))
    page = pages[1]
    one_and_a_half = 0x7C  # 1.5 = 384 * 2^-8: exponent 15, mantissa 4
    assert page[576 : 576 + 448].tolist() == [one_and_a_half] * 448
    assert page[576 + 448 : 1152].view(torch.bfloat16).tolist() == [1.5] * 64
    assert page[1160:1167].tolist() == [127 - 8] * 7, "2^-8 is the smallest power of two with 1.5 <= 448 * it"
    assert bool((pages[0] == NAN_BYTE).all()), "no other page is written"
    assert bool((page[:576] == NAN_BYTE).all()), "nor another key"
