"""A kernel that the plan calls batch-invariant gives a token the same bits, whatever other tokens run with it."""

from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.config import EngineConfig
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.registry import KERNELS
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch

pytestmark = pytest.mark.gpu

SIZES = (2, 5, 16, 17, 33, 64, 65, 129, 1024)


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir(), is_batch_invariant=True)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_linear(out_dtype: torch.dtype, cuda: torch.device) -> None:
    kernel = KERNELS["triton.plain_linear_invariant"]
    generator = torch.Generator(cuda).manual_seed(0)
    x = torch.randn(max(SIZES), 4096, generator=generator, device=cuda).bfloat16()
    weight = torch.randn(320, 4096, generator=generator, device=cuda).bfloat16()
    alone = kernel(x[:1], weight, out_dtype)
    for size in SIZES:
        assert torch.equal(kernel(x[:size], weight, out_dtype)[:1], alone), size
    exact = x.double() @ weight.double().T
    bound = torch.finfo(out_dtype).eps / 2 * exact.abs() + 4096 * torch.finfo(torch.float32).eps * (
        x.double().abs() @ weight.double().abs().T
    )
    assert ((kernel(x, weight, out_dtype).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("place", [0, 7])
def test_a_sequence_decodes_to_the_same_bits_in_company(place: int, cuda: torch.device) -> None:
    """Logits of every step, alone and as one of eight: equal bit by bit."""
    config = EngineConfig(str(cuda), torch.bfloat16, 512, is_batch_invariant=True)
    model = load_model(default_model_dir(), config)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 2000, (20 + 3 * idx,), generator=generator).tolist() for idx in range(8)]
    alone, caches = model.new_cache(), [model.new_cache() for _ in prompts]
    for prompt, cache in zip([*prompts, prompts[place]], [*caches, alone], strict=True):
        model.forward(ForwardBatch.of([(prompt, cache)], cuda))
    for token_id in torch.randint(2, 2000, (24,), generator=generator).tolist():
        expected = model.forward(ForwardBatch.of([([token_id], alone)], cuda))
        found = model.forward(ForwardBatch.of([([token_id], cache) for cache in caches], cuda))
        assert torch.equal(found[place], expected[0])
