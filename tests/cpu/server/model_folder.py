"""A complete model folder with a real (random) model, as the commands take it."""

import json
from pathlib import Path

from cpu.chat.small_tokenizer import NUM_TOKENS, tokenizer_spec
from support.checkpoints import random_checkpoint

VOCAB = NUM_TOKENS + 7


def write_model_folder(folder: Path, draft: str | None = None, seed: int = 3) -> Path:
    """Weights in the ModelOpt layout, config and tokenizer; the embedding has 7 rows more than there are tokens.

    draft: layout of an MTP module to write too.
    """
    random_checkpoint(folder, "modelopt-experts-only", seed=seed, draft=draft, vocab_size=VOCAB)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}', encoding="utf-8")
    return folder
