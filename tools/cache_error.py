"""Measures what the caches' formats change in the log-probs of the embedded model, on a CPU.

    python tools/cache_error.py [--positions 640] [MODEL]

The text of ``ownpath verify`` runs once for each dtype of activations and format of the caches. Every log-prob of every
position is compared with those in float64, without rounded keys. Decode steps compute what prompts do.
"""

import argparse
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch

from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.formats import CacheFormat
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.official import PLAIN, Step
from ownpath.verify.layers.text import PARAGRAPH


@dataclass(frozen=True)
class CacheCase:
    """One way to compute the text. official: steps that round as the published code does."""

    name: str
    dtype: torch.dtype
    cache_format: CacheFormat
    official: frozenset[Step] = PLAIN

    def log_probs(self, folder: Path, token_ids: list[int]) -> torch.Tensor:
        """Computes log-probs of all positions, float64 [T, V]."""
        engine = EngineConfig(dtype=self.dtype, max_model_len=len(token_ids), max_num_seqs=1)
        model = load_model(folder, replace(engine, official=self.official, cache_format=self.cache_format))
        batch = ForwardBatch.of([(token_ids, model.new_cache())], "cpu", all_logits=True)
        return model.forward(batch).double().log_softmax(-1)


INDEXER = frozenset({Step.INDEXER})
EXACT = CacheCase("float64", torch.float64, CacheFormat.BF16)
CASES = (
    CacheCase("float32, bf16", torch.float32, CacheFormat.BF16),
    CacheCase("float32, fp8", torch.float32, CacheFormat.FP8),
    CacheCase("float32, fp4-index", torch.float32, CacheFormat.FP4_INDEX),
    CacheCase("bfloat16, bf16", torch.bfloat16, CacheFormat.BF16),
    CacheCase("bfloat16, fp8", torch.bfloat16, CacheFormat.FP8),
    CacheCase("bfloat16, fp4-index", torch.bfloat16, CacheFormat.FP4_INDEX),
    CacheCase("float32, bf16, indexer official", torch.float32, CacheFormat.BF16, INDEXER),
    CacheCase("float32, fp8, indexer official", torch.float32, CacheFormat.FP8, INDEXER),
    CacheCase("float32, fp4-index, indexer official", torch.float32, CacheFormat.FP4_INDEX, INDEXER),
)


def main() -> None:
    """Prints a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model_dir())
    parser.add_argument("--positions", type=int, default=640)
    args = parser.parse_args()
    token_ids = list(islice(cycle(Tokenizer.from_folder(args.model).encode_text(PARAGRAPH)), args.positions))
    exact_TV = EXACT.log_probs(args.model, token_ids)
    following_T = torch.tensor(token_ids[1:])
    print(f"{args.positions} positions, {exact_TV.shape[1]} tokens each; differences of log-probs from float64")
    print(f"{'':<38}{'mean':>10}{'next token':>12}{'largest':>10}{'same best':>11}")
    for case in CASES:
        found_TV = case.log_probs(args.model, token_ids)
        moved_TV = (found_TV - exact_TV).abs()
        of_text = moved_TV[:-1].gather(1, following_T[:, None]).mean()
        same = (found_TV.argmax(-1) == exact_TV.argmax(-1)).double().mean()
        print(f"{case.name:<38}{moved_TV.mean():>10.2e}{of_text:>12.2e}{moved_TV.max():>10.2e}{same:>11.4f}")


if __name__ == "__main__":
    main()
