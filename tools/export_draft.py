"""Adds the MTP module that ``train_draft.py`` saved to tiny-v4's checkpoint.

    PYTHONPATH=src python tools/export_draft.py --draft runs/draft/draft.safetensors --model src/ownpath/assets/tiny-v4

Writes ``mtp.safetensors`` and changes the index, ``config.json`` and ``hf_quant_config.json``; the backbone's shards
stay byte for byte. Calibrates activation scales on new documents (CPU, a few minutes).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import corpus
from tiny.batches import PADDING, Encoder, make_rows
from tiny.draft import Places, Weights, draft_hidden, stored_values
from tiny.draft_export import DraftCalibration, add_draft, draft_tensors
from tiny.streams import backbone_streams, decoded_weights, load_backbone
from tokenizers import Tokenizer

SEED = 20261131
"""Not that of the draft's training."""
NUM_DOCUMENTS = {"short": 60, "request": 30, "middle": 10, "long": 4, "tools": 20}
WIDTH = 768


def calibrate(folder: Path, weights: Weights) -> DraftCalibration:
    """Measures the largest activations on documents that training has not drawn."""
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    model, embed = load_backbone(folder, "cpu"), decoded_weights(folder)["embed.weight"].float()
    makers = {
        "short": corpus.short_document,
        "request": corpus.request_document,
        "middle": corpus.middle_document,
        "long": corpus.long_document,
        "tools": corpus.tools_document,
    }
    calibration, values = DraftCalibration(), stored_values({name: w.float() for name, w in weights.items()})
    for kind, count in NUM_DOCUMENTS.items():
        (rows,) = make_rows(encoder, makers[kind], (WIDTH,), count, SEED)
        lengths = (rows.role != PADDING).sum(1)
        found = backbone_streams(model, rows)
        for row, length in enumerate(lengths.tolist()):
            embedded = embed[rows.ids[row, 1:length].long()]
            streams = found.streams[row, : length - 1].float()
            with torch.no_grad():
                places = Places.of(length - 1, embedded.device)
                draft_hidden(values, streams[None], embedded[None], places, calibration.see)
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True, help="draft.safetensors of train_draft.py")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint folder to add it to")
    arguments = parser.parse_args()
    weights = load_file(arguments.draft)
    add_draft(arguments.model, dict(draft_tensors(weights, calibrate(arguments.model, weights))))
    num_bytes = sum(path.stat().st_size for path in arguments.model.iterdir())
    print(f"{arguments.model}: {num_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
