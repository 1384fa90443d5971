"""Writes a few layers at V4-Flash's real widths, with random weights, as a checkpoint that vLLM and ownpath load.

    python tools/flash_layers.py /dev/shm/flash4               # 4 layers: sliding, CSA, HCA, CSA; 15 GB
    python tools/flash_layers.py /tmp/tiny4 --widths tiny      # the same kinds of layers, 30 MB

Experts are ModelOpt's NVFP4, dense weights FP8 in blocks (wo_a too), the rest BF16: NVIDIA's export. config.json says
so in the words that stock vLLM asks for. The first layers look their experts up by token id, the others choose by
score. The tokenizer is the embedded model's: its ids are a part of the vocabulary.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from layer.shards import layer_fields, write_layers

from ownpath.loading import default_model_dir

WIDTHS = {"flash": "flash", "tiny": "small"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CLAIMS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "moe_quant_algo": "NVFP4",
}
"""By which stock vLLM takes its V4 methods: FP8 in blocks for linears, NVFP4 for experts."""


def main() -> int:
    """Writes the folder, and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--widths", choices=tuple(WIDTHS), default="flash")
    parser.add_argument("--hash-layers", type=int, default=1, help="that look experts up by token id")
    args = parser.parse_args()
    start = time.perf_counter()
    num_bytes = write_flash(args.folder, args.layers, args.widths, args.hash_layers)
    print(f"{args.folder}: {args.layers} layers, {num_bytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
    return 0


def write_flash(folder: Path, num_layers: int, widths: str, num_hash_layers: int) -> int:
    """Writes the checkpoint; returns its bytes of tensors. Errors: FileExistsError for a folder that is there."""
    fields = layer_fields(WIDTHS[widths], [0, *([4, 128] * num_layers)][:num_layers], num_hash_layers)
    fields |= {"quantization_config": CLAIMS, "torch_dtype": "bfloat16"}
    num_bytes = write_layers(folder, fields)
    for name in TOKENIZER:
        shutil.copy(default_model_dir() / name, folder)
    return num_bytes


if __name__ == "__main__":
    sys.exit(main())
