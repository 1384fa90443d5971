"""Checkpoints that are whole and valid, and hold other weights than they were made from: told by another export."""

import torch

from support.broken import Tensors
from support.mutations.mutation import Mutation, OnDisk, tensors_changed

EXPERTS = "layers.1.ffn.experts"
NUM_EXPERTS = 8


def of_every_expert(*names: str) -> list[str]:
    return [f"{EXPERTS}.{expert}.{name}" for expert in range(NUM_EXPERTS) for name in names]


def each(name: str, change: object) -> OnDisk:
    """The same tensor of all experts of one layer, as one wrong line of a converter changes them."""

    def changed(tensors: Tensors) -> None:
        for key in of_every_expert(name):
            tensors[key] = change(tensors[key]).contiguous()  # type: ignore[operator]

    return tensors_changed(changed)


def exchange_gate_and_up(tensors: Tensors) -> None:
    for part in ("weight", "weight_scale"):
        for one, other in zip(of_every_expert(f"w1.{part}"), of_every_expert(f"w3.{part}"), strict=True):
            tensors[one], tensors[other] = tensors[other], tensors[one]


def shift_experts(tensors: Tensors) -> None:
    for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        keys = of_every_expert(f"w2.{part}")
        moved = [tensors[key] for key in keys[-1:] + keys[:-1]]
        tensors.update(zip(keys, moved, strict=True))


def other_nibble_first(codes: torch.Tensor) -> torch.Tensor:
    return codes << 4 | codes >> 4


def moved_by_one(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.uint8).roll(1, dims=1).view(torch.float8_e4m3fn)


def without_signs(codes: torch.Tensor) -> torch.Tensor:
    return codes & 0x77


def rounded_down(codes: torch.Tensor) -> torch.Tensor:
    """Every code but zero is the next smaller one."""
    low, high = codes & 0x7, codes >> 4 & 0x7
    return codes - (low > 0).to(torch.uint8) - ((high > 0).to(torch.uint8) << 4)


def beside(what: str, module: str, on_disk: OnDisk) -> Mutation:
    return Mutation(what, "F13", module, on_disk, source=True)


MUTATIONS = {
    "other nibble first, in the file": beside(
        "w2 of a layer's experts", f"{EXPERTS}.4.w2", each("w2.weight", other_nibble_first)
    ),
    "gate and up exchanged, in the file": beside(
        "w1 and w3 of a layer's experts", f"{EXPERTS}.4.w1", tensors_changed(exchange_gate_and_up)
    ),
    "block scales moved by one, in the file": beside(
        "w2 of a layer's experts", f"{EXPERTS}.4.w2", each("w2.weight_scale", moved_by_one)
    ),
    "experts shifted by one, in the file": beside(
        "w2 of a layer's experts", f"{EXPERTS}.4.w2", tensors_changed(shift_experts)
    ),
    "signs lost, in the file": beside("w3 of a layer's experts", f"{EXPERTS}.4.w3", each("w3.weight", without_signs)),
    "codes rounded down, in the file": beside(
        "w1 of a layer's experts", f"{EXPERTS}.4.w1", each("w1.weight", rounded_down)
    ),
    "global scales doubled, in the file": beside(
        "w2 of a layer's experts", f"{EXPERTS}.4.w2", each("w2.weight_scale_2", lambda g: 2 * g)
    ),
}
