"""Measures the effect of rounding alone on the oracle, and writes ``src/ownpath/verify/budgets.json``.

    python tools/measure_budgets.py [--quick] [--out FILE]

Each case is a checkpoint and token ids. The float64 oracle runs them, and every layer is computed again in each
arithmetic, from the same streams (rounded to an engine's dtype) and with the same choices of experts and index entries.
The relative L2 distance of every slot's result is recorded. Logits of the longer sequences are compared at the end of a
whole forward, on each arithmetic's own choices.

Random checkpoints have random input scales. W4A4 takes 100 / 2688 for all of them instead: two numbers clamped at 10
multiply to at most 100, and the norms' outputs are smaller, so that nothing saturates, as after a calibration.
"""

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.checkpoints import LAYOUTS, random_checkpoint

from ownpath.chat.tokenizer import Tokenizer
from ownpath.checkpoint.schema import Encoding
from ownpath.config import EngineConfig
from ownpath.formats import FP8_BLOCK, NVFP4
from ownpath.loading import default_model_dir
from ownpath.official import OFFICIAL
from ownpath.oracle.arithmetic import Arithmetic
from ownpath.oracle.block import Choices
from ownpath.oracle.forward import reference_logits
from ownpath.oracle.weights import StoredWeights
from ownpath.verify.budgets import PATH, kind_of
from ownpath.verify.layers.oracle import Oracle
from ownpath.verify.subject import Subject

BF16 = Arithmetic(torch.float32, torch.bfloat16)
MODES = {
    "float32": Arithmetic(torch.float32),
    "bfloat16": BF16,
    "bfloat16+w4a4": replace(BF16, w4a4=True),
    "bfloat16+w8a8": replace(BF16, w8a8=True),
    "bfloat16+official": replace(BF16, official=OFFICIAL),
}
"""Name -> the arithmetic that is compared with the same one in float64."""

WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128],
    "num_attention_heads": 8,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 512,
    "o_lora_rank": 256,
    "n_routed_experts": 4,
    "moe_intermediate_size": 1024,
    "index_head_dim": 128,
}
"""Sizes whose sums are as long as those of published models, within a factor of four."""
TEXTS = (
    "The capital of France is Paris. Repeat: apple river stone. What is 2 + 3?\n" * 12,
    "def add(a, b):\n    return a + b\n\nLa nuit tombe sur la ville; 東京は晴れ。 17 * 23 = 391.\n" * 8,
)
LENGTHS = (9, 130, 400)
MIN_LOGITS = 100
"""With fewer positions, the share of changed best tokens means nothing."""
NO_SATURATION = 100 / 2688
Noise = dict[str, dict[str, list[float]]]
"""Mode -> kind, or field of ``LogitBudget`` -> every measured value."""


class UnsaturatedStored(StoredWeights):
    """A random checkpoint with input scales as after calibration."""

    def input_scale(self, module: str, encoding: Encoding) -> Tensor | None:
        """Returns the same input scale for all modules."""
        found = super().input_scale(module, encoding)
        return None if found is None else torch.full_like(found, NO_SATURATION)


@dataclass(frozen=True)
class Case:
    """A checkpoint and a sequence for it."""

    name: str
    subject: Subject
    reader: type[StoredWeights]
    token_ids_T: Tensor

    def oracle(self, how: Arithmetic) -> Oracle:
        """Returns the oracle that computes this case in one arithmetic."""
        stored = self.reader(self.subject.index, self.subject.device, how.dtype)
        return Oracle(self.subject, stored, how, tuple(self.token_ids_T.tolist()))

    def modes(self) -> Iterator[str]:
        """The modes that differ on this checkpoint."""
        formats = {op.encoding.format for op in self.subject.plan.ops}
        needed = {"bfloat16+w4a4": NVFP4, "bfloat16+w8a8": FP8_BLOCK}
        return (mode for mode in MODES if mode not in needed or needed[mode] in formats)


def random_ids(count: int, vocab_size: int, seed: int) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def random_case(folder: Path, layout: str, seed: int, length: int, device: str, **changes: Any) -> Case:
    """Returns a random checkpoint's case; writes the checkpoint unless it is there."""
    at = folder / f"{layout}-{seed}-{'-'.join(changes)}"
    if not at.exists():
        random_checkpoint(at, layout, seed=seed, **changes)
    subject = Subject.of(at, EngineConfig.for_device(device))
    ids = random_ids(length, subject.config.vocab_size, 100 * seed + length)
    return Case(f"{at.name}, {length} tokens", subject, UnsaturatedStored, ids)


