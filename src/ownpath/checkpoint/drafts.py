"""The draft modules behind the backbone, ``mtp.<n>.*``: their kind, and the reason why they stay unread.

MTP is one decoder layer that predicts the token after the next one. DSpark is another drafter under the same prefix,
recognised by the parts that only it has. The tensors decide: config.json says ``num_nextn_predict_layers`` 1 for both.
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


@dataclass(frozen=True)
class Draft:
    """The drafter in a checkpoint, and the number of its MTP modules that are read."""

    kind: DraftKind
    num_modules: int = 0

    def unread_reason(self, key: str) -> str | None:
        """Returns the reason why a key may stay unread, or ``None`` when there is none."""
        match = DRAFT_KEY.fullmatch(key)
        return needless_reason(key) if match is None else self._draft_reason(key, int(match[1]), match[2])

    def _draft_reason(self, key: str, module_idx: int, part: str) -> str | None:
        if self.kind is DraftKind.DSPARK:
            return "DSpark draft: another drafter than MTP, and not computed here"
        if self.num_modules == 0:
            return "MTP draft: drafting was not asked for"
        if module_idx >= self.num_modules:
            return f"MTP draft: num_nextn_predict_layers is {self.num_modules}"
        if part.startswith(_SHARED):
            return "copy of the backbone's embedding or head, which MTP shares"
        return needless_reason(key)


NO_DRAFT = Draft(DraftKind.NONE)


def carried_draft(index: CheckpointIndex) -> Draft:
    """Returns the checkpoint's drafter, with none of its modules to be read."""
    parts = [match[2] for key in index.tensors if (match := DRAFT_KEY.fullmatch(key)) is not None]
    if any(part.startswith(_OF_DSPARK) for part in parts):
        return Draft(DraftKind.DSPARK)
    return Draft(DraftKind.MTP if parts else DraftKind.NONE)


def requested_draft(config: ModelConfig, index: CheckpointIndex) -> Draft:
    """Returns the drafter with as many MTP modules to be read as config.json counts.

    Errors: CheckpointError where there are none to read.
    """
    kind = carried_draft(index).kind
    if kind is DraftKind.DSPARK:
        key = next(
            key for key in index.tensors if (match := DRAFT_KEY.fullmatch(key)) and match[2].startswith(_OF_DSPARK)
        )
        raise CheckpointError(f"tensor {index[key]}: a draft was asked for, and this one is DSpark's; "
                              "ownpath computes MTP modules only")  # fmt: skip
    if config.num_nextn_predict_layers == 0:
        raise CheckpointError(f"{index.folder}: a draft was asked for, but config.json has no num_nextn_predict_layers "
                              "above 0")  # fmt: skip
    gone = next((key for key in index.absent if DRAFT_KEY.fullmatch(key)), None)
    if gone is not None:
        shard = f"shard {index.absent[gone]!r}, which the index lists for its tensor {gone!r}"
        raise CheckpointError(f"{index.folder}: a draft was asked for, but {shard}, does not hold it or is not there")
    if kind is DraftKind.NONE:
        raise CheckpointError(f"{index.folder}: tensor 'mtp.0.e_proj.weight' is missing: a draft was asked for, and "
                              "this checkpoint has no mtp.* tensors")  # fmt: skip
    return Draft(kind, config.num_nextn_predict_layers)
