"""Makes the checkpoint folder of tiny-v4 from what ``train_tiny.py`` saved.

    PYTHONPATH=src python tools/export_tiny.py --trained runs/tiny-v4 --out src/ownpath/assets/tiny-v4

``--out`` must not hold a checkpoint yet. Calibrates activation scales on 400 documents (CPU, about a minute).
"""

import argparse
from pathlib import Path

from tiny import corpus
from tiny.batches import Encoder, make_rows
from tiny.calibrate import Calibration
from tiny.export import checkpoint_tensors, make_stored_network, read_trained, write_json_files
from tiny.tokens import write_tokenizer
from tiny.train import Recipe
from tokenizers import Tokenizer

from ownpath.checkpoint.writer import write_checkpoint

MAX_SHARD_BYTES = 6_000_000
NUM_DOCUMENTS = {"short": 240, "request": 60, "middle": 40, "long": 20, "tools": 40}


def calibrate(trained_folder: Path) -> Calibration:
    """Measures the largest activations on documents that training has not drawn (another seed)."""
    encoder = Encoder(Tokenizer.from_file(str(trained_folder / "tokenizer.json")))
    calibration = Calibration(make_stored_network(read_trained(trained_folder)))
    seed = Recipe().seed + 500
    makers = {
        "short": corpus.short_document,
        "request": corpus.request_document,
        "middle": corpus.middle_document,
        "long": corpus.long_document,
        "tools": corpus.tools_document,
    }
    for kind, num_documents in NUM_DOCUMENTS.items():
        (rows,) = make_rows(encoder, makers[kind], (768,), num_documents, seed)
        calibration.run(rows, num_documents)
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="the folder that train_tiny.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to make")
    arguments = parser.parse_args()
    trained = read_trained(arguments.trained)
    calibration = calibrate(arguments.trained)
    write_checkpoint(arguments.out, checkpoint_tensors(trained, calibration), MAX_SHARD_BYTES)
    write_json_files(arguments.out, trained)
    write_tokenizer(Tokenizer.from_file(str(arguments.trained / "tokenizer.json")), arguments.out)
    num_bytes = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {num_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
