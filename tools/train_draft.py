"""Trains tiny-v4's MTP module over its frozen backbone, on a GPU or, with fewer rows, on a CPU.

    PYTHONPATH=src python tools/train_draft.py --out runs/draft --device cuda

Writes into ``--out``: ``draft.safetensors`` (the weights before quantisation) and ``draft-curve.json`` (recipe, loss
curve); also on the way. ``tools/export_draft.py`` adds the module to a checkpoint; ``tools/draft_acceptance.py``
measures it. ``--rows FILE`` keeps the drawn rows in a file, or takes them from it where it exists.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny.batches import Encoder, Rows
from tiny.data import make_data
from tiny.draft import first_weights
from tiny.draft_train import DraftRecipe, DraftTrainer, trained_weights
from tiny.streams import GrowingStreams, Streams, decoded_weights, load_backbone
from tokenizers import Tokenizer

from ownpath.loading import default_model_dir

DATA_SEED = 20261130
"""Not that of the backbone's training, nor of its examination: other lists, jobs and values; the same phrasings."""


def drawn_rows(arguments: argparse.Namespace) -> dict[str, Rows]:
    """Draws rows of every kind, or reads them."""
    if arguments.rows and arguments.rows.exists():
        stored = load_file(arguments.rows)
        kinds = sorted({name.rsplit(".", 1)[0] for name in stored})
        return {kind: Rows(stored[f"{kind}.ids"], stored[f"{kind}.role"]) for kind in kinds}
    encoder = Encoder(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    data = make_data(encoder, DATA_SEED, arguments.data_share)
    if arguments.rows:
        tensors = {f"{kind}.{part}": getattr(rows, part) for kind, rows in data.items() for part in ("ids", "role")}
        save_file(tensors, arguments.rows)
    return data


def run_backbone(
    arguments: argparse.Namespace, rows: dict[str, Rows], log: Callable[[str], None]
) -> dict[str, Streams]:
    """Runs the rows, a step of each kind in turn, until all are done or the time for it is over."""
    model = load_backbone(arguments.model, arguments.device, arguments.dtype)
    growing = {kind: GrowingStreams(model, found) for kind, found in rows.items() if len(found.ids)}
    log("backbone")
    start = time.perf_counter()
    while not all(one.is_done for one in growing.values()):
        for one in growing.values():
            if not one.is_done:
                one.step()
        if arguments.streams_seconds and time.perf_counter() - start > arguments.streams_seconds:
            break
    log("streams: " + ", ".join(f"{kind} {one.num_done}" for kind, one in growing.items()))
    return {kind: one.found() for kind, one in growing.items()}


def parse_arguments() -> argparse.Namespace:
    defaults = DraftRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", type=Path, default=default_model_dir(), help="the backbone's checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path, help="file of drawn rows")
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--stop-after", type=float, help="seconds of the whole run, instead of steps")
    parser.add_argument("--streams-seconds", type=float, help="run the backbone on rows no longer than this")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the backbone's activations")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--data-share", type=float, default=0.1, help="share of the documents of a training run")
    parser.add_argument("--row-share", type=float, default=1.0, help="share of the rows of a step")
    parser.add_argument("--eager", action="store_true", help="capture no CUDA graphs (slower)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {line}", flush=True)

    rows = drawn_rows(arguments)
    log("rows: " + ", ".join(f"{kind} {tuple(found.ids.shape)}" for kind, found in rows.items()))
    if arguments.rows and arguments.steps == 0:
        return
    data = run_backbone(arguments, rows, log)
    weights = decoded_weights(arguments.model)
    recipe = DraftRecipe(
        num_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        row_share=arguments.row_share,
    )
    shared = weights["embed.weight"].to(arguments.device), weights["head.weight"].to(arguments.device)
    trainer = DraftTrainer(first_weights(weights, recipe.seed), shared, data, recipe)
    if arguments.device == "cuda" and not arguments.eager:
        log(trainer.capture())
    if arguments.stop_after:
        trainer.recipe = replace(recipe, seconds=arguments.stop_after - (time.perf_counter() - start))

    def save() -> None:
        save_file(trained_weights(trainer), arguments.out / "draft.safetensors")
        report = {
            "recipe": trainer.recipe.as_dict(),
            "data": {"seed": DATA_SEED, "rows": {kind: list(found.ids.shape) for kind, found in rows.items()}},
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
            "seconds": round(time.perf_counter() - start, 1),
            "curve": trainer.curve,
        }
        (arguments.out / "draft-curve.json").write_text(json.dumps(report) + "\n", encoding="utf-8")

    trainer.run(log, save)
    log("saved")


if __name__ == "__main__":
    main()
