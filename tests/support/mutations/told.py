"""Corruptions that are right here and wrong elsewhere, or used by others only: told as a warning, and nothing fails."""

import torch

from support.mutations.files import EXPERT, INPUT, generation
from support.mutations.mutation import Mutation, OnDisk, assigned, in_config, json_changed

FILE = ("file",)


def _told(what: str, check: str, where: str, change: OnDisk) -> Mutation:
    return Mutation(what, check, where, change, stages=FILE, is_warning=True)


MUTATIONS = {
    "expert_dtype contradicts": _told("config.json: expert_dtype", "F04", "config.json", in_config(expert_dtype="fp8")),
    "gate and up scaled apart": _told(
        "w3's weight_scale_2", "F06", EXPERT, assigned(f"{EXPERT}.w3.weight_scale_2", lambda g: g * 1.5)
    ),
    "input scale by default, read by nothing": _told(
        "input_scale is 1", "F09", INPUT, assigned(INPUT, torch.ones_like)
    ),
    "another end of generation": _told("generation_config.json", "F12", "eos_token_id", generation(eos_token_id=[5])),
    "padding that is no token": _told("generation_config.json", "F12", "pad_token_id", generation(pad_token_id=-1)),
    "another beginning": _told(
        "tokenizer_config.json",
        "F12",
        "bos_token",
        json_changed("tokenizer_config.json", lambda c: c.update(bos_token="<s>")),
    ),
}
