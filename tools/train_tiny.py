"""Trains tiny-v4 on one GPU.

    PYTHONPATH=src python tools/train_tiny.py --out runs/tiny-v4

Writes into ``--out``: ``trained-0.safetensors`` ... (the weights before quantisation, under transformers' names, in
the dtypes of the checkpoint), ``tokenizer.json``, ``curve.json`` (recipe and loss curve) and ``exam.json`` (scores
of the quantised weights, teacher-forced). ``tools/export_tiny.py`` makes the checkpoint from these.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tiny import corpus
from tiny.batches import Encoder, Rows, make_rows
from tiny.exam import questions
from tiny.forced import teacher_forced_scores
from tiny.network import FIELDS, build_network
from tiny.tokens import train_tokenizer
from tiny.train import Recipe, Trainer
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_FILE_BYTES = 15 * 2**20
NUM_TOKENIZER_DOCUMENTS = 40_000
SECONDS_AFTER = 15.0  # the examination and the saving, when --minutes is given
NUM_DOCUMENTS = {"short": 150_000, "middle": 16_000, "long": 8_000}


def make_tokenizer(seed: int) -> Tokenizer:
    return train_tokenizer(list(corpus.tokenizer_texts(random.Random(seed), NUM_TOKENIZER_DOCUMENTS)))


def make_data(encoder: Encoder, seed: int, share: float) -> dict[str, Rows]:
    """Rows of the four widths; ``share`` of the full number of documents (less for a short trial)."""
    num = {kind: int(count * share) for kind, count in NUM_DOCUMENTS.items()}
    brief, short = make_rows(encoder, corpus.short_document, (24, 48), num["short"], seed)
    (middle,) = make_rows(encoder, corpus.middle_document, (192,), num["middle"], seed + 1)
    (long,) = make_rows(encoder, corpus.long_document, (512,), num["long"], seed + 2)
    return {"brief": brief, "short": short, "middle": middle, "long": long}


def save_weights(network: nn.Module, trainer: Trainer, folder: Path) -> None:
    """The master weights in the parameters' dtypes, and the routers' buffers, in files of at most 15 MiB."""
    trainer.weights.refresh(quantised=False)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > MAX_FILE_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach().cpu().contiguous()
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"trained-{i}.safetensors", metadata={"format": "pt"})


def parse_arguments() -> argparse.Namespace:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--minutes", type=float, help="in place of --steps: as many as fit, from now to the end")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--no-compile", action="store_true", help="run the element-wise parts uncompiled (slower)")
    parser.add_argument("--data-share", type=float, default=1.0, help="share of the full data, for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {line}", flush=True)

    recipe = Recipe(seed=arguments.seed, num_steps=arguments.steps)
    tokenizer = make_tokenizer(recipe.seed)
    encoder = Encoder(tokenizer)
    data = make_data(encoder, recipe.seed, arguments.data_share)
    log("data: " + ", ".join(f"{kind} {tuple(rows.ids.shape)}" for kind, rows in data.items()))
    network = build_network(recipe.seed).to(arguments.device)
    rows = {kind: found.to(arguments.device) for kind, found in data.items()}
    compiled = arguments.device == "cuda" and not arguments.no_compile
    trainer = Trainer(network, rows, recipe, compiled)
    if trainer.on_gpu:
        trainer.capture()
        log("captured")
    if arguments.minutes:
        trainer.fit_steps(60 * arguments.minutes - (time.perf_counter() - start) - SECONDS_AFTER)
    log(f"start: {sum(p.numel() for p in network.parameters())} parameters, {trainer.recipe.num_steps} steps")
    trainer.run(log)
    save_weights(network, trainer, arguments.out)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    exam = {}
    for form, quantised in (("before quantisation", False), ("quantised", True)):
        trainer.weights.refresh(quantised)
        exam[form] = teacher_forced_scores(network, encoder, questions(recipe.seed), arguments.device)
        log(f"{form}: {json.dumps(exam[form])}")
    (arguments.out / "exam.json").write_text(json.dumps(exam, indent=1) + "\n", encoding="utf-8")
    curve = {
        "recipe": trainer.recipe.as_dict(),
        "config": FIELDS,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
        "seconds": round(time.perf_counter() - start, 1),
        "curve": trainer.curve,
    }
    (arguments.out / "curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    log("saved")


if __name__ == "__main__":
    main()
