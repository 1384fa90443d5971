"""Trains tiny-v4 on one GPU.

    PYTHONPATH=src python tools/train_tiny.py --out runs/tiny-v4

Writes into ``--out``: ``trained-0.safetensors`` ... (the weights before quantisation, under transformers' names, in
the dtypes of the checkpoint; also about once a minute on the way), ``tokenizer.json``, and ``curve.json`` (recipe, loss
curve). ``tools/export_tiny.py`` makes the checkpoint from these; ``tools/eval_tiny.py`` examines it.
``--start FOLDER`` goes on from another run's results.
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
from tiny.batches import Encoder
from tiny.data import make_data
from tiny.network import FIELDS, build_network
from tiny.start import start_from
from tiny.tokens import VOCAB_SIZE, extend_tokenizer, train_tokenizer
from tiny.train import NUM_ROWS, PATTERNS, Recipe, Trainer
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_FILE_BYTES = 15 * 2**20
NUM_TOKENIZER_DOCUMENTS = 40_000


def make_tokenizer(seed: int, start: Path | None) -> Tokenizer:
    """Returns a new tokenizer, or an earlier run's with merges added up to the network's number of tokens."""
    texts = corpus.tokenizer_texts(random.Random(seed), NUM_TOKENIZER_DOCUMENTS)
    if start is None:
        return train_tokenizer(list(texts))
    earlier = Tokenizer.from_file(str(start / "tokenizer.json"))
    return earlier if earlier.get_vocab_size() == VOCAB_SIZE else extend_tokenizer(earlier, texts)


def save_weights(network: nn.Module, trainer: Trainer, folder: Path) -> None:
    """Saves master weights in the parameters' dtypes and the routers' buffers, in files of at most 15 MiB.

    The network's parameters hold the master weights afterwards, until the next step.
    """
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
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the data and the order of rows")
    parser.add_argument("--start", type=Path, help="go on from the weights and the tokenizer of this run's folder")
    parser.add_argument("--opening-steps", type=int, default=defaults.num_opening_steps, help="0 goes with --start")
    parser.add_argument("--pattern", choices=list(PATTERNS), default=defaults.pattern, help="which rows take turns")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--quantised-from", type=float, default=defaults.quantised_from, help="share of the steps")
    parser.add_argument("--no-compile", action="store_true", help="run the element-wise parts uncompiled (slower)")
    parser.add_argument("--data-share", type=float, default=1.0, help="share of the full data, for a trial")
    parser.add_argument("--row-share", type=float, default=1.0, help="share of the rows of a step, for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {line}", flush=True)

    recipe = Recipe(
        seed=arguments.seed,
        num_steps=arguments.steps,
        num_opening_steps=arguments.opening_steps,
        pattern=arguments.pattern,
        learning_rate=arguments.learning_rate,
        quantised_from=arguments.quantised_from,
        num_rows={kind: max(1, int(num * arguments.row_share)) for kind, num in NUM_ROWS.items()},
    )
    tokenizer = make_tokenizer(Recipe().seed, arguments.start)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    encoder = Encoder(tokenizer)
    log("tokenizer")
    data = make_data(encoder, recipe.seed, arguments.data_share)
    log("data: " + ", ".join(f"{kind} {tuple(rows.ids.shape)}" for kind, rows in data.items()))
    network = build_network(Recipe().seed)
    if arguments.start:
        start_from(network, arguments.start, tokenizer)
    network = network.to(arguments.device)
    rows = {kind: found.to(arguments.device) for kind, found in data.items()}
    compiled = arguments.device == "cuda" and not arguments.no_compile
    trainer = Trainer(network, rows, recipe, compiled)
    if trainer.on_gpu:
        trainer.capture()
        log("captured")
    log(f"start: {sum(p.numel() for p in network.parameters())} parameters, {recipe.num_steps} steps")
    trainer.run(log, lambda: save_weights(network, trainer, arguments.out))
    save_weights(network, trainer, arguments.out)
    log("weights saved")
    curve = {
        "recipe": recipe.as_dict(),
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
