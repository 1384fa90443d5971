"""The shape of DSpark, the drafter of the refreshed releases, from its fields in ``config.json``.

``num_nextn_predict_layers`` is 1 there, as for MTP. The stages are as many as ``compress_ratios`` has entries behind
the backbone's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_COUNTS = ("dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id")
DSPARK_FIELDS = frozenset({*_COUNTS, "dspark_target_layer_ids"})
"""The fields that are read."""


@dataclass(frozen=True)
class DSparkShape:
    """num_stages: decoder layers of the drafter. block_size: tokens that it guesses at once.

    noise_token_id: the token that stands for each guess but the first's input. target_layer_ids: backbone layers whose
    output it reads. markov_rank: width of the head that knows the guess before. lack: of a shape without stages, which
    is False, what is wrong with the fields.
    """

    num_stages: int = 0
    block_size: int = 0
    noise_token_id: int = 0
    target_layer_ids: tuple[int, ...] = ()
    markov_rank: int = 0
    lack: str = field(default="", compare=False)

    def __bool__(self) -> bool:
        return self.num_stages > 0


NO_DSPARK = DSparkShape()


def read_dspark(fields: Mapping[str, object], num_layers: int) -> DSparkShape:
    """Returns the shape; one without stages where the fields are absent or wrong. num_layers: of the backbone."""
    ratios, targets, vocab = (fields.get(f) for f in ("compress_ratios", "dspark_target_layer_ids", "vocab_size"))
    if not isinstance(targets, list) or not targets or not all(type(i) is int and 0 <= i < num_layers for i in targets):
        return DSparkShape(lack="dspark_target_layer_ids is no list of the backbone's layers")
    counts = []
    for name in _COUNTS:
        value = fields.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            return DSparkShape(lack=f"{name} is no positive integer")
        counts.append(value)
    if not isinstance(vocab, int) or counts[-1] >= vocab:
        return DSparkShape(lack=f"dspark_noise_token_id is {counts[-1]}, and there are {vocab} tokens")
    num_stages = len(ratios) - num_layers if isinstance(ratios, list) else 0
    if num_stages < 1:
        return DSparkShape(lack="compress_ratios has no entry behind the backbone's, one for each stage")
    if targets != sorted(set(targets)):
        return DSparkShape(lack="dspark_target_layer_ids is not in ascending order")
    block_size, markov_rank, noise_token_id = counts
    return DSparkShape(num_stages, block_size, noise_token_id, tuple(targets), markov_rank)
