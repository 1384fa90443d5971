"""Runs the Hopper kernels once each on small shapes, and steps of the embedded model, for a checker of memory accesses.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tools/small_shapes.py
    python3 tools/hazards.py compute-sanitizer --tool racecheck python3 tools/small_shapes.py

(``make sanitize`` does both.) ``--parts experts fp8_experts`` runs those alone. Answers are compared elsewhere, in
tests/gpu; here they only have to be finite.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from ownpath.config import EngineConfig
from ownpath.conformance.attend import make_attend_inputs
from ownpath.conformance.chunks import make_chunk_inputs
from ownpath.conformance.quant_weights import DenseWeight, ExpertStacks, RoutedTokens, draw_rows, draw_weights
from ownpath.engine.decoder import Decoder
from ownpath.engine.rows import DecodeRow, StepRows
from ownpath.formats import MXFP4
from ownpath.kernels.attend.cases import CASES as ATTEND_CASES
from ownpath.kernels.chunks.cases import CASES as CHUNK_CASES
from ownpath.kernels.contract import Routing, StoredExperts
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.kernels.registry import KERNELS
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.qtensor import QuantTensor
from ownpath.runners import Fp8Linear, Nvfp4Linear, Nvfp4MoE

CUDA = torch.device("cuda")
LINEAR_SHAPES = ((192, 384), (256, 512), (1536, 512))
EXPERTS, HIDDEN, INTER, TOP_K = 6, 256, 128, 2
PROMPTS = (3, 126, 255)
"""Tokens of each row's prompt."""


def linears() -> Iterator[tuple[str, torch.Tensor]]:
    for rows, cols in LINEAR_SHAPES:
        for name in ("cute.nvfp4_linear", "cute.nvfp4_linear_invariant"):
            dense = DenseWeight.draw(rows, cols, CUDA)
            linear = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale, kernel=name)
            for num_tokens in (1, 13, 60, 130, 600):
                yield f"{name} {num_tokens} x {rows} x {cols}", linear(draw_rows(num_tokens, cols, 1.0, CUDA))


def experts() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("cute.nvfp4_moe", "cute.nvfp4_moe_invariant"):
        w13, scale_13, global_13, w2, scale_2, global_2 = ExpertStacks.draw(EXPERTS, HIDDEN, INTER, CUDA).tensors()
        moe = Nvfp4MoE(w13, scale_13, global_13, w2, scale_2, global_2, swiglu_limit=10.0, kernel=name)
        for num_tokens in (1, 9, 60, 300):
            routed = RoutedTokens.draw(num_tokens, HIDDEN, EXPERTS, TOP_K, CUDA)
            yield f"{name} {num_tokens} tokens", moe(routed.x, routed.ids, routed.weights)


def fp8_experts() -> Iterator[tuple[str, torch.Tensor]]:
    num_experts, hidden, inter = 8, 256, 512
    for name in ("cute.fp8_experts", "cute.fp8_experts_invariant"):
        w13, w2 = mxfp4(num_experts, 2 * inter, hidden), mxfp4(num_experts, hidden, inter)
        operand = KERNELS[name].prepare(StoredExperts(w13, w2, 10.0))
        for num_tokens in (1, 33, 300):
            routed = RoutedTokens.draw(num_tokens, hidden, num_experts, TOP_K, CUDA)
            yield (
                f"{name} {num_tokens} tokens",
                KERNELS[name].run(routed.x, Routing(routed.ids, routed.weights), operand),
            )


def mxfp4(num_experts: int, rows: int, cols: int) -> QuantTensor:
    """Draws the weights of some experts, of scales from 1/4096 to 1/512."""
    codes = torch.randint(0, 256, (num_experts, rows, cols // 2), dtype=torch.uint8, device=CUDA)
    exponents = torch.randint(115, 119, (num_experts, rows, cols // 32), dtype=torch.uint8, device=CUDA)
    return QuantTensor(codes, exponents.view(torch.float8_e8m0fnu), None, MXFP4)


def fp8() -> Iterator[tuple[str, torch.Tensor]]:
    linear = Fp8Linear(*draw_weights(Fp8Case("small", (320,), 512, "e8m0"), 0, CUDA))
    for num_tokens in (1, 40, 300):
        yield f"cute.fp8_linear_sm90 {num_tokens} tokens", linear(draw_rows(num_tokens, 512, 1.0, CUDA))


def attention() -> Iterator[tuple[str, torch.Tensor]]:
    """Tables and lists name rows far outside of the pools where a row's own have ended."""
    for case in (case for case in ATTEND_CASES if case.tiny):
        for name in ("cute.attend", "cute.attend_invariant", "triton.attend"):
            for num_rows, group in ((1, 1), (9, 1), (9, 4)):
                inputs = make_attend_inputs(case, num_rows, CUDA, group=group)
                yield f"{name} {case.label} {num_rows} rows, {group} a request", KERNELS[name](*inputs.arguments)


def attention_of_prompts() -> Iterator[tuple[str, torch.Tensor]]:
    """Memory of no request is NaN."""
    for case in CHUNK_CASES:
        if case.tiny or case.label.endswith((", mixed", ", mixed, fp8")):
            small = replace(case, rows=tuple(min(count, 9) for count in case.rows))
            inputs = make_chunk_inputs(small, CUDA)
            for name in ("gluon.attend_chunk", "triton.attend_chunk"):
                yield f"{name} {case.label}", KERNELS[name](*inputs.arguments)


def decode_steps() -> Iterator[tuple[str, torch.Tensor]]:
    """Steps of rows whose windows end, so that entries are written; three rows in a bucket of four."""
    model = load_model(default_model_dir(), EngineConfig("cuda", torch.bfloat16, 1024, max_num_seqs=len(PROMPTS)))
    caches = [model.new_cache() for _ in PROMPTS]
    for cache, count in zip(caches, PROMPTS, strict=True):
        model.forward(ForwardBatch.of([(list(range(5, 5 + count)), cache)], "cuda"))
    decoder = Decoder(model, 4, model.config.vocab_size)
    for step in range(2):
        with torch.inference_mode():
            found = decoder.step(StepRows.of([DecodeRow(cache, 9) for cache in caches]))
        yield f"decode step {step} of {len(PROMPTS)} rows", found.logits_TV


def several_rows() -> Iterator[tuple[str, torch.Tensor]]:
    """Eager decode steps with four rows of each request, of which three are taken back."""
    engine = EngineConfig("cuda", torch.bfloat16, 1024, max_num_seqs=len(PROMPTS), rows_per_request=4)
    model = load_model(default_model_dir(), engine)
    caches = [model.new_cache() for _ in PROMPTS]
    for cache, count in zip(caches, PROMPTS, strict=True):
        model.forward(ForwardBatch.of([(list(range(5, 5 + count)), cache)], "cuda"))
    for step in range(2):
        batch = ForwardBatch.of([([9, 8, 7, 6], cache) for cache in caches], "cuda", all_logits=True)
        yield f"decode step {step} of {len(PROMPTS)} requests, 4 rows each", model.forward(batch)
        for cache in caches:
            cache.num_tokens -= 3


def main() -> None:
    torch.manual_seed(0)
    parts = linears, experts, fp8_experts, fp8, attention, attention_of_prompts, decode_steps, several_rows
    known = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known), metavar="PART")
    for part in parser.parse_args().parts:
        for name, y in known[part]():
            torch.cuda.synchronize()
            assert torch.isfinite(y).all(), name
            print(name)


if __name__ == "__main__":
    main()
