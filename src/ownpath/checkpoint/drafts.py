"""The draft modules behind the backbone, ``mtp.<n>.*``: their kind, and the reason why they stay unread.

MTP is one decoder layer that predicts the token after the next one. DSpark guesses a block of tokens, by several layers
under the same prefix, recognised by the parts that only it has. The tensors decide: config.json says
``num_nextn_predict_layers`` 1 for both.
"""

from dataclasses import dataclass
from enum import StrEnum

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex
from ownpath.checkpoint.needless import DRAFT_KEY, needless_reason
from ownpath.config import ModelConfig

_OF_DSPARK = ("main_proj.", "main_norm.", "markov_head.", "confidence_head.")
_SHARED = ("emb", "head.")


class DraftKind(StrEnum):
    """The kind of drafter in a checkpoint."""

    NONE = "none"
    MTP = "MTP"
    DSPARK = "DSpark"


_COUNTED = {
    DraftKind.MTP: "num_nextn_predict_layers is",
    DraftKind.DSPARK: "entries of compress_ratios behind the backbone's:",
}


@dataclass(frozen=True)
class Draft:
    """The drafter in a checkpoint, and the number of its MTP modules, or DSpark's stages, that are read."""

    kind: DraftKind
    num_modules: int = 0

    def unread_reason(self, key: str) -> str | None:
        """Returns the reason why a key may stay unread, or ``None`` when there is none."""
        match = DRAFT_KEY.fullmatch(key)
        return needless_reason(key) if match is None else self._draft_reason(key, int(match[1]), match[2])

    def _draft_reason(self, key: str, module_idx: int, part: str) -> str | None:
        if self.num_modules == 0:
            return f"{self.kind} draft: drafting was not asked for"
        if module_idx >= self.num_modules:
            return f"{self.kind} draft: {_COUNTED[self.kind]} {self.num_modules}"
        if part.startswith(_SHARED):
            return f"copy of the backbone's embedding or head, which {self.kind} shares"
        return needless_reason(key)


NO_DRAFT = Draft(DraftKind.NONE)


def carried_draft(index: CheckpointIndex) -> Draft:
    """Returns the checkpoint's drafter, with none of its modules to be read."""
    parts = [match[2] for key in index.tensors if (match := DRAFT_KEY.fullmatch(key)) is not None]
    if any(part.startswith(_OF_DSPARK) for part in parts):
        return Draft(DraftKind.DSPARK)
    return Draft(DraftKind.MTP if parts else DraftKind.NONE)


def requested_draft(config: ModelConfig, index: CheckpointIndex) -> Draft:
    """Returns the drafter with as many MTP modules, or DSpark's stages, to be read as config.json counts.

    Errors: CheckpointError where there are none to read.
    """
    kind = carried_draft(index).kind
    asked = f"{index.folder}: a draft was asked for"
    if kind is DraftKind.DSPARK and not config.dspark:
        raise CheckpointError(f"{asked}, DSpark's, but config.json's {config.dspark.lack}")
    if not config.dspark and config.num_nextn_predict_layers == 0:
        raise CheckpointError(f"{asked}, but config.json has no num_nextn_predict_layers above 0")
    gone = next((key for key in index.absent if DRAFT_KEY.fullmatch(key)), None)
    if gone is not None:
        shard = f"shard {index.absent[gone]!r}, which the index lists for its tensor {gone!r}"
        raise CheckpointError(f"{asked}, but {shard}, does not hold it or is not there")
    if kind is DraftKind.NONE:
        first = "main_proj" if config.dspark else "e_proj"
        raise CheckpointError(f"{index.folder}: tensor 'mtp.0.{first}.weight' is missing: a draft was asked for, and "
                              "this checkpoint has no mtp.* tensors")  # fmt: skip
    if kind is DraftKind.MTP and config.dspark:
        raise CheckpointError(f"{asked}: its tensors are MTP's, and config.json's dspark_target_layer_ids are DSpark's")
    return Draft(kind, config.dspark.num_stages or config.num_nextn_predict_layers)
