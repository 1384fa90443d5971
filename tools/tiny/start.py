"""Continues training from an earlier run, whose tokenizer may be smaller or different."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from tiny.export import read_trained

# What has a row for each token: the average is taken for a new one, or its last piece's row.
_AVERAGED = ("model.embed_tokens.weight", "lm_head.weight")
_TOKEN_EXPERTS = "model.layers.0.mlp.gate.tid2eid"


def start_from(network: nn.Module, folder: Path, tokenizer: Tokenizer) -> None:
    """Loads the weights of an earlier run into the network. Errors: ValueError when they do not fit."""
    trained = read_trained(folder)
    earlier = Tokenizer.from_file(str(folder / "tokenizer.json"))
    missing, unexpected = network.load_state_dict(carry_over(trained, earlier, tokenizer), strict=False)
    left = [name for name in missing if not name.endswith("inv_freq")]
    if left or unexpected:
        raise ValueError(f"{folder}: the weights do not fit: missing {left}, unexpected {unexpected}")


def carry_over(trained: dict[str, Tensor], earlier: Tokenizer, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Returns the earlier tensors with one row for each token of ``tokenizer``, in its order.

    A token that the earlier tokenizer has keeps its rows. Another one starts as the mean of the earlier tokens that
    spell it: its logit is then never above the highest of theirs, so that earlier answers do not change. It gets the
    experts of the last of these tokens, whose output predicted the next one.
    """
    spelled = spellings(earlier, tokenizer)
    found = dict(trained)
    for name in _AVERAGED:
        rows = [trained[name][ids].float().mean(dim=0) for ids in spelled]
        found[name] = torch.stack(rows).to(trained[name].dtype)
    found[_TOKEN_EXPERTS] = trained[_TOKEN_EXPERTS][[ids[-1] for ids in spelled]]
    return found


def spellings(earlier: Tokenizer, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns, for each token id, the earlier tokens' ids that spell it: one if the earlier tokenizer has the token."""
    known = earlier.get_vocab(with_added_tokens=True)
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
    return [
        [known[token]] if token in known else [piece.id for piece in earlier.model.tokenize(token)]
        for token, _ in tokens
    ]