def cases(folder: Path, device: str, is_quick: bool) -> Iterator[Case]:
    """Yields random checkpoints of every layout, wide ones, and the embedded model."""
    for layout in LAYOUTS:
        for seed in range(1 if is_quick else 3):
            for length in LENGTHS[:1] if is_quick else LENGTHS:
                yield random_case(folder, layout, seed, length, device)
    subject = Subject.of(default_model_dir(), EngineConfig.for_device(device))
    tokenizer = Tokenizer.from_folder(default_model_dir())
    for number, text in enumerate(TEXTS):
        for length in LENGTHS[:1] if is_quick else LENGTHS:
            ids = torch.tensor(tokenizer.encode_text(text)[:length])
            yield Case(f"tiny-v4, text {number}, {len(ids)} tokens", subject, StoredWeights, ids)
    if not is_quick:
        yield random_case(folder, "full-nvfp4", 7, 400, device, index_topk=16)
        for layout in ("full-nvfp4", "deepseek-native"):
            yield random_case(folder, layout, 8, 260, device, **WIDE)


def distance(found: Tensor, exact: Tensor) -> float:
    """Computes the relative L2 distance over finite values (index scores of entries that do not exist yet are not)."""
    exact, found = exact.double(), found.double()
    kept = exact.isfinite()
    size = exact[kept].norm()
    return float((found - exact)[kept].norm() / size) if size > 0 else 0.0


def measure(case: Case, blocks: Noise, logits: Noise) -> None:
    """Adds one case's distances, layer by layer and at the end."""
    for mode in case.modes():
        arithmetic = MODES[mode]
        rounding, exact = case.oracle(arithmetic), case.oracle(replace(arithmetic, dtype=torch.float64, narrow=None))
        x_TSD = exact.embed()
        for layer_idx in range(case.subject.config.num_hidden_layers):
            for kind, value in block_noise(rounding, exact, layer_idx, x_TSD).items():
                blocks[mode][kind].append(value)
            x_TSD = exact.block(layer_idx, x_TSD).streams_TSD
        last_TSD = round_streams(x_TSD, arithmetic)
        blocks[mode]["head"].append(distance(rounding.head(last_TSD), exact.head(last_TSD)))
        if len(case.token_ids_T) >= MIN_LOGITS:
            found = reference_logits(case.subject.plan, rounding.stored, case.token_ids_T, arithmetic)
            for name, value in logit_noise(found, exact.head(x_TSD), case.token_ids_T).items():
                logits[mode][name].append(value)


def round_streams(x_TSD: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Rounds streams to an engine's dtype."""
    return x_TSD.to(arithmetic.narrow or arithmetic.dtype).double()


def block_noise(rounding: Oracle, exact: Oracle, layer_idx: int, x_TSD: Tensor) -> dict[str, float]:
    """Computes distances by kind in one layer, from streams rounded to an engine's dtype."""
    given, name = round_streams(x_TSD, rounding.arithmetic), f"layers.{layer_idx}"
    wanted = exact.block(layer_idx, given).values
    ids, mask = (wanted.get(f"{name}.{choice}") for choice in ("ffn.router.ids", "attn.indexer.mask"))
    found = rounding.block(layer_idx, given, Choices(ids, mask)).values
    return {
        kind_of(slot): distance(found[slot], value)
        for slot, value in wanted.items()
        if value.is_floating_point() and value.numel()
    }


def logit_noise(found: Tensor, exact: Tensor, token_ids_T: Tensor) -> dict[str, float]:
    """Computes the numbers of ``LogitBudget`` for one text."""
    p, q = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    following = token_ids_T[1:, None]
    nll = [-float(side[:-1].gather(1, following).mean()) if len(following) else 0.0 for side in (p, q)]
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "top1_changed": float((p.argmax(-1) != q.argmax(-1)).double().mean()),
        "nll": abs(nll[1] - nll[0]),
    }


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Returns the largest value, the median and the count, rounded up to three digits."""
    assert all(math.isfinite(value) for value in values), name
    return {"largest": upwards(max(values)), "median": upwards(statistics.median(values)), "count": len(values)}


def upwards(value: float) -> float:
    """Rounds up to three digits."""
    if value <= 0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / digit) * digit:.3g}")


def summary(noise: Noise) -> dict[str, dict[str, dict[str, float]]]:
    """Returns mode -> kind -> spread."""
    return {
        mode: {kind: spread(values, kind) for kind, values in sorted(kinds.items())} for mode, kinds in noise.items()
    }


def as_text(written: Mapping[str, Any]) -> str:
    """Formats the file, with a line for each spread."""
    return re.sub(r"\{\s+(\"largest\"[^}]*?)\s+\}", _on_one_line, json.dumps(written, indent=1)) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"


def main() -> int:
    """Measures all cases and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few short cases, to see that it runs")
    args = parser.parse_args()
    blocks: Noise = defaultdict(lambda: defaultdict(list))
    logits: Noise = defaultdict(lambda: defaultdict(list))
    names = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for case in cases(Path(folder), args.device, args.quick):
            print(case.name, flush=True)
            measure(case, blocks, logits)
            names.append(case.name)
    written: Mapping[str, Any] = {
        "written_by": "tools/measure_budgets.py",
        "measured": "relative L2 distance of one layer's results from float64, same streams, same choices",
        "measured_logits": "a whole forward's logits against float64's, each on its own choices; kl and nll in nats",
        "torch": torch.__version__,
        "device": args.device,
        "cases": names,
        "blocks": summary(blocks),
        "logits": summary(logits),
    }
    args.out.write_text(as_text(written), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
