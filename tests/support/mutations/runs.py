"""`ownpath verify` on a mutation, in this process: the command's stages in their order, and their result."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpu.chat.small_tokenizer import NUM_TOKENS, tokenizer_spec

from ownpath.config import EngineConfig
from ownpath.engine.draft_decoder import ROWS
from ownpath.finding import Finding, failed, warned
from ownpath.loading import default_model_dir
from ownpath.official import OFFICIAL, PLAIN
from ownpath.plan.show import plan_dict
from ownpath.verify.run import STAGES, Verification, VerifyJob, verify
from ownpath.verify.subject import Selection
from support.checkpoints import random_checkpoint
from support.hopper_layouts import subject_on
from support.mutations.mutation import MODULE_IDX, Mutation

WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 136}
SHAPE = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "vocab_size": NUM_TOKENS + 7}
"""One layer of each kind; the first looks its experts up by token."""
DRAFTING_TOKENS = 240
"""Of the text beside which a module is looked at: past the window."""


def write_model(
    folder: Path, layout: str = "full-nvfp4", seed: int = 3, draft: str | None = None, **changes: Any
) -> Path:
    """A small checkpoint with a tokenizer, with nothing wrong in it. draft: the layout of its MTP module."""
    random_checkpoint(folder, layout, seed, draft=draft, **SHAPE | changes)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}', encoding="utf-8")
    return folder


def write_models(folder: Path) -> dict[str, Path]:
    """The folders to corrupt, and "source", another export of "small"."""
    return {
        "small": write_model(folder / "small"),
        "source": write_model(folder / "source", "bf16"),
        "native": write_model(folder / "native", "deepseek-native", **WIDE),
        "embedded": default_model_dir(),
        "drafting": write_model(
            folder / "drafting", draft="deepseek-native", num_hidden_layers=MODULE_IDX, compress_ratios=[0]
        ),
    }


def verified(mutation: Mutation, models: dict[str, Path], scratch: Path) -> Verification:
    """Runs the stages on a mutation of one of the models. scratch: an empty folder."""
    folder = intact = models[mutation.model]
    if mutation.on_disk is not None:
        folder = Path(shutil.copytree(intact, scratch / "model"))
        mutation.on_disk(folder)
    layer_ids = None if mutation.layer_idx is None else frozenset({mutation.layer_idx})
    layer_ids = frozenset({MODULE_IDX}) if mutation.drafts else layer_ids
    official = OFFICIAL if mutation.is_official else PLAIN
    engine = EngineConfig(official=official, cache_format=mutation.cache_format)
    if mutation.drafts:
        engine = replace(engine, loads_draft=True, rows_per_request=ROWS, max_model_len=DRAFTING_TOKENS)
    job = VerifyJob(folder, engine, Selection(layer_ids))
    job.source = models["source"] if mutation.source else None
    if mutation.in_plan is not None:
        written = json.loads(json.dumps(plan_dict(job.subject.plan)))
        mutation.in_plan(written)
        job.written_plan = written
    if mutation.device != "CPU":
        job.subject = subject_on(folder, mutation.device, job.selection)
    with mutation.interference.applied():
        return verify(job, mutation.stages or STAGES)


@dataclass(frozen=True)
class Outcome:
    """ids: of every check that failed, or for a warning those that warned. finding: the one that the mutation is there
    for; ``None``: it is not among them."""

    ids: tuple[str, ...]
    finding: Finding | None


def outcome_of(mutation: Mutation, result: Verification) -> Outcome:
    listed = warned(result.findings) if mutation.is_warning else failed(result.findings)
    found = [told(result, finding) for finding in listed]
    expected = (finding for finding in found if (finding.id, finding.where) == (mutation.check, mutation.where))
    return Outcome(tuple(dict.fromkeys(finding.id for finding in found)), next(expected, None))


def told(result: Verification, finding: Finding) -> Finding:
    """A finding without what is of this run alone: where the folder is, how many shards there are."""
    folder = str(result.job.folder)
    where, message = (
        re.sub(r"-of-\d{5}", "-of-{n}", text.replace(f"{folder}/", "").replace(folder, "MODEL"))
        for text in (finding.where, finding.message)
    )
    return replace(finding, where=where, message=message)
