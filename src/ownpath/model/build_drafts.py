"""Builds the drafts of a model: MTP modules, or DSpark. The builder's own work, in a file of its own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ownpath.attention.rope import Rope
from ownpath.cache.layout import MOST_DECODE_ROWS
from ownpath.model.dspark import DSpark
from ownpath.model.mtp import Mtp
from ownpath.model.ranks import Product
from ownpath.runners import HyperBoundary, Mix, RMSNorm

if TYPE_CHECKING:
    from ownpath.model.build import Builder

NORMS = ("enorm", "hnorm")
"""Of a module's input: the next token's embedding, and the streams."""


def mtp_modules(builder: "Builder", sliding: Rope, compress: Rope) -> Iterator[Mtp]:
    """Builds the MTP modules that are planned."""
    config, params = builder.config, builder.params
    if config.dspark or not builder.engine.loads_draft:
        return
    for draft_idx, layer in enumerate(config.draft_layers()):
        name = layer.name
        enorm, hnorm, hc_head = module_companions(builder, name)
        yield Mtp(
            embed_VD=params["embed.weight"],
            enorm=enorm,
            hnorm=hnorm,
            e_proj=builder._runner(f"{name}.e_proj"),
            h_proj=builder._runner(f"{name}.h_proj"),
            block=builder.block(config.num_hidden_layers + draft_idx, compress),
            hc_head=hc_head,
            rope=sliding,
            adding=_adding(config.hc_mult, params["embed.weight"].device, builder.engine.dtype),
        )


def module_companions(builder: "Builder", name: str) -> tuple[RMSNorm, RMSNorm, HyperBoundary]:
    """Builds the companions of an MTP module around its layer: ``enorm``, ``hnorm`` and ``hc_head``."""
    enorm, hnorm = (builder._norm(f"{name}.{norm}", builder.params[f"{name}.{norm}.weight"]) for norm in NORMS)
    return enorm, hnorm, builder._boundary(f"{name}.hc_head", f"{name}.norm")


def _adding(num_streams: int, device: torch.device, dtype: torch.dtype) -> Mix:
    """Makes the mix that adds an output to every stream, and mixes none."""
    wide = torch.promote_types(dtype, torch.float32)
    one_SS = torch.eye(num_streams, dtype=wide, device=device)
    post_TS = torch.ones(MOST_DECODE_ROWS, num_streams, dtype=wide, device=device)
    return Mix(post_TS, one_SS.repeat(MOST_DECODE_ROWS, 1, 1))


def dspark(builder: "Builder", head: Product, sliding: Rope, compress: Rope) -> DSpark | None:
    """Builds DSpark; ``None`` where it is not planned. head: the backbone's."""
    config, params, shape = builder.config, builder.params, builder.config.dspark
    if not shape or not builder.engine.loads_draft:
        return None
    first, last = config.num_hidden_layers, f"mtp.{shape.num_stages - 1}"
    return DSpark(
        shape=shape,
        embed_VD=params["embed.weight"],
        main_proj=builder._runner("mtp.0.main_proj"),
        main_norm=builder._norm("mtp.0.main_norm", params["mtp.0.main_norm.weight"]),
        stages=tuple(builder.block(first + stage, compress) for stage in range(shape.num_stages)),
        leave=builder._boundary(f"{last}.hc_head", f"{last}.norm"),
        hc_head=builder._hyper_weights(f"{last}.hc_head", f"{last}.norm"),
        head=head,
        markov_w1_VM=params[f"{last}.markov_head.markov_w1.weight"],
        markov_w2=builder._runner(f"{last}.markov_head.markov_w2"),
        confidence=params[f"{last}.confidence_head.proj.weight"],
        rope=sliding,
        window=config.sliding_window,
        first_layer_idx=first,
    )
