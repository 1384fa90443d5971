"""Corruptions that `ownpath verify` passes, each with the reason: nothing that it looks at is wrong."""

from dataclasses import dataclass

import torch

from support.broken import Tensors
from support.mutations.exports import EXPERTS, exchange_gate_and_up, moved_by_one
from support.mutations.mutation import Mutation, assigned, in_config, tensors_changed

NOWHERE = ("", "")


@dataclass(frozen=True)
class Unseen:
    """why: what verify would have to know, and what does tell."""

    mutation: Mutation
    why: str


def without_biases(tensors: Tensors) -> None:
    for key in tensors:
        if key.endswith("gate.bias"):
            tensors[key] = torch.zeros_like(tensors[key])


MUTATIONS = {
    "gate and up exchanged, and no other export": Unseen(
        Mutation(
            "w1 and w3 of a layer's experts in the file", *NOWHERE, tensors_changed(exchange_gate_and_up), layer_idx=1
        ),
        "the file is another model's, and right for that one. With `--source` F13 names each matrix",
    ),
    "one expert that is not drawn": Unseen(
        Mutation(
            "block scales of expert 0 moved by one",
            *NOWHERE,
            assigned(f"{EXPERTS}.0.w2.weight_scale", moved_by_one),
            stages=("file",),
            source=True,
        ),
        "F13 decodes 4 experts of each layer unless `--experts` asks for more, and 0 is not among them. Without "
        "another export it is the case above",
    ),
    "every gate.bias zero": Unseen(
        Mutation("all routers' biases in the file", *NOWHERE, tensors_changed(without_biases), layer_idx=1),
        "a model trained without them looks the same. F10's line says that all are constant",
    ),
    "another model's rope_theta": Unseen(
        Mutation(
            "config.json: compress_rope_theta 40000 for 160000",
            *NOWHERE,
            in_config(compress_rope_theta=40000.0),
            layer_idx=1,
        ),
        "both are valid models, and engine and oracle compute what the file says. V04 prints the likelihood of a text, "
        "which needs a trained model to mean something; serving asks a question first (S01)",
    ),
}
